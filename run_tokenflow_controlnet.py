"""Edits a preprocessed clip with TokenFlow on a ControlNet (Zhang et al. 2023).

python run_tokenflow_controlnet.py --set data_path=clip.mp4 --set prompt="a marble sculpture"
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, model_validator

import report
from tokenflow.diffusion.model_names import DEPTH_ESTIMATOR, ControlKind, control_settings
from tokenflow.editing.config import NoiseConfig
from tokenflow.editing.techniques import EditPlan, Technique
from util import command_line

if TYPE_CHECKING:
    from tokenflow.editing.loop import EditSession


class ControlNetConfig(NoiseConfig):
    """The keys of configs/config_controlnet.yaml."""

    PRESET_SECTIONS: ClassVar = ("edit", "controlnet")

    control: ControlKind = Field("canny", description="what the ControlNet follows")
    controlnet_key: str | None = Field(
        None,
        description="hub id or local folder of a ControlNet that fits the model; null: by "
        "sd_version (lllyasviel's for SD 1.5, thibaud's for SD 2.x)",
    )
    controlnet_scale: float = Field(1.0, ge=0, description="weight of the ControlNet")
    canny_low: int = Field(100, ge=0, le=255, description="lower Canny threshold")
    canny_high: int = Field(200, ge=0, le=255, description="upper Canny threshold")
    depth_model: str = Field(
        DEPTH_ESTIMATOR,
        description="depth estimator for control: depth, where the cache holds no depth: a hub id "
        "or local folder, or checkpoint: the checkpoint's own",
    )

    @model_validator(mode="after")
    def _check_controlnet_rules(self) -> ControlNetConfig:
        if self.sd_version == "depth":
            raise ValueError(
                "sd_version: depth is conditioned on depth by itself and no ControlNet fits it; "
                "use run_tokenflow_pnp.py or run_tokenflow_sdedit.py"
            )
        if self.sd_version is not None:
            control_settings(self)
        return self


def plan(session: EditSession) -> EditPlan:
    """From the clip's latents at the first timestep, guided by the ControlNet at every step.

    They are noised by the noise that the config names.
    """
    config, timesteps = session.config, session.inputs.timesteps
    if config.control == "depth" and session.depth is None:
        from tokenflow.diffusion.conditions import estimate_depth

        checkpoint, device = session.inputs.checkpoint, session.models.device
        session.depth = estimate_depth(
            session.frames, config.depth_model, checkpoint, device, allow_pickle=config.allow_pickle
        )
    return EditPlan(
        timesteps,
        session.noisy_start(timesteps[0], config.start_noise),
        control=control_settings(config),
    )


def check(config: ControlNetConfig, checkpoint: Path, has_depth: bool) -> None:
    """Refuses a ControlNet or depth estimator that is missing or does not fit."""
    from tokenflow.diffusion.checkpoints import check_controlnet_fits, depth_estimator_folders

    check_controlnet_fits(checkpoint, control_settings(config).key, config.allow_pickle)
    if config.control == "depth" and not has_depth:
        depth_estimator_folders(config.depth_model, checkpoint, config.allow_pickle)


TECHNIQUE = Technique(
    name="controlnet",
    about=__doc__.splitlines()[0],
    config=ControlNetConfig,
    plan=plan,
    check=check,
)
main, edit = partial(TECHNIQUE.main, report=report.main), TECHNIQUE.edit

if __name__ == "__main__":
    command_line(main)
