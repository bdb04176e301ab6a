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
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, DPTConfig, DPTForDepthEstimation, DPTImageProcessor

from scripts.tiny_model import model_files
from util import ArgumentParser, UserError, check_writable, command_line, setup_logging

log = logging.getLogger("tokenflow")

MAX_TOKENS = 77
# Std of what is random in the UNet's prediction: as much as still lets DDIM invert it in 50 steps.
RANDOM_SHARE = 0.3
# Common in prompts, and one token each; any other text is spelled out.
WORDS = (
    "a an the of in on with and man woman dog cat wolf bird car horse running walking moving "
    "photo painting sculpture robot marble wooden golden shiny red green blue style disc star"
)


def make_model(
    folder: Path,
    *,
    seed: int = 0,
    kind: str = "base",
    controlnet: bool = False,
    architecture: str = "tiny",
    dtype: torch.dtype = torch.float32,
    weights: bool = True,
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
        controlnet: also write controlnet/, whose residuals are small but not zero.
        architecture: "tiny", "sd21" for the layers of Stable Diffusion 2.1, or "medium" for those
            with 0.3 of its channels.
        dtype: of the written weights.
        weights: False writes files without tensors, whose sizes a simulated GPU takes from the
            configurations; the text encoder is then Stable Diffusion 2.1's.
    """
    vocabulary, merges = model_files.bpe_vocabulary(WORDS.split())
    prediction_type = "v_prediction" if kind == "v_prediction" else "epsilon"
    threads = 1 if architecture == "tiny" else torch.get_num_threads()
    with _reproducible(seed, threads), contextlib.ExitStack() as stack:
        text = model_files.text_config(architecture, vocabulary, MAX_TOKENS)
        if not weights:
            stack.enter_context(torch.device("meta"))
            text.update({"num_hidden_layers": 23, "vocab_size": 49408})
        text = CLIPTextModel(text).eval()
        models = {"text_encoder": text, "vae": model_files.make_vae(architecture)}
        if weights:
            _fit_vae(models["vae"])
        models["unet"] = model_files.make_unet(
            architecture, in_channels=5 if kind == "depth" else 4
        )
        if weights:
            _calibrate(models["unet"], predicts_noise=prediction_type == "epsilon")
        if controlnet:
            models["controlnet"] = _controlnet(architecture, models["unet"])
    for name, model in models.items():
        model_files.save_weights(folder / name, model, dtype)
    model_files.ddim_scheduler(prediction_type).save_pretrained(folder / "scheduler")
    model_files.write_tokenizer(folder / "tokenizer", vocabulary, merges, MAX_TOKENS)
    if kind == "depth":
        make_depth_model(folder / "depth_estimator", seed)
        _depth_processor().save_pretrained(folder / "feature_extractor")
    model_files.write_model_index(folder, takes_depth=kind == "depth")


def make_depth_model(folder: Path, seed: int = 0) -> None:
    """Write a tiny random DPT depth estimator with its image processor, in transformers' format.

    Args:
        folder: where to; made if missing, files in it are replaced.
        seed: of all weights; the caller's random state is left as it was.
    """
    with _reproducible(seed, threads=1):
        model = DPTForDepthEstimation(DPTConfig(**model_files.NETWORKS["depth_estimator"])).eval()
        readout = model.head.head[-2]  # the last but a ReLU
        features, _ = _inputs_of(readout, model, _random_pictures(8))
        readout.weight /= readout(features).std()
        readout.bias += 4 - readout(features).mean()  # away from where the ReLU would be flat
    model.save_pretrained(folder, safe_serialization=True)
    _depth_processor().save_pretrained(folder)


def _depth_processor() -> DPTImageProcessor:
    return DPTImageProcessor(size={"height": 64, "width": 64})


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


# ---------------------------------------------------------------------------------- networks


def _calibrate(unet: UNet2DConditionModel, predicts_noise: bool) -> None:
    """Make the random UNet's prediction that of unit Gaussian latents, plus a random function.

    The best guess of the noise in such latents is proportional to them, and of v it is 0. Without
    that part nothing would hold sampling together: its steps would amplify any difference, where
    a trained model's contract towards pictures, and inversion would go nowhere.
    """
    for name, parameter in unet.named_parameters():
        if name.endswith("time_emb_proj.weight"):
            parameter *= 4.0  # as PyTorch initialises it, the timestep would hardly be noticed
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


def _fit_vae(vae: AutoencoderKL) -> None:
    """Make latents blurred colours, and pictures blurred ones of those.

    Random layers alone would lose the picture. So the last convolutions of encoder and decoder are
    fitted to random pictures.
    """
    for conv in (vae.quant_conv, vae.post_quant_conv):
        nn.init.dirac_(conv.weight)
        conv.bias.zero_()

    pictures = _random_pictures(32 if vae.config.sample_size < 512 else 8)
    ramp = torch.linspace(-1, 1, 8).repeat(pictures.shape[-1] // 8)  # left to right of each cell
    slope = 4 * pictures.mean(dim=1, keepdim=True) * ramp
    latents = F.avg_pool2d(torch.cat([pictures, slope], dim=1), 8)  # (n, 4, h, w)
    latents = latents / (latents.std() * vae.config.scaling_factor)  # std 1 once scaled, as SD's
    last = vae.encoder.conv_out  # the mean, and the logarithm of the variance
    features, _ = _inputs_of(last, vae.encoder, pictures)
    last.weight[:4], last.bias[:4] = _fit_convolution(features, latents)
    last.weight[4:], last.bias[4:] = 0, -6.0  # a narrow posterior, as SD's

    last, latents = vae.decoder.conv_out, vae.encode(pictures).latent_dist.mean
    features, _ = _inputs_of(last, vae.decoder, latents)
    last.weight[:], last.bias[:] = _fit_convolution(features, pictures)


def _random_pictures(count: int) -> Tensor:
    """Smooth random pictures (count, 3, 64, 64) in [-1, 1]."""
    octaves = (torch.randn(count, 3, cells, cells) for cells in (2, 4, 8))
    smooth = (F.interpolate(octave, (64, 64), mode="bicubic") for octave in octaves)
    return (0.4 * sum(smooth)).clamp(-1, 1)


def _inputs_of(layer: nn.Module, model: nn.Module, *args: Tensor) -> tuple[Tensor, Any]:
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


def _controlnet(architecture: str, unet: UNet2DConditionModel) -> ControlNetModel:
    controlnet = model_files.make_controlnet(architecture, unet, _random_pictures(8)).eval()
    # A new ControlNet's output convolutions are zero: it would change nothing.
    for conv in (*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block):
        nn.init.normal_(conv.weight, std=0.2 * conv.in_channels**-0.5)
    return controlnet


def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("folder", metavar="OUT", type=Path, help="folder to write the model to")
    add("--seed", type=int, default=0)
    add("--kind", choices=("base", "depth", "v_prediction"), default="base")
    add("--controlnet", action="store_true", help="write OUT/controlnet too")
    add("--depth_estimator", action="store_true", help="write OUT/depth_estimator too")
    add("--architecture", choices=("tiny", "medium", "sd21"), default="tiny")
    add("--no_weights", dest="weights", action="store_false",
        help="write no tensors, for benchmark.py --simulate")  # fmt: skip
    add("--dtype", choices=("float32", "float16"), default="float32")
    options = vars(parser.parse_args(argv))
    setup_logging()
    folder, dtype = options.pop("folder"), getattr(torch, options.pop("dtype"))
    with_depth = options.pop("depth_estimator")
    check_writable(folder, "OUT")
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"OUT: {folder}: is not empty; remove it or name another")
    make_model(folder, dtype=dtype, **options)
    if with_depth:
        make_depth_model(folder / "depth_estimator", options["seed"])
    log.info("a random %s model is in %s", options["architecture"], folder)


if __name__ == "__main__":
    command_line(main)
