"""Draws what an edit is made from: the paper's Figures 2 and 3, and the keyframes of each step.

python visualize.py features --result RESULT --per_frame RESULT --out figures
python visualize.py correspondence --result RESULT --frame 5 --keyframe 2 --out figures
python visualize.py keyframes --result RESULT --out figures
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from run_tokenflow_sdedit import SDEditConfig, steps_from
from tokenflow.editing.config import EditConfig
from tokenflow.editing.techniques import load_technique
from tokenflow.figures.options import CorrespondenceOptions, FeatureOptions, KeyframeOptions
from tokenflow.storage.schema import add_arguments, from_arguments, load_config
from util import ArgumentParser, UserError, check_writable, command_line, setup_logging


def draw_keyframes(options: KeyframeOptions) -> list[Path]:
    """The keyframes of each step of a result.

    Returns the file: keyframes.png.
    """
    from tokenflow.editing.results import TECHNIQUES, read_result
    from tokenflow.figures import drawing

    result, out = read_result(Path(options.result)), Path(options.out)
    technique = result.run.get("technique")
    if technique not in TECHNIQUES:
        raise UserError(f"{result.folder}: a result of {technique}, which has no keyframes")
    config = load_config(load_technique(technique).config, result.folder / "config.yaml")
    if config.consistency != "tokenflow":
        raise UserError(
            f"{result.folder}: made with consistency: {config.consistency}, which has no "
            "keyframes; expected a result of consistency: tokenflow"
        )
    chosen, first_step = chosen_keyframes(config, result.n_frames)
    title = (
        f"{TECHNIQUES[technique]}: {config.keyframes} keyframes (black) of steps {first_step} to "
        f"{config.n_timesteps}\none in each interval of {config.keyframe_interval} frames (lines); "
        f"seed {config.keyframe_seed}; the noisiest step is at the top"
    )
    figure = drawing.keyframe_figure(chosen, first_step, config.keyframe_interval, title)
    return [drawing.save_figure(out / "keyframes.png", figure)]


def chosen_keyframes(config: EditConfig, n_frames: int) -> tuple[np.ndarray, int]:
    """Which frames are keyframes at the steps that an edit takes.

    Returns:
        (steps, n) bool; and the number of the first of these steps in the schedule, from 1.
        SDEdit takes the schedule's last steps.
    """
    from tokenflow.editing.loop import keyframes_of_steps

    taken = list(range(config.n_timesteps))
    if isinstance(config, SDEditConfig):
        taken = steps_from(taken, config.start, config.propagation)
    keyframes = keyframes_of_steps(config, n_frames, len(taken))
    chosen = np.zeros((len(taken), n_frames), bool)
    np.put_along_axis(chosen, keyframes.numpy(), True, axis=1)
    return chosen, taken[0] + 1


COMMANDS = {
    "features": FeatureOptions,
    "correspondence": CorrespondenceOptions,
    "keyframes": KeyframeOptions,
}


def main(argv: Sequence[str] | None = None) -> list[Path]:
    """Run the script; returns the files that it wrote."""
    setup_logging()
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for name, options in COMMANDS.items():
        add_arguments(commands.add_parser(name, help=options.__doc__), options)
    args = parser.parse_args(argv)
    check_writable(args.out, "--out")
    options = from_arguments(COMMANDS[args.command], args)
    from tokenflow.figures.paper_figures import draw_correspondence, draw_features  # slow to import

    draw = {"features": draw_features, "correspondence": draw_correspondence}
    written = draw.get(args.command, draw_keyframes)(options)
    for path in written:
        print(f"wrote {path}")
    return written


if __name__ == "__main__":
    command_line(main)
