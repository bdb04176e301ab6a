"""Edit a bundled clip with the small model: the demo, run by `make demo`.

Runs the project's own scripts, prints their command lines, and ends with a table: each edit's
seconds, its warp error (against the world's true flow), and what it shows. Colours and shape are
measured on the pixels; the model's judge, a CLIP model, names the fill. A picture of all clips is
written to tokenflow-results/demo.png. Existing results are kept; `make clean` removes them.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from tabulate import tabulate

import preprocess
import run_tokenflow_controlnet
import run_tokenflow_pnp
import run_tokenflow_sdedit
from scripts import strip
from scripts.shapes import world
from scripts.shapes.metrics import Judge, color_shape_background, warp_error
from scripts.shapes.pictures import SIZE
from tokenflow.cache.options import arguments
from tokenflow.cache.source_cache import open_cache
from tokenflow.diffusion.model_names import MODELS
from tokenflow.storage.images import load_frames
from tokenflow.storage.video import read_clip
from tokenflow.storage.yaml_files import load_yaml
from util import ArgumentParser, UserError, command_line, setup_logging

CLIP = "star"
INVERSION_ITERS = 2
PICTURE = "tokenflow-results/demo.png"
EDITS = (
    ("PnP: colour", run_tokenflow_pnp, "configs/demo_pnp.yaml"),
    ("PnP: fill", run_tokenflow_pnp, "configs/demo_pnp_fill.yaml"),
    ("PnP: background", run_tokenflow_pnp, "configs/demo_pnp_background.yaml"),
    ("SDEdit: colour", run_tokenflow_sdedit, "configs/demo_sdedit.yaml"),
    ("ControlNet: all", run_tokenflow_controlnet, "configs/demo_controlnet.yaml"),
)


def main(argv: Sequence[str] | None = None) -> None:
    ArgumentParser(description=__doc__.splitlines()[0]).parse_args(argv)
    setup_logging()
    source = f"data/{CLIP}.mp4"
    scene = world.random_scene(*world.SAMPLES[CLIP])
    config = load_yaml(Path(EDITS[0][2]))
    options = {
        "data_path": source,
        "save_dir": config["latents_path"],
        **inversion_options(config),
        "inversion_prompt": scene.caption,
    }
    try:
        cache = open_cache(run(preprocess, arguments(options)))
        folders = {label: run(script, ["--config", config]) for label, script, config in EDITS}
    except UserError as error:
        if "--overwrite" not in str(error):
            raise
        raise UserError(f"{error}, or run `make clean` and the demo again") from error

    source_frames = cache.frames(cache.manifest.n_frames)
    inverted = read_clip(
        cache.folder / "inverted.mp4", len(source_frames), size=(SIZE, SIZE)
    ).frames
    frames = {"source": source_frames, "inversion": inverted}
    seconds = {"inversion": sum(cache.manifest.seconds.values())}
    for label, folder in folders.items():
        frames[label] = load_frames(folder / "frames")
        seconds[label] = sum(load_yaml(folder / "run.yaml")["seconds"].values())
    clip = world.render_clip(scene, world.SAMPLE_FRAMES, SIZE)
    rows = [f"{label}={folder / 'edited.mp4'}" for label, folder in folders.items()]
    print()
    n_frames = str(len(source_frames))
    strip.main([PICTURE, f"source={source}", *rows, "--size", "112", "--n_frames", n_frames])
    print()
    print_figures(frames, seconds, clip)


def inversion_options(config: Mapping[str, Any]) -> dict[str, object]:
    """How a clip is inverted for an edit of these settings: options of preprocess.py."""
    return {
        "sd_version": config["sd_version"],
        "n_frames": config["n_frames"],
        "H": SIZE,
        "W": SIZE,
        "steps": config["n_inversion_steps"],
        "save_steps": config["n_timesteps"],
        "inversion_iters": INVERSION_ITERS,
        # What these edits' source features are cached for.
        "keyframe_interval": config["keyframe_interval"],
        "pnp_attn_t": config["pnp_attn_t"],
        "pnp_f_t": config["pnp_f_t"],
    }


def run(script: ModuleType, argv: Sequence[str]) -> Path:
    """Call a script's main as the shell would, and print the command; returns the output folder."""
    print(f"\n$ {shlex.join(['python', Path(script.__file__).name, *argv])}", flush=True)
    return script.main(argv)


def print_figures(
    frames: dict[str, np.ndarray], seconds: dict[str, float], clip: world.ShapesClip
) -> None:
    """A line for each clip: seconds, warp error x1e-3, and what its frames show most often."""
    judge = Judge(Path(MODELS["tiny"]) / "judge", torch.device("cpu"))
    rows = []
    for label, pictures in frames.items():
        seen, _ = Counter(map(color_shape_background, pictures)).most_common(1)[0]
        color, shape, background = seen
        fill, _ = Counter(answer[0] for answer in judge(pictures)).most_common(1)[0]
        shape = "misshapen object" if shape == "none" else shape
        caption = world.caption_of([(fill, color, shape)], background)
        if color == "none":
            caption = f"nothing on a {background} background"
        took = f"{seconds[label]:.0f}" if label in seconds else ""
        rows.append([label, took, f"{warp_error(pictures, clip):.2f}", caption])
    head = ["", "seconds", "warp error", "shown most often"]
    align = ["left", "right", "right", "left"]
    print(tabulate(rows, head, "plain", colalign=align, disable_numparse=True))


if __name__ == "__main__":
    command_line(main)
