"""Edits a preprocessed clip with TokenFlow on SDEdit (Meng et al. 2022).

python run_tokenflow_sdedit.py --set data_path=clip.mp4 --set prompt="a marble sculpture"
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

import report
from tokenflow.editing.config import NoiseConfig
from tokenflow.editing.techniques import EditPlan, Technique
from util import command_line

if TYPE_CHECKING:
    from tokenflow.editing.loop import EditSession


class SDEditConfig(NoiseConfig):
    """The keys of configs/config_sdedit.yaml."""

    PRESET_SECTIONS: ClassVar = ("edit", "sdedit")

    start: float = Field(
        0.9,
        gt=0,
        le=1,
        description="share of the schedule that is run; lower stays closer to the clip",
    )


def steps_from(timesteps: list[int], start: float, propagation: str) -> list[int]:
    """The timesteps that SDEdit takes: the last `start` of the schedule, at least one.

    The released code slices with int(1 - start * T), one step fewer than start * T; `propagation:
    released` repeats that, and with it that nothing is left out where start * T < 2.
    """
    if propagation == "released":
        return timesteps[int(1 - start * len(timesteps)) :]
    return timesteps[-max(1, round(start * len(timesteps))) :]


def plan(session: EditSession) -> EditPlan:
    """From the clip's latents, noised to `start` by the noise that the config names."""
    config = session.config
    timesteps = steps_from(session.inputs.timesteps, config.start, config.propagation)
    return EditPlan(
        timesteps=timesteps, start=session.noisy_start(timesteps[0], config.start_noise)
    )


TECHNIQUE = Technique(
    name="sdedit",
    about=__doc__.splitlines()[0],
    config=SDEditConfig,
    plan=plan,
)
main, edit = partial(TECHNIQUE.main, report=report.main), TECHNIQUE.edit

if __name__ == "__main__":
    command_line(main)
