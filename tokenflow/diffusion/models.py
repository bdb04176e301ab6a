"""Stable Diffusion: models, text, latents, and DDIM steps in both directions.

Everything here works frame by frame and knows nothing of TokenFlow.

Notation of the docstrings: n frames, m frames of a chunk, (h, w) the latent grid, B branches
(the text conditions evaluated together, such as unconditional and conditional).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, ControlNetModel, DDIMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from tokenflow.diffusion.checkpoints import frozen, load_model
from tokenflow.diffusion.conditions import (
    Control,
    ControlSettings,
    depth_latents,
    draw_control,
    load_controlnet,
)
from tokenflow.ops.distributed import ALONE, Team
from util import UserError

log = logging.getLogger("tokenflow")

MOST_KINDS_OF_PASS = 64  # that a UNet is compiled for
BETTER_DTYPE = "--dtype bfloat16 or float32 (dtype in a config), and make the cache anew with it"


@dataclass(frozen=True)
class StableDiffusion:
    """The frozen models of one checkpoint, on one device in one dtype."""

    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    vae: AutoencoderKL
    unet: UNet2DConditionModel
    schedule: NoiseSchedule
    device: torch.device
    dtype: torch.dtype
    allow_pickle: bool = False  # of the models that are loaded beside these
    _controlnets: dict[str, ControlNetModel] = field(default_factory=dict, compare=False)

    def controlnet(self, key: str) -> ControlNetModel:
        """The ControlNet of a hub id or folder, loaded once; raises as `load_controlnet`."""
        if key not in self._controlnets:
            self._controlnets[key] = load_controlnet(
                key, self.device, self.dtype, self.allow_pickle
            )
        return self._controlnets[key]

    @property
    def dtype_name(self) -> str:
        """The dtype as the options spell it."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def vae_factor(self) -> int:
        """Pixels per latent cell along one side (8 for Stable Diffusion)."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def takes_depth(self) -> bool:
        """Whether the UNet expects a depth map as a fifth latent channel."""
        return self.unet.config.in_channels == self.vae.config.latent_channels + 1


def resolve_device(name: str, team: Team = ALONE) -> torch.device:
    """The torch device of a `device` option: auto, cpu, cuda, cuda:1, mps.

    Args:
        team: of several processes, each takes the GPU of its number on its machine.

    Raises:
        UserError: if torch knows no such device or this machine has none.
    """
    if team.size > 1:
        if name not in ("auto", "cpu", "cuda"):
            raise UserError(
                f"device: {name} cannot be shared by {team.size} processes; expected cuda (a GPU "
                "for each), cpu or auto"
            )
        if name == "cuda" or (name == "auto" and torch.cuda.is_available()):
            name = f"cuda:{team.local_rank}"
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(_unknown_device(name)) from error
    if device.type not in ("cpu", "cuda", "mps"):
        raise UserError(_unknown_device(name))
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError(
            f"device: {name} was asked for, but this machine has none; use --device cpu"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"device: {name} was asked for, but torch sees {torch.cuda.device_count()} CUDA "
            "devices on this machine; use --device cpu, or install a CUDA build of torch"
        )
    return device


def _unknown_device(name: str) -> str:
    return f"device: {name} is unknown, expected auto, cpu, cuda or cuda:N"


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of a `dtype` option; auto is float16 on CUDA and float32 elsewhere."""
    if name == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[name]


def load_stable_diffusion(
    folder: Path, device: torch.device, dtype: torch.dtype, allow_pickle: bool = False
) -> StableDiffusion:
    """Loads a checkpoint's models from a local folder, frozen and in evaluation mode.

    Args:
        folder: of `checkpoint_folder`.
        allow_pickle: as of `checkpoint_folder`.

    Raises:
        UserError: see `load_model`.
    """
    options = {"torch_dtype": dtype, "allow_pickle": allow_pickle}
    text_encoder = load_model(CLIPTextModel, folder / "text_encoder", **options)
    vae = load_model(AutoencoderKL, folder / "vae", **options)
    unet = load_model(UNet2DConditionModel, folder / "unet", **options)
    # The layout that convolutions are fastest in: a VAE's everywhere; a UNet's gain nothing on the
    # CPU, and half-precision ones on GPUs are said to.
    vae = vae.to(memory_format=torch.channels_last)
    if device.type == "cuda":
        unet = unet.to(memory_format=torch.channels_last)
    return StableDiffusion(
        tokenizer=CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer"),
        text_encoder=frozen(text_encoder, device),
        vae=frozen(vae, device),
        unet=frozen(unet, device),
        schedule=NoiseSchedule.of_checkpoint(folder),
        device=device,
        dtype=dtype,
        allow_pickle=allow_pickle,
    )


