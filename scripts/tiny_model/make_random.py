"""Write a small random Stable-Diffusion-shaped checkpoint, for the tests.

The blocks, layer names, files and schedule are Stable Diffusion's; the weights are random. A few
last layers are fitted, so that the VAE returns a blurred copy of a picture and DDIM can invert the
UNet, whose prediction follows text, timestep and place; but it has learnt nothing, and what it
edits looks like noise. No network is needed. `--architecture sd21` writes the full-size layers
instead, to time and to size a run without the real weights; `medium` lies between, for a CPU.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    DPTConfig,
    DPTForDepthEstimation,
    DPTImageProcessor,
)

from scripts.tiny_model.model_files import (
    END,
    MAX_TOKENS,
    START,
    bpe_vocabulary,
    ddim_scheduler,
    model_index,
    save_weights,
    write_json,
    write_tokenizer,
)
from util import ArgumentParser, UserError, check_writable, command_line, setup_logging

log = logging.getLogger("tokenflow")

KINDS = ("base", "depth", "v_prediction")
# Std of what is random in the UNet's prediction: as much as still lets DDIM invert it in 50 steps.
RANDOM_SHARE = 0.3
# Common in prompts, and one token each; any other text is spelled out.
WORDS = (
    "a an the of in on with and man woman dog cat wolf bird car horse running walking moving "
    "photo painting sculpture robot marble wooden golden shiny red green blue style disc star"
)


@dataclass(frozen=True)
class Architecture:
    """Sizes of a checkpoint's networks; everything else is the same in all Stable Diffusions."""

    unet: dict
    vae: dict
    text: dict
    hint_channels: tuple[int, ...]  # of the ControlNet's embedding of its picture


