"""Tune-A-Video (Wu et al., ICCV 2023), the baseline of Table 1 that trains a model on each clip.

    python -m scripts.table1.tune_a_video --set data_path=clip.mp4 --set prompt="a marble sculpture"

The clip is one that preprocess.py has inverted, whose frames and clean latents are used. The
command trains, inverts the clip with what it trained, and samples; run it again to resume. The
published code is showlab/Tune-A-Video. Its image model becomes one of videos in three places:

    self-attention of frame i  has keys and values of frames 0 and i-1         SparseCausalAttention
    after each feed-forward    attention over the frames, at each place        TemporalAttention
    what is trained            queries of attn1 and attn2, temporal attention  TunedLayers

Nothing of a UNet is copied but the layers that are trained: `tuned_unet` puts all of it on a UNet
and takes it off again.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from pydantic import Field, model_validator
from torch import Tensor, nn

from scripts.table1.baselines import edit_all
from scripts.tiny_model.settings import Recipe
from scripts.tiny_model.trainer import train_in
from tokenflow.cache.source_cache import CLEAN_LATENTS
from tokenflow.diffusion.denoiser import Denoiser, make_denoiser
from tokenflow.diffusion.inversion import invert
from tokenflow.diffusion.models import Loader, StableDiffusion
from tokenflow.diffusion.samplers import SAMPLERS
from tokenflow.editing.config import EditConfig
from tokenflow.editing.inputs import open_edit_inputs
from tokenflow.editing.loop import EditSession
from tokenflow.editing.run import open_result, save_result
from tokenflow.ops.progress import Progress
from tokenflow.storage.schema import Count, CountOrNull
from tokenflow.storage.video import save_video
from tokenflow.storage.work_dir import locked
from tokenflow_utils import extended_attention, from_heads, self_attention_layers, to_heads
from util import command_line, load_tensors

log = logging.getLogger("tokenflow")

NAME = "tune_a_video"  # in results.BASELINES


class TuneAVideoConfig(EditConfig):
    """The keys of configs/config_tune_a_video.yaml; those of TokenFlow have no effect."""

    guidance_scale: float = Field(
        12.5, ge=0, description="classifier-free guidance; 1 is none, at half the time"
    )
    source_prompt: str | None = Field(
        None, description="what the clip shows, to train with; null: the cache's inversion prompt"
    )
    train_steps: Count = Field(500, description="steps of training")
    learning_rate: float = Field(3e-5, gt=0, description="of AdamW, the same in all steps")
    gradient_checkpointing: bool = Field(
        False, description="train in less memory, a third slower; changes no result"
    )
    sample_every: CountOrNull = Field(
        100, description="write the edit as a video after every so many steps; null: at the end"
    )

    @model_validator(mode="after")
    def _check_unsupported(self) -> TuneAVideoConfig:
        for key in ("compile", "estimate"):
            if getattr(self, key):
                raise ValueError(f"{key}: true is for the run scripts, not for Tune-A-Video")
        return self


class TuningRecipe(Recipe):
    """AdamW at a constant learning rate; the result is the last weights, not their average."""

    BETAS: ClassVar = (0.9, 0.999)

    def learning_rate_at(self, step: int) -> float:
        return self.learning_rate

    def share_of_newest(self, n: int) -> float:
        return 1.0


# ------------------------------------------------------------------------------------- the model


class SparseCausalAttention:
    """A self-attention processor: frame i attends to frame 0 and frame i-1, frame 0 to itself.

    Args:
        n_frames: of the clip; hidden states are (B * n_frames, L, c), branch by branch.
    """

    def __init__(self, n_frames: int) -> None:
        self.n_frames = n_frames
        self.previous = [0, *range(n_frames - 1)]

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """The self-attention's output, (B * n, L, c), for its input tokens of that shape."""
        query = to_heads(attn, attn.to_q, hidden_states)[:, None]  # (B * n, 1, L, heads, d)
        key, value = (
            self._first_and_previous(to_heads(attn, layer, hidden_states))[:, None]
            for layer in (attn.to_k, attn.to_v)
        )  # (B * n, 1, 2 * L, heads, d)
        return from_heads(attn, extended_attention(query, key, value).squeeze(1))

    def _first_and_previous(self, tokens: Tensor) -> Tensor:
        frames = tokens.unflatten(0, (-1, self.n_frames))  # (B, n, L, heads, d)
        first = frames[:, :1].expand_as(frames)
        return torch.cat([first, frames[:, self.previous]], dim=2).flatten(0, 1)