# What loads a checkpoint: `load_stable_diffusion`, or what remembers the last one.
Loader = Callable[[Path, torch.device, torch.dtype, bool], StableDiffusion]


def compile_unet(unet: UNet2DConditionModel, backend: str = "inductor") -> None:
    """Compiles a UNet's forward in place, whole (fullgraph) or not at all; a second call is idle.

    It is compiled when it is called, anew for every kind of pass: each mode of the patch, with and
    without injection, and a shorter last chunk. That can be more often than torch expects of one
    function, so its limit, which is the process's, is raised.
    """
    if hasattr(unet.forward, "_torchdynamo_orig_callable"):
        return
    config = torch._dynamo.config
    config.cache_size_limit = max(MOST_KINDS_OF_PASS, config.cache_size_limit)
    unet.forward = torch.compile(unet.forward, fullgraph=True, backend=backend)


# ---------------------------------------------------------------------------------------------
# DDIM (Song et al. 2021), in both directions

CLEAN = -1  # the "timestep" of a clean latent, one step below the last sampling timestep


@dataclass(frozen=True)
class NoiseSchedule:
    """The noise levels alpha_t, sigma_t of a checkpoint, and its sampling timesteps.

    x_t = alpha_t * x_0 + sigma_t * eps, with alpha_t^2 + sigma_t^2 = 1.
    """

    config: dict
    alphas_cumprod: tuple[float, ...]  # alpha_t^2
    final_alpha_cumprod: float  # alpha^2 of what DDIM calls clean
    prediction_type: str  # "epsilon" or "v_prediction"

    @classmethod
    def from_scheduler(cls, scheduler: DDIMScheduler) -> NoiseSchedule:
        """Reads the schedule off a diffusers scheduler.

        Raises:
            UserError: if the model predicts something else than epsilon or v.
        """
        prediction_type = scheduler.config.prediction_type
        if prediction_type not in ("epsilon", "v_prediction"):
            raise UserError(
                f"this checkpoint's scheduler has prediction_type {prediction_type}; "
                "only epsilon and v_prediction models can be inverted here"
            )
        return cls(
            config=dict(scheduler.config),
            alphas_cumprod=tuple(scheduler.alphas_cumprod.double().tolist()),
            final_alpha_cumprod=float(scheduler.final_alpha_cumprod),
            prediction_type=prediction_type,
        )

    @classmethod
    def of_checkpoint(cls, folder: Path) -> NoiseSchedule:
        """The schedule of a checkpoint's folder; reads no weights. Raises as `from_scheduler`."""
        return cls.from_scheduler(DDIMScheduler.from_pretrained(folder, subfolder="scheduler"))

    def timesteps(self, n_steps: int) -> list[int]:
        """The n_steps sampling timesteps, noisiest first, spaced as the checkpoint says.

        With as many steps as the model was trained on, a checkpoint's offset (1 for Stable
        Diffusion) would lead beyond the last level: it is left out then.

        Raises:
            UserError: if the model was trained with fewer timesteps.
        """
        if n_steps > len(self.alphas_cumprod):
            raise UserError(
                f"{n_steps} steps are more than the model's {len(self.alphas_cumprod)} timesteps"
            )
        scheduler = DDIMScheduler.from_config(self.config)
        scheduler.set_timesteps(n_steps)
        timesteps = scheduler.timesteps.tolist()
        beyond = max(0, timesteps[0] - (len(self.alphas_cumprod) - 1))
        return [t - beyond for t in timesteps]

    def level(self, t: int) -> tuple[float, float]:
        """(alpha_t, sigma_t); t may be CLEAN."""
        alpha_squared = self.final_alpha_cumprod if t == CLEAN else self.alphas_cumprod[t]
        return alpha_squared**0.5, (1.0 - alpha_squared) ** 0.5

    def add_noise(self, clean: Tensor, eps: Tensor, t: int) -> Tensor:
        """x_t of a clean latent and a noise of the same shape."""
        alpha, sigma = self.level(t)
        return alpha * clean + sigma * eps