def tiny_architecture(width: int) -> Architecture:
    """SD's blocks with `width` channels where SD has 640 or 1280, and half of that at the top."""
    return Architecture(
        unet={
            "sample_size": 8,
            "block_out_channels": (width // 2, width, width, width),
            "attention_head_dim": (2, 4, 4, 4),  # diffusers' name for the number of heads
            "cross_attention_dim": width,
            "norm_num_groups": 4,
        },
        vae={
            "sample_size": 64,
            "block_out_channels": (16, 16, 16, 16),
            "layers_per_block": 1,
            "norm_num_groups": 2,  # each group's mean is lost: more groups, paler pictures
        },
        text={"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": 4},
        hint_channels=(8, 8, 16, 16),
    )


# Stable Diffusion 2.1 base. Its text encoder, of 23 layers, runs once per prompt and counts for
# nothing in a run's time: here it has two, and the small vocabulary below.
SD21 = Architecture(
    unet={
        "sample_size": 64,
        "block_out_channels": (320, 640, 1280, 1280),
        "attention_head_dim": (5, 10, 20, 20),
        "cross_attention_dim": 1024,
        "use_linear_projection": True,
    },
    vae={"sample_size": 512, "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2},
    text={"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16},
    hint_channels=(16, 32, 96, 256),
)

# SD's blocks and image sizes with a tenth of its weights: big enough that matrix products, not
# calls, take the time on a CPU, and small enough that an edit takes minutes there.
MEDIUM = Architecture(
    unet={
        "sample_size": 64,
        "block_out_channels": (96, 192, 384, 384),
        "attention_head_dim": (3, 6, 12, 12),
        "cross_attention_dim": 384,
        "use_linear_projection": True,
    },
    vae={"sample_size": 512, "block_out_channels": (32, 64, 128, 128), "layers_per_block": 1},
    text={"hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 6},
    hint_channels=(16, 32, 64, 96),
)
LARGER = {"medium": MEDIUM, "sd21": SD21}
ARCHITECTURES = ("tiny", *LARGER)


def make_model(
    folder: str | Path,
    *,
    seed: int = 0,
    kind: str = "base",
    width: int = 32,
    controlnet: bool = False,
    architecture: str = "tiny",
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a random checkpoint in diffusers' folder format.

    One seed gives the same files, bit by bit, with the same versions of the libraries (and, but
    for tiny, as many threads); the caller's random state is left as it was. model_index.json is
    written last.

    Args:
        folder: where to; made if missing, files in it are replaced.
        seed: of all weights.
        kind: "base" (predicts eps), "v_prediction", or "depth" (predicts eps from a fifth latent
            channel; the depth estimator comes with it, as in Stable Diffusion 2's).
        width: channels of the tiny architecture, a multiple of 16.
        controlnet: also write controlnet/, whose residuals are small but not zero.
        architecture: "tiny", "sd21" for the layers of Stable Diffusion 2.1, or "medium" for those
            with 0.3 of its channels.
        dtype: of the written weights.

    Raises:
        UserError: kind, architecture or width is none of the above.
    """
    if kind not in KINDS:
        raise UserError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    if architecture not in ARCHITECTURES:
        raise UserError(
            f"architecture: expected one of {', '.join(ARCHITECTURES)}, got {architecture!r}"
        )
    if width < 16 or width % 16:
        raise UserError(f"width: expected a multiple of 16, got {width}")
    folder = Path(folder)
    sizes = LARGER.get(architecture) or tiny_architecture(width)
    vocabulary, merges = bpe_vocabulary(WORDS.split())
    threads = 1 if architecture == "tiny" else torch.get_num_threads()
    with _reproducible(seed, threads):
        models = {
            "text_encoder": _text_encoder(sizes, vocabulary),
            "vae": _vae(sizes),
            "unet": _unet(sizes, kind),
        }
        if controlnet:
            models["controlnet"] = _controlnet(sizes, models["unet"])
    for name, model in models.items():
        save_weights(folder / name, model, dtype)
    ddim_scheduler(kind).save_pretrained(folder / "scheduler")
    write_tokenizer(folder / "tokenizer", vocabulary, merges)
    if kind == "depth":
        make_depth_model(folder / "depth_estimator", seed)
        _depth_processor().save_pretrained(folder / "feature_extractor")
    write_json(folder / "model_index.json", model_index(kind))


def make_depth_model(folder: str | Path, seed: int = 0) -> None:
    """Write a tiny random DPT depth estimator with its image processor, in transformers' format.

    Args:
        folder: where to; made if missing, files in it are replaced.
        seed: of all weights; the caller's random state is left as it was.
    """
    config = DPTConfig(
        image_size=64,
        patch_size=16,
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=32,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 8, 16, 16],
        fusion_hidden_size=8,
        use_auxiliary_head=False,
        initializer_range=0.2,  # with the usual 0.02 the picture would be lost on its way
    )
    with _reproducible(seed, threads=1):
        model = DPTForDepthEstimation(config).eval()
        readout = model.head.head[-2]  # the last but a ReLU
        features, _ = _inputs_of(readout, model, _random_pictures(8))
        readout.weight /= readout(features).std()
        readout.bias += 4 - readout(features).mean()  # away from where the ReLU would be flat
    model.save_pretrained(folder, safe_serialization=True)
    _depth_processor().save_pretrained(folder)


@contextlib.contextmanager
def _reproducible(seed: int, threads: int) -> Iterator[None]:
    """Seed torch, stop gradients and set the number of threads; put all back on leaving.

    The number of threads decides the order of sums, and so the last bits of what is fitted.
    """
    before = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        torch.set_num_threads(threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)


def _depth_processor() -> DPTImageProcessor:
    return DPTImageProcessor(size={"height": 64, "width": 64})


# ---------------------------------------------------------------------------------- networks


def unet_blocks(sizes: dict, in_channels: int) -> UNet2DConditionModel:
    """A UNet of Stable Diffusion's blocks, as PyTorch initialises it."""
    return UNet2DConditionModel(
        in_channels=in_channels,
        out_channels=4,
        down_block_types=(*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
        up_block_types=("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
        layers_per_block=2,
        **sizes,
    ).eval()


def _unet(sizes: Architecture, kind: str) -> UNet2DConditionModel:
    unet = unet_blocks(sizes.unet, in_channels=5 if kind == "depth" else 4)
    for name, parameter in unet.named_parameters():
        if name.endswith("time_emb_proj.weight"):
            parameter *= 4.0  # as PyTorch initialises it, the timestep would hardly be noticed
    _calibrate(unet, predicts_noise=kind != "v_prediction")
    return unet


def _calibrate(unet: UNet2DConditionModel, predicts_noise: bool) -> None:
    """Make the random UNet's prediction that of unit Gaussian latents, plus a random function.

    The best guess of the noise in such latents is proportional to them, and of v it is 0. Without
    that part nothing would hold sampling together: its steps would amplify any difference, where
    a trained model's contract towards pictures, and inversion would go nowhere.
    """
    latents = torch.randn(8, unet.config.in_channels, 32, 32)
    timesteps = torch.linspace(0, 999, len(latents)).long()
    text = torch.randn(len(latents), MAX_TOKENS, unet.config.cross_attention_dim)
    features, prediction = _inputs_of(unet.conv_out, unet, latents, timesteps, text)
    unet.conv_out.weight *= RANDOM_SHARE / prediction.sample.std()
    unet.conv_out.bias.zero_()
    if predicts_noise:
        weight, bias = _fit_convolution(features, latents[:, :4])
        unet.conv_out.weight += weight
        unet.conv_out.bias += bias
        unet.conv_out.weight /= unet(latents, timesteps, text).sample.std()


def _vae(sizes: Architecture) -> AutoencoderKL:
    """A VAE whose latents are blurred colours, and whose pictures are blurred ones of those.

    Random layers alone would lose the picture. So the convolutions that change the grid are near
    the identity and the residual branches weak, and the last convolutions of encoder and decoder
    are fitted to random pictures.
    """
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        latent_channels=4,
        scaling_factor=0.18215,
        **sizes.vae,
    ).eval()
    carry_through(vae)
    for conv in (vae.quant_conv, vae.post_quant_conv):
        torch.nn.init.dirac_(conv.weight)
        conv.bias.zero_()

    pictures = _random_pictures(32 if vae.config.sample_size < 512 else 8)
    ramp = torch.linspace(-1, 1, 8).repeat(pictures.shape[-1] // 8)  # left to right of each cell
    slope = 4 * pictures.mean(dim=1, keepdim=True) * ramp
    latents = F.avg_pool2d(torch.cat([pictures, slope], dim=1), 8)  # (n, 4, h, w)
    latents = latents / (latents.std() * vae.config.scaling_factor)  # std 1 once scaled, as SD's
    features, _ = _inputs_of(vae.encoder.conv_out, vae.encoder, pictures)
    mean, log_variance = vae.encoder.conv_out.weight.split(4)
    mean_bias, log_variance_bias = vae.encoder.conv_out.bias.split(4)
    weight, bias = _fit_convolution(features, latents)
    mean.copy_(weight)
    mean_bias.copy_(bias)
    log_variance.zero_()
    log_variance_bias.fill_(-6.0)  # a narrow posterior, as SD's

    latents = vae.encode(pictures).latent_dist.mean
    features, _ = _inputs_of(vae.decoder.conv_out, vae.decoder, latents)
    weight, bias = _fit_convolution(features, pictures)
    vae.decoder.conv_out.weight.copy_(weight)
    vae.decoder.conv_out.bias.copy_(bias)
    return vae


def carry_through(vae: AutoencoderKL) -> None:
    """Change a new VAE's weights so that what comes in goes through all layers but the last.

    The convolutions that change the grid or the channels become nearly the identity and the
    residual branches weak.
    """
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            if name.endswith(("conv2.weight", "to_out.0.weight")):
                parameter *= 0.1
            elif name.endswith(("conv_in.weight", "conv.weight", "shortcut.weight")):
                parameter *= 0.3
                parameter += torch.nn.init.dirac_(torch.empty_like(parameter))


def _random_pictures(count: int) -> Tensor:
    """Smooth random pictures (count, 3, 64, 64) in [-1, 1]."""
    octaves = (torch.randn(count, 3, cells, cells) for cells in (2, 4, 8))
    smooth = (F.interpolate(octave, (64, 64), mode="bicubic") for octave in octaves)
    return (0.4 * sum(smooth)).clamp(-1, 1)


def _inputs_of(layer: torch.nn.Module, model: torch.nn.Module, *args: Tensor) -> tuple[Tensor, Any]:
    """What `layer` receives in model(*args), and what the model returns."""
    received = []
    hook = layer.register_forward_pre_hook(lambda _, inputs: received.append(inputs[0]))
    output = model(*args)
    hook.remove()
    return received[0], output


def _fit_convolution(inputs: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias of the 3x3 convolution that is nearest to target, by ridge regression.

    Args:
        inputs: (n, c, h, w).
        target: (n, d, h, w).

    Returns:
        (d, c, 3, 3) and (d,).
    """
    patches = F.unfold(F.pad(inputs, (1, 1, 1, 1)), 3).transpose(1, 2).flatten(0, 1).double()
    patches = torch.cat([patches, torch.ones_like(patches[:, :1])], dim=1)  # (n*h*w, 9*c + 1)
    wanted = target.flatten(2).transpose(1, 2).flatten(0, 1).double()  # (n*h*w, d)
    gram = patches.T @ patches
    gram.diagonal().add_(1e-3 * gram.diagonal().mean())
    solution = torch.linalg.solve(gram, patches.T @ wanted).float()
    return solution[:-1].T.unflatten(1, (inputs.shape[1], 3, 3)), solution[-1]


def _text_encoder(sizes: Architecture, vocabulary: dict[str, int]) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(vocabulary),
        num_hidden_layers=2,
        max_position_embeddings=MAX_TOKENS,
        projection_dim=sizes.text["hidden_size"],
        bos_token_id=vocabulary[START],
        eos_token_id=vocabulary[END],
        pad_token_id=vocabulary[END],
        **sizes.text,
    )
    return CLIPTextModel(config).eval()


def _controlnet(sizes: Architecture, unet: UNet2DConditionModel) -> ControlNetModel:
    controlnet = ControlNetModel.from_unet(
        unet, conditioning_embedding_out_channels=sizes.hint_channels
    ).eval()
    embedding = controlnet.controlnet_cond_embedding
    # As PyTorch initialises them, the picture would fade from layer to layer.
    for conv in (embedding.conv_in, *embedding.blocks):
        torch.nn.init.kaiming_normal_(conv.weight)
    # A new ControlNet's output convolutions are zero: it would change nothing.
    torch.nn.init.normal_(embedding.conv_out.weight)
    embedding.conv_out.weight /= embedding(_random_pictures(8)).std()
    for conv in (*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block):
        torch.nn.init.normal_(conv.weight, std=0.2 * conv.in_channels**-0.5)
    return controlnet


def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", metavar="OUT", type=Path, help="folder to write the model to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=KINDS, default="base")
    parser.add_argument("--controlnet", action="store_true", help="write OUT/controlnet too")
    parser.add_argument(
        "--depth_estimator", action="store_true", help="write OUT/depth_estimator too"
    )
    parser.add_argument("--architecture", choices=ARCHITECTURES, default="tiny")
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32")
    args = parser.parse_args(argv)
    setup_logging()
    check_writable(args.folder, "OUT")
    make_model(
        args.folder,
        seed=args.seed,
        kind=args.kind,
        controlnet=args.controlnet,
        architecture=args.architecture,
        dtype=getattr(torch, args.dtype),
    )
    if args.depth_estimator:
        make_depth_model(args.folder / "depth_estimator", args.seed)
    log.info("a random %s model is in %s", args.architecture, args.folder)


if __name__ == "__main__":
    command_line(main)