class TemporalAttention(nn.Module):
    """Attention over the frames, at each place on its own, added to its input.

    As it begins it adds nothing: weight and bias of its output are zero. (The published code zeroes
    the weight alone, so that its model begins a little off the image model.)

    Args:
        block: whose width and heads it has.
        n_frames: of the clip.
    """

    def __init__(self, block: BasicTransformerBlock, n_frames: int) -> None:
        super().__init__()
        width, heads = block.attn1.to_q.in_features, block.attn1.heads
        self.n_frames = n_frames
        self.norm = nn.LayerNorm(width, elementwise_affine=False)  # the published one is untrained
        self.attention = Attention(width, heads=heads, dim_head=block.attn1.inner_dim // heads)
        for parameter in self.attention.to_out[0].parameters():
            nn.init.zeros_(parameter)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B * n, L, c) to the same."""
        places = hidden_states.unflatten(0, (-1, self.n_frames)).transpose(1, 2)  # (B, L, n, c)
        rows = places.flatten(0, 1)  # (B * L, n, c)
        rows = self.attention(self.norm(rows.float())).unflatten(0, places.shape[:2])
        return hidden_states + rows.transpose(1, 2).flatten(0, 1).to(hidden_states.dtype)


class TunedLayers(nn.Module):
    """All that is trained, in float32: queries, as copies of a UNet's, and temporal attention.

    Args:
        unet: is left as it is.
        n_frames: of the clip.
        seed: of the weights of temporal attention.
    """

    def __init__(self, unet: UNet2DConditionModel, n_frames: int, seed: int) -> None:
        super().__init__()
        self.n_frames = n_frames
        blocks = transformer_blocks(unet)
        projections = [attn.to_q for block in blocks for attn in (block.attn1, block.attn2)]
        self.queries = nn.ModuleList(map(_float_copy, projections))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            temporal = [TemporalAttention(block, n_frames) for block in blocks]
        self.temporal = nn.ModuleList(temporal).to(unet.device)
        self.requires_grad_(True)


def _float_copy(layer: nn.Linear) -> nn.Linear:
    bias, device = layer.bias is not None, layer.weight.device
    copy = nn.Linear(layer.in_features, layer.out_features, bias, device)
    copy.load_state_dict(layer.state_dict())
    return copy


def transformer_blocks(unet: UNet2DConditionModel) -> list[BasicTransformerBlock]:
    """A UNet's transformer blocks, in the order of its modules."""
    return [module for module in unet.modules() if isinstance(module, BasicTransformerBlock)]


@contextmanager
def tuned_unet(unet: UNet2DConditionModel, layers: TunedLayers) -> Iterator[None]:
    """Makes a UNet Tune-A-Video's; leaving restores it exactly.

    Its batch is then (B * n_frames, ...), branch by branch.
    """
    original = unet.attn_processors
    ours = SparseCausalAttention(layers.n_frames)
    blocks = transformer_blocks(unet)
    attentions = [attn for block in blocks for attn in (block.attn1, block.attn2)]
    with ExitStack() as undo:
        # set_attn_processor empties the dict that it is given.
        undo.callback(unet.set_attn_processor, dict(original))
        unet.set_attn_processor({**original, **dict.fromkeys(self_attention_layers(unet), ours)})
        for attn, query in zip(attentions, layers.queries, strict=True):
            undo.callback(setattr, attn, "to_q", attn.to_q)
            attn.to_q = query
        for block, temporal in zip(blocks, layers.temporal, strict=True):
            handle = block.register_forward_hook(partial(_attend_over_time, temporal))
            undo.callback(handle.remove)
        yield


def _attend_over_time(
    temporal: TemporalAttention, block: nn.Module, args: tuple, output: Tensor
) -> Tensor:
    return temporal(output)


# --------------------------------------------------------------------------------------- training


def tuning_loss(
    denoiser: Denoiser, clean: Tensor, layers: nn.Module, generator: torch.Generator
) -> Tensor:
    """The mean squared error of the clip's predicted noise (of v, where the model predicts v).

    One timestep is drawn for the clip, and a noise for each frame.

    Args:
        clean: (n, 4, h, w) float32 latents.
        layers: unused; they are in the denoiser's UNet.
        generator: on the CPU.
    """
    schedule, device = denoiser.models.schedule, denoiser.models.device
    t = int(torch.randint(len(schedule.alphas_cumprod), (), generator=generator))
    noise = torch.randn(clean.shape, generator=generator)
    x, target = schedule.add_noise(clean, noise, t), noise
    if schedule.prediction_type == "v_prediction":
        alpha, sigma = schedule.alpha_sigma(t)
        target = alpha * noise - sigma * clean
    predicted = denoiser.prediction(x, t, torch.arange(len(clean)))[0]
    return (predicted - target.to(device)).square().mean()