def ddim_step(x: Tensor, eps: Tensor, level_from: tuple, level_to: tuple) -> Tensor:
    """Moves x along the predicted noise from one noise level to another, up or down.

    Args:
        x: a latent at level_from, any shape.
        eps: the predicted noise, the same shape.
        level_from, level_to: (alpha, sigma) pairs of `NoiseSchedule.level`.

    Source: DDIM, Eq. 12 with sigma = 0.
    """
    alpha_from, sigma_from = level_from
    alpha_to, sigma_to = level_to
    clean = (x - sigma_from * eps) / alpha_from
    return alpha_to * clean + sigma_to * eps


def ddim_inversion_step(
    eps_model: Callable[[Tensor, int, Tensor], Tensor],
    x: Tensor,
    schedule: NoiseSchedule,
    t_from: int,
    t_to: int,
    iterations: int = 1,
    tolerance: float = 0.0,
    start: Tensor | None = None,
) -> Tensor:
    """One DDIM step towards noise: the x' from which sampling's step t_to -> t_from returns to x.

    Sampling takes the noise at x', which is not known yet. Plain DDIM inversion
    (iterations = 1) takes it at x; each further iteration takes it at the last estimate of x',
    a fixed-point iteration whose limit inverts the sampling step exactly. It diverges where an
    iteration turns the error's sign without shrinking it. So from the third on, each is mixed with
    the one before (Anderson acceleration of depth 1, for each frame): with g what an iteration
    finds and r = g - estimate, the next estimate is g - c (g - g_before), where
    c = <r, r - r_before> / |r - r_before|^2, and 0 < c < 1 in any such direction.

    A frame is finished, and not evaluated again, once |r| < tolerance * |g|. This pays where the
    first estimate is a good one (`start`): then the first evaluation may be the last.

    Args:
        eps_model: eps(x, t, rows), the predicted noise at timestep t of some of the latents, whose
            numbers in the batch are `rows`; each as if it were alone.
        x: latents at t_from, (m, c, h, w).
        iterations: evaluations of eps_model for a latent, at most; >= 1.
        tolerance: relative residual of a finished frame; 0 makes every iteration for every frame.
        start: the first estimate of x', (m, c, h, w); x itself where none is given.

    Source: Pan et al. 2023, "Accelerated Iterative Diffusion Inversion", which mixes so too.
    """
    levels = schedule.level(t_from), schedule.level(t_to)
    estimate = x.clone() if start is None else start.clone()
    rows = torch.arange(len(x), device=x.device)  # the unfinished frames
    last_found = last_residual = estimate
    for iteration in range(iterations):
        found = ddim_step(x[rows], eps_model(estimate[rows], t_to, rows), *levels)
        residual = found - estimate[rows]
        if iteration < 2:
            estimate[rows] = found
        else:
            mixing = _least_squares(residual, residual - last_residual)
            estimate[rows] = found - mixing * (found - last_found)
        unfinished = _norms(residual) >= tolerance * _norms(found)
        if not unfinished.any():
            break
        rows, last_found, last_residual = rows[unfinished], found[unfinished], residual[unfinished]
    return estimate


def _norms(x: Tensor) -> Tensor:
    """The length of each frame, (m,)."""
    return x.flatten(1).norm(dim=1)


def _least_squares(x: Tensor, direction: Tensor) -> Tensor:
    """The c of each frame that makes |x - c direction| least, (m, 1, 1, 1); 0 for no direction."""
    frame = tuple(range(1, x.ndim))
    length = direction.square().sum(frame, keepdim=True)
    return (x * direction).sum(frame, keepdim=True) / length.where(length > 0, torch.inf)


