"""Text2Video-Zero (Khachatryan et al., ICCV 2023) with a ControlNet, a baseline of Table 1.

    python -m scripts.table1.text2video_zero --set data_path=clip.mp4 --set prompt="a marble wolf"
    python -m scripts.table1.text2video_zero --set control=depth ...

Every frame attends to the first one, in the UNet and in the ControlNet, and all frames start from
one Gaussian noise, in which nothing of the clip is left: the ControlNet alone tells of it. With
`motion_x` or `motion_y`, the frames start from the first one's latents, translated ever further
(the paper's Algorithm 1), as in its generation from text. The config is that of
run_tokenflow_controlnet.py, with those two keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from pydantic import Field, model_validator
from torch import Tensor

import run_tokenflow_controlnet as controlnet
from scripts.table1.baselines import edit_all
from tokenflow.diffusion.denoiser import make_denoiser
from tokenflow.diffusion.models import Loader
from tokenflow.diffusion.samplers import DDIMSampler
from tokenflow.editing.inputs import open_edit_inputs
from tokenflow.editing.loop import EditSession, guided_noise
from tokenflow.editing.run import open_result, save_result
from tokenflow.editing.techniques import EditPlan
from tokenflow_utils import Pass, TokenFlowContext, tokenflow_patch
from util import UserError, command_line

NAME = "text2video_zero"  # in results.BASELINES
FIELD_SIZE = 512  # pixels: the side of the motion field, whatever the frames'
# Shares of the steps: of the first frame alone up to T', and from there to T.
TO_T1, TO_T0 = 2 / 50, 3 / 50


class Text2VideoZeroConfig(controlnet.ControlNetConfig):
    """The keys of configs/config_controlnet.yaml, and the motion field."""

    motion_x: float = Field(
        0.0, description="translation per frame, in 1/512 of the width; the paper's is 12, or 0"
    )
    motion_y: float = Field(0.0, description="the same along the height")

    @model_validator(mode="after")
    def _check_sampler(self) -> Text2VideoZeroConfig:
        if self.sampler != "ddim":
            raise ValueError(f"sampler: {self.sampler} is not for Text2Video-Zero; use ddim")
        return self


def translated(latents: Tensor, x: float, y: float) -> Tensor:
    """Latents (..., h, w) sampled further right and down, at the nearest cell, mirrored outside.

    Args:
        x, y: how far, in 1/512 of the width and height.

    Source: the paper's motion field, W_k of Algorithm 1, as diffusers computes it: half a pixel of
    the field is lost.
    """
    for dim, distance in ((-1, x), (-2, y)):
        size = latents.shape[dim]
        cells = torch.arange(size) + (distance - 0.5) * size / FIELD_SIZE
        cells = cells.round().long() % (2 * size)
        latents = latents.index_select(dim, torch.minimum(cells, 2 * size - 1 - cells))
    return latents


def plan(session: EditSession) -> EditPlan:
    """From one noise for all frames, or, if there is a motion field, from T' of Algorithm 1."""
    config, own = session.config, controlnet.plan(session)  # estimates depth, if need be
    generator = torch.Generator().manual_seed(config.seed)
    noise = torch.randn(own.start[:1].shape, generator=generator)
    own = replace(own, start=noise.expand_as(own.start))
    if config.motion_x or config.motion_y:
        return with_motion(session, own, generator)
    return own


@torch.inference_mode()
def with_motion(session: EditSession, own: EditPlan, generator: torch.Generator) -> EditPlan:
    """The plan whose frames start from the first one's latents at T, translated and noised to T'.

    Args:
        own: the plan without motion.
        generator: of the noise of all frames but the first.
    """
    config, schedule = session.config, session.models.schedule
    n_frames, n_steps = len(own.start), len(own.timesteps)
    n_first, n_more = (max(1, round(share * n_steps)) for share in (TO_T1, TO_T0))
    if n_first + n_more >= n_steps:
        raise UserError(f"n_timesteps: {n_steps}: a motion field needs at least 3")
    first = torch.zeros(1, dtype=torch.long)
    prompts = [config.negative_prompt, config.prompt][config.guidance_scale == 1.0 :]
    denoiser = make_denoiser(session.models, session.frames, prompts, own.control, session.depth)
    sampler, x = DDIMSampler(schedule, own.timesteps), own.start[:1]
    for i in range(n_first + n_more):
        if i == n_first:
            at_t1 = x
        eps = guided_noise(
            denoiser, TokenFlowContext(), config.guidance_scale, x, own.timesteps[i], first
        )
        x = sampler.step(x, eps, i)
    t1, t0 = own.timesteps[n_first], own.timesteps[n_first + n_more]
    moved = [translated(x, k * config.motion_x, k * config.motion_y) for k in range(1, n_frames)]
    # DDPM's forward process, over the timesteps that the published code takes.
    kept = schedule.alphas_cumprod[t1 - 1] / schedule.alphas_cumprod[max(t0 - 1, 0)]
    eps = torch.randn(n_frames - 1, *x.shape[1:], generator=generator)
    others = kept**0.5 * torch.cat(moved) + (1 - kept) ** 0.5 * eps
    return replace(own, timesteps=own.timesteps[n_first:], start=torch.cat([at_t1, others]))


def edit(config: Text2VideoZeroConfig, overwrite: bool = False, load: Loader | None = None) -> Path:
    """Edits a preprocessed clip, unless a finished result exists; returns its folder."""
    fixed = {"consistency": "first_frame", "sampler": "ddim", "noise": "shared"}
    inputs = open_edit_inputs(config.model_copy(update=fixed))
    controlnet.check(inputs.config, inputs.checkpoint, inputs.cache.has_depth)
    with open_result(NAME, inputs, overwrite) as (folder, work):
        if work is not None:
            session = EditSession(inputs, load=load, work=work)
            latents = edit_latents(session)
            save_result(NAME, session, session.composite(session.decode(latents)), latents)
    return folder


def edit_latents(session: EditSession) -> Tensor:
    """The clean latents of a session's edit, (n, 4, h, w)."""
    config = session.config
    key = controlnet.control_settings(config).key
    context = TokenFlowContext(
        mode=Pass.FIRST_FRAME, branches=1 if config.guidance_scale == 1.0 else 2
    )
    with tokenflow_patch(session.models.controlnet(key), context, config.attention_backend):
        return session.edit_latents(plan(session))


def main(argv: Sequence[str] | None = None) -> Path:
    """Runs the script; returns `edit_all`'s folder."""
    return edit_all(Text2VideoZeroConfig, argv, "controlnet", __doc__.splitlines()[0], edit)


if __name__ == "__main__":
    command_line(main)
