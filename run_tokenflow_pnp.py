"""Edits a preprocessed clip with TokenFlow on Plug-and-Play (Tumanyan et al. 2023).

python run_tokenflow_pnp.py --config configs/config_pnp.yaml --set prompt="a marble sculpture"
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from tokenflow.diffusion.checkpoints import load_unet_skeleton
from tokenflow.diffusion.models import Loader
from tokenflow.editing.config import EditConfig
from tokenflow.editing.inputs import open_inputs
from tokenflow.editing.loop import EditPlan, EditSession, run_edit, run_script
from tokenflow.ops.distributed import ALONE, Team
from tokenflow_utils import missing_injection_layers
from util import UserError, command_line

TECHNIQUE = "pnp"
CONFIG = "configs/config_pnp.yaml"


class PnPConfig(EditConfig):
    """The keys of configs/config_pnp.yaml."""

    pnp_attn_t: float = Field(
        0.5,
        ge=0,
        le=1,
        description="share of the steps in which source queries and keys are injected; higher "
        "keeps more of the source's structure",
    )
    pnp_f_t: float = Field(
        0.8,
        ge=0,
        le=1,
        description="share of the steps in which source convolution features are injected",
    )


def check_injection_layers(checkpoint: Path) -> None:
    """Refuses a checkpoint whose UNet lacks the layers that PnP injects into.

    Raises:
        UserError: naming the first missing layer.
    """
    missing = missing_injection_layers(load_unet_skeleton(checkpoint))
    if missing:
        raise UserError(
            f"{checkpoint}: its UNet has no {missing[0]} ({len(missing)} of the layers that "
            "PnP injects into are missing); use a checkpoint with Stable Diffusion's blocks"
        )


def plan(session: EditSession) -> EditPlan:
    """From the inverted latents at the first timestep, with the source injected early on."""
    config, timesteps = session.config, session.inputs.timesteps
    return EditPlan(
        timesteps=timesteps,
        start=session.ddim_start(timesteps[0]),
        attention_steps=int(len(timesteps) * config.pnp_attn_t),
        feature_steps=int(len(timesteps) * config.pnp_f_t),
    )


def edit(
    config: PnPConfig,
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
        inputs = open_inputs(config, team)
        check_injection_layers(inputs.checkpoint)
    return run_edit(TECHNIQUE, inputs, plan, overwrite, load, wait)


def main(argv: Sequence[str] | None = None) -> Path:
    """Runs the script; returns the result's folder."""
    return run_script(edit, PnPConfig, argv, CONFIG, __doc__.splitlines()[0])


if __name__ == "__main__":
    command_line(main)