class Denoiser:
    """The predicted noise of chosen frames under given text and spatial conditions.

    Args:
        models: the checkpoint.
        text: (B, 77, c) text embeddings, one per branch.
        depth: (n, 1, h, w) in [-1, 1], a depth model's fifth latent channel.
        control: what a ControlNet adds to the UNet, if anything.

    Attributes:
        image_forwards: how often the UNet was evaluated on one image for one branch so far.
    """

    def __init__(
        self,
        models: StableDiffusion,
        text: Tensor,
        depth: Tensor | None = None,
        control: Control | None = None,
    ) -> None:
        if models.takes_depth != (depth is not None):
            raise ValueError("depth maps go with a depth-conditioned UNet, and only with one")
        self.models, self.text, self.depth, self.control = models, text, depth, control
        self.image_forwards = 0

    @property
    def branches(self) -> int:
        return len(self.text)

    def __call__(self, x: Tensor, t: int, frames: Tensor) -> Tensor:
        """eps(x, t) of every branch.

        Args:
            x: (m, 4, h, w) latents of `frames` at timestep t, on any device.
            frames: (m,) the frames' indices in the clip.

        Returns:
            (B, m, 4, h, w) float32 on the models' device.

        Raises:
            UserError: if the prediction is not finite; the message names the step.
        """
        models, m = self.models, len(frames)
        x = x.to(models.device, torch.float32)
        model_input = x if self.depth is None else torch.cat([x, self._of(self.depth, frames)], 1)
        model_input = model_input.to(models.dtype).repeat(self.branches, 1, 1, 1)  # (B*m, c, h, w)
        text = self.text.repeat_interleave(m, dim=0)  # (B*m, 77, c)
        residuals = {}
        if self.control is not None:
            images = self._of(self.control.images, frames).repeat(self.branches, 1, 1, 1)
            residuals = self.control.residuals(model_input, t, text, images)
        # As a tensor: a compiled UNet would be compiled anew for every number.
        timestep = torch.tensor(t, device=models.device)
        prediction = models.unet(
            model_input, timestep, encoder_hidden_states=text, return_dict=False, **residuals
        )[0]
        self.image_forwards += self.branches * m
        prediction = prediction.float().unflatten(0, (self.branches, m))
        if models.schedule.prediction_type == "v_prediction":
            alpha, sigma = models.schedule.level(t)
            prediction = alpha * prediction + sigma * x
        if not torch.isfinite(prediction).all():
            raise UserError(
                f"the UNet's prediction at timestep {t} is not finite (NaN or infinity) in "
                f"{models.dtype_name}; try {BETTER_DTYPE}"
            )
        return prediction

    def _of(self, condition: Tensor, frames: Tensor) -> Tensor:
        return condition[frames].to(self.models.device, self.models.dtype)


def make_denoiser(
    models: StableDiffusion,
    frames: np.ndarray,
    prompt: str,
    control: ControlSettings | None,
    depth: Tensor | None,
) -> Denoiser:
    """The noise prediction under an inversion's conditions: its prompt, depth maps, ControlNet.

    Args:
        frames: (n, H, W, 3) uint8 source frames.
        control: the ControlNet of the inversion, if any.
        depth: (n, 1, H, W) of `estimate_depth`, where the model or the ControlNet wants it.
    """
    return Denoiser(
        models,
        encode_prompts(models, [prompt]),
        depth_channel(models, frames, depth),
        control and draw_control(models.controlnet(control.key), control, frames, depth),
    )


