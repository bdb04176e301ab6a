"""Edits a preprocessed clip with TokenFlow on a ControlNet (Zhang et al. 2023).

python run_tokenflow_controlnet.py --config configs/config_controlnet.yaml --set control=canny
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tokenflow.diffusion.checkpoints import (
    check_controlnet_fits,
    controlnet_key_for,
    single_model_folder,
)
from tokenflow.diffusion.conditions import Control, ControlSettings, draw_control, estimate_depth
from tokenflow.diffusion.model_names import DEPTH_ESTIMATOR
from tokenflow.diffusion.models import Loader
from tokenflow.editing.inputs import EditConfig, open_inputs
from tokenflow.editing.loop import EditPlan, EditSession, run_edit, run_script
from tokenflow.ops.distributed import ALONE, Team
from util import UserError, command_line, option

TECHNIQUE = "controlnet"
CONFIG = "configs/config_controlnet.yaml"


@dataclass(frozen=True)
class ControlNetConfig(EditConfig):
    """The keys of configs/config_controlnet.yaml."""

    control: str = option("canny", choices=("canny", "depth"))
    controlnet_key: str | None = option(None)
    controlnet_scale: float = option(1.0, low=0)
    canny_low: int = option(100, low=0, high=255)
    canny_high: int = option(200, low=0, high=255)
    depth_model: str = option(DEPTH_ESTIMATOR)
    use_ddim_noise: bool = option(True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.canny_low > self.canny_high:
            raise UserError(
                f"canny_low: {self.canny_low} is above canny_high: {self.canny_high}, "
                "expected low <= high"
            )
        if self.sd_version == "depth":
            raise UserError(
                "sd_version: depth is conditioned on depth by itself and no ControlNet fits it; "
                "use run_tokenflow_pnp.py or run_tokenflow_sdedit.py"
            )


def control_settings(config: ControlNetConfig) -> ControlSettings:
    """What the edit's ControlNet follows.

    Raises:
        UserError: if no ControlNet is known for the model.
    """
    key = controlnet_key_for(config.sd_version, config.control, config.controlnet_key)
    return ControlSettings(
        config.control, key, config.controlnet_scale, config.canny_low, config.canny_high
    )


def make_control(session: EditSession, settings: ControlSettings) -> Control:
    """The edit's ControlNet with its pictures of the clip."""
    device, depth = session.models.device, session.depth
    if settings.kind == "depth" and depth is None:
        config = session.config
        depth = estimate_depth(
            session.frames, config.depth_model, device, allow_pickle=config.allow_pickle
        )
    controlnet = session.models.controlnet(settings.key)
    return draw_control(controlnet, settings, session.frames, depth)


def plan(session: EditSession, settings: ControlSettings) -> EditPlan:
    """From the clip's latents at the first timestep, guided by the ControlNet at every step.

    They are noised by DDIM's noise or by one Gaussian noise that all frames share.
    """
    timesteps = session.inputs.timesteps
    noised = session.ddim_start if session.config.use_ddim_noise else session.gaussian_start
    return EditPlan(
        timesteps=timesteps,
        start=noised(timesteps[0]),
        control=make_control(session, settings),
    )


def edit(
    config: ControlNetConfig,
    overwrite: bool = False,
    load: Loader | None = None,
    wait: bool = True,
    team: Team = ALONE,
) -> Path:
    """Makes the result of one edit, or finds it made; returns its folder.

    Args:
        overwrite, load, wait: as of `editing.make_result`.
        team: the processes that make it together, each of which calls this.

    Raises:
        UserError: naming what is missing or does not fit.
    """
    with team.together():
        settings = control_settings(config)
        inputs = open_inputs(config, team)
        check_controlnet_fits(inputs.checkpoint, settings.key, config.allow_pickle)
        if config.control == "depth" and not inputs.cache.has_depth:
            single_model_folder(config.depth_model, "depth_model", config.allow_pickle)
    return run_edit(TECHNIQUE, inputs, partial(plan, settings=settings), overwrite, load, wait)


def main(argv: Sequence[str] | None = None) -> Path:
    """Runs the script; returns the result's folder."""
    return run_script(edit, ControlNetConfig, argv, CONFIG, __doc__.splitlines()[0])


if __name__ == "__main__":
    command_line(main)
