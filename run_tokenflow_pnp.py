"""Edits a preprocessed clip with TokenFlow on Plug-and-Play (Tumanyan et al. 2023).

python run_tokenflow_pnp.py --set data_path=clip.mp4 --set prompt="a marble sculpture"
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

import report
from tokenflow.editing.config import EditConfig
from tokenflow.editing.techniques import EditPlan, Technique
from tokenflow.storage.schema import Share
from util import UserError, command_line

if TYPE_CHECKING:
    from tokenflow.editing.loop import EditSession


class PnPConfig(EditConfig):
    """The keys of configs/config_pnp.yaml."""

    PRESET_SECTIONS: ClassVar = ("edit", "pnp")

    pnp_attn_t: Share = Field(
        0.5,
        description="share of the steps in which source queries and keys are injected; higher "
        "keeps more of the source's structure",
    )
    pnp_f_t: Share = Field(
        0.8, description="share of the steps in which source convolution features are injected"
    )


def check(config: PnPConfig, checkpoint: Path, has_depth: bool) -> None:
    """Refuses a checkpoint whose UNet lacks a layer that PnP injects into."""
    from tokenflow.diffusion.checkpoints import load_unet_skeleton
    from tokenflow_utils import ATTENTION_LAYERS, FEATURE_LAYER, self_attention_layers

    unet = load_unet_skeleton(checkpoint)
    missing = sorted(set(ATTENTION_LAYERS) - set(self_attention_layers(unet)))
    if FEATURE_LAYER not in dict(unet.named_modules()):
        missing.append(FEATURE_LAYER)
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


TECHNIQUE = Technique(
    name="pnp",
    about=__doc__.splitlines()[0],
    config=PnPConfig,
    plan=plan,
    check=check,
)
main, edit = partial(TECHNIQUE.main, report=report.main), TECHNIQUE.edit

if __name__ == "__main__":
    command_line(main)