def depth_channel(
    models: StableDiffusion, frames: np.ndarray, depth: Tensor | None
) -> Tensor | None:
    """The fifth latent channel of a clip, (n, 1, h, w), where the UNet expects one.

    Args: as of `make_denoiser`.
    """
    if not models.takes_depth:
        return None
    return depth_latents(depth, tuple(size // models.vae_factor for size in frames.shape[1:3]))


# ---------------------------------------------------------------------------------------------
# Text and pictures to and from latents


@torch.inference_mode()
def encode_prompts(models: StableDiffusion, prompts: Sequence[str]) -> Tensor:
    """Text embeddings (len(prompts), 77, c) in the models' dtype; overlong prompts are cut.

    A prompt that is cut is named in a warning with what was dropped.
    """
    length = models.tokenizer.model_max_length
    for prompt in prompts:
        tokens = models.tokenizer(prompt, truncation=False).input_ids
        if len(tokens) > length:
            dropped = models.tokenizer.decode(tokens[length - 1 : -1])
            log.warning(
                "the prompt is longer than %d tokens; this part is not used: %s", length, dropped
            )
    tokens = models.tokenizer(
        list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    )
    return models.text_encoder(tokens.input_ids.to(models.device))[0]


@torch.inference_mode()
def encode_frames(models: StableDiffusion, frames: np.ndarray, batch_size: int = 8) -> Tensor:
    """VAE latents of a clip: the posterior's mean, times the VAE's scaling factor.

    Args:
        frames: (n, H, W, 3) uint8 RGB; H and W multiples of `models.vae_factor`.

    Returns:
        (n, 4, h, w) float32 on the CPU.
    """
    n, height, width, _ = frames.shape
    channels, factor = models.vae.config.latent_channels, models.vae_factor
    latents = torch.empty(n, channels, height // factor, width // factor)
    for numbers in _pieces(n, batch_size):
        pixels = torch.from_numpy(frames[numbers]).permute(0, 3, 1, 2)
        pixels = pixels.to(models.device, models.dtype) / 127.5 - 1.0  # [-1, 1]
        mean = models.vae.encode(pixels).latent_dist.mean
        latents[numbers] = (mean.float() * models.vae.config.scaling_factor).cpu()
    return latents


@torch.inference_mode()
def decode_latents(
    models: StableDiffusion, latents: Tensor, batch_size: int = 8, team: Team = ALONE
) -> np.ndarray:
    """The inverse of `encode_frames`: (n, 4, h, w) latents to (n, H, W, 3) uint8 RGB.

    Args:
        team: the processes that share the frames out, each of which calls this for all of them.

    Raises:
        UserError: if the decoded pixels are not finite.
    """
    share = team.share(len(latents))
    latents = share.take(latents)
    (n, _, h, w), factor = latents.shape, models.vae_factor
    frames = np.empty((n, h * factor, w * factor, 3), np.uint8)
    for numbers in _pieces(n, batch_size):
        scaled = latents[numbers].to(models.device, torch.float32)
        scaled = scaled / models.vae.config.scaling_factor
        pixels = models.vae.decode(scaled.to(models.dtype), return_dict=False)[0].float()
        if not torch.isfinite(pixels).all():
            raise UserError(
                f"the VAE's frames are not finite in {models.dtype_name}; try {BETTER_DTYPE}"
            )
        pixels = ((pixels + 1.0) * 127.5).clamp(0, 255).round().to(torch.uint8)
        frames[numbers] = pixels.permute(0, 2, 3, 1).cpu().numpy()
    return share.gather(torch.from_numpy(frames)).numpy()


def _pieces(n: int, size: int) -> list[slice]:
    """0..n-1 in ranges of `size` at most; none for n = 0."""
    return [slice(start, start + size) for start in range(0, n, size)]


_VALUES_AT_ONCE = 2**20  # of a uint8 clip, which are compared


class SquaredError:
    """The squared error of uint8 pictures summed up piece by piece, exactly."""

    def __init__(self) -> None:
        self.total = self.count = 0

    def add(self, frames: np.ndarray, reference: np.ndarray) -> None:
        """Adds two uint8 arrays of one shape, which are copied a frame at a time."""
        if frames.shape != reference.shape:
            raise ValueError(f"shapes {frames.shape} and {reference.shape} are not the same")
        # A list of pixels may be as long as a clip is large: as many rows at once as one large
        # frame has values.
        rows = max(1, _VALUES_AT_ONCE // max(1, frames[:1].size))
        for first in range(0, len(frames), rows):
            part = slice(first, first + rows)
            difference = frames[part].astype(np.int32) - reference[part]
            self.total += int(np.square(difference).sum(dtype=np.int64))
        self.count += frames.size

    @property
    def psnr(self) -> float:
        """Peak signal-to-noise ratio in dB; 148 where nothing differs."""
        return float(10 * np.log10(255.0**2 / max(self.total / self.count, 1e-10)))


def psnr(frames: np.ndarray, reference: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB over all pixels of two uint8 clips of one shape."""
    error = SquaredError()
    error.add(frames, reference)
    return error.psnr