def train(session: EditSession, layers: TunedLayers, folder: Path, inputs: dict[str, str]) -> None:
    """Trains the layers on a session's clip in place, or resumes an interrupted training.

    Args:
        folder: for the training's state, its log and samples of the edit.
        inputs: all that it depends on but the recipe.
    """
    config, models = session.config, session.models
    clean, n_steps = session.latents(CLEAN_LATENTS), config.train_steps
    denoiser = clip_denoiser(session, [inputs["prompt"]])

    def sample(_: nn.Module, path: Path) -> None:
        if path.stem != f"sheet_{n_steps:06d}":  # the result shows that one
            frames = session.decode(edit_latents(session))
            save_video(path.with_suffix(".mp4"), frames, session.cache.fps)

    on_gpu = models.device.type == "cuda"  # where gradients of float16 would need a scale
    recipe = TuningRecipe(steps=n_steps, batch_size=1, learning_rate=config.learning_rate)
    with locked(folder), ExitStack() as stack:
        if config.gradient_checkpointing:
            stack.callback(models.unet.disable_gradient_checkpointing)
            models.unet.enable_gradient_checkpointing()
        with session.watch("train"):
            train_in(
                folder, recipe, layers, partial(tuning_loss, denoiser, clean), sample, inputs,
                seed=config.seed,
                autocast=computing(models, torch.bfloat16 if on_gpu else models.dtype),
                sheet_every=config.sample_every or n_steps,
            )  # fmt: skip
    seconds = session.watch.seconds
    seconds["train"] = seconds_of_training(folder, seconds["train"])
    seconds.pop("decode", None)  # the samples'


def seconds_of_training(folder: Path, measured: float) -> float:
    """What all steps of a training took, whatever of it this process did, by its log.

    Args:
        measured: by this process, the answer where the log has one line.
    """
    step, _, _, time = load_tensors(folder / "state.safetensors")["losses"].T
    if len(step) < 2:
        return measured
    return round(float((time.diff() / step.diff()).median() * step[-1]), 3)


def computing(models: StableDiffusion, dtype: torch.dtype) -> torch.autocast:
    """The context in which float32 layers and the models' half-precision ones go together."""
    return torch.autocast(models.device.type, dtype, enabled=models.dtype is not torch.float32)


# --------------------------------------------------------------------------------------- the edit


def clip_denoiser(session: EditSession, prompts: Sequence[str]) -> Denoiser:
    """The noise prediction of all frames together under prompts; gradients go through it."""
    denoiser = make_denoiser(session.models, session.frames, prompts, None, session.depth)
    denoiser.text = denoiser.text.clone()  # encoded in inference mode
    return denoiser


@torch.inference_mode()
def edit_latents(session: EditSession) -> Tensor:
    """Inverts the clip without a prompt, and samples with guidance; clean latents (n, 4, h, w).

    The session's UNet is the tuned one, in both directions.
    """
    config, models, n = session.config, session.models, len(session.frames)
    timesteps, frames = session.inputs.timesteps, torch.arange(n)
    sampler = SAMPLERS[config.sampler](models.schedule, timesteps)
    prompts = [config.negative_prompt, config.prompt][config.guidance_scale == 1.0 :]
    source, denoiser = clip_denoiser(session, [""]), clip_denoiser(session, prompts)
    with computing(models, models.dtype), Progress(2 * len(timesteps)) as progress:
        clean = session.latents(CLEAN_LATENTS)
        *_, (_, x) = invert(source, clean, timesteps[::-1], 1, 0.0, n, progress=progress)
        for i, t in enumerate(progress.over(timesteps, "edit")):
            eps = denoiser(x, t, frames)
            guided = eps[0] + config.guidance_scale * (eps[-1] - eps[0]) if len(eps) > 1 else eps[0]
            x = sampler.step(x, guided.cpu(), i)
    session.image_forwards = source.image_forwards + denoiser.image_forwards
    return x


def edit(config: TuneAVideoConfig, overwrite: bool = False, load: Loader | None = None) -> Path:
    """Trains on a preprocessed clip and edits it, unless a finished result exists; its folder.

    Edits of a clip to several prompts share a training, which lies beside the results.
    """
    inputs = open_edit_inputs(config)
    config, manifest = inputs.config, inputs.cache.manifest
    depends_on = {
        "prompt": config.source_prompt or manifest.inversion_prompt,
        "cache": inputs.cache.sha256,
        "adapters": inputs.adapters.digest,
        "computed": f"{inputs.n_frames} frames, {inputs.dtype}, {inputs.device.type}",
    }
    recipe = [config.train_steps, config.learning_rate, config.seed]
    digest = hashlib.sha256(json.dumps([depends_on, recipe]).encode()).hexdigest()[:8]
    with open_result(NAME, inputs, overwrite) as (folder, work):
        if work is not None:
            session = EditSession(inputs, load=load, work=work)
            unet = session.models.unet
            layers = TunedLayers(unet, inputs.n_frames, config.seed)
            with tuned_unet(unet, layers):
                train(session, layers, folder.with_name(f"training-{digest}"), depends_on)
                with session.watch("edit"):
                    latents = edit_latents(session)
            frames = session.composite(session.decode(latents))
            save_result(NAME, session, frames, latents)
    return folder


def main(argv: Sequence[str] | None = None) -> Path:
    """Runs the script; returns `edit_all`'s folder."""
    return edit_all(TuneAVideoConfig, argv, NAME, __doc__.splitlines()[0], edit)


if __name__ == "__main__":
    command_line(main)
