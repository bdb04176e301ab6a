"""Write clips of the shapes world with their ground truth, and the list for Table 1 on them.

    python -m scripts.shapes.clips latents/shapes --clips 10
    sh scripts/table1.sh latents/shapes/clips.yaml

Each clip is a folder of PNG frames, with its optical flow and visibility next to it
(`<clip>.flow.safetensors`, motion.py) and its masks in `masks/<clip>/`; the edit asked for is
another colour of the object. No scene was trained on: the seeds are the held-out ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from scripts.demo import inversion_options
from scripts.shapes.metrics import true_motion
from scripts.shapes.pictures import HELD_OUT, SIZE
from scripts.shapes.world import SAMPLE_FRAMES, another_color, random_scene, recolored, render_clip
from tokenflow.editing.config import ROOT
from tokenflow.evaluation.motion import save_motion, truth_file
from tokenflow.storage.images import save_frames
from tokenflow.storage.work_dir import atomic_dir
from tokenflow.storage.yaml_files import load_yaml, save_yaml
from util import ArgumentParser, UserError, at_least, check_writable, command_line

SEED = 5_000_000
SHARED = ("sd_version", "n_inversion_steps", "n_timesteps", "n_frames", "keyframe_interval")
OWN = {  # what Table 1 takes from each technique's demo config, besides the common keys
    "pnp": ("guidance_scale", "pnp_attn_t", "pnp_f_t"),
    "sdedit": ("guidance_scale", "start"),
    "controlnet": ("guidance_scale",),
}


def write_clip(folder: Path, seed: int, n_frames: int) -> dict:
    """Write a scene's clip with its ground truth; returns its entry in the list of clips."""
    scene = random_scene(seed, n_objects=1)
    clip = render_clip(scene, SAMPLE_FRAMES, SIZE)
    path = folder / f"shapes-{seed}"
    save_frames(path, clip.frames[:n_frames])
    save_motion(truth_file(path), true_motion(clip, n_frames))
    masks = folder / "masks" / path.name
    masks.mkdir(parents=True)
    for number, mask in enumerate(clip.masks[:n_frames]):
        cv2.imwrite(str(masks / f"{number:05d}.png"), 255 * (mask > 0).astype(np.uint8))
    return {
        "data_path": str(path),
        "inversion_prompt": scene.caption,
        "prompt": recolored(scene, another_color(scene)),
    }


def clips_list(clips: Sequence[dict], masks: Path) -> dict:
    """The list for Table 1: the demo's settings, and the world's truth to measure by."""
    configs = {name: load_yaml(ROOT / "configs" / f"demo_{name}.yaml") for name in OWN}
    own = {name: {key: configs[name][key] for key in keys} for name, keys in OWN.items()}
    # PnP is guided away from the source's caption, as in the demo.
    away = [{**clip, "pnp": {"negative_prompt": clip["inversion_prompt"]}} for clip in clips]
    options = inversion_options(configs["pnp"])
    return {
        "latents_path": "latents/table1",
        "output_path": "tokenflow-results/table1",
        "settings": {key: configs["pnp"][key] for key in SHARED},
        **own,
        "preprocess": {key: options[key] for key in ("H", "W", "inversion_iters")},
        "evaluate": {"flow": "truth", "masks": str(masks), "clip_model": "models/tiny/judge"},
        "clips": away,
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where to; must not be there yet")
    parser.add_argument("--clips", type=at_least(1), default=10, help="how many (default: 10)")
    parser.add_argument(
        "--seed", type=at_least(HELD_OUT), default=SEED, help=f"of the first (default: {SEED})"
    )
    args = parser.parse_args(argv)
    if args.folder.exists():
        raise UserError(f"{args.folder}: exists already; remove it or name another")
    check_writable(args.folder.parent, "folder")
    n_frames = load_yaml(ROOT / "configs/demo_pnp.yaml")["n_frames"]
    with atomic_dir(args.folder) as partial:
        clips = [write_clip(partial, args.seed + i, n_frames) for i in range(args.clips)]
        for clip in clips:
            clip["data_path"] = str(args.folder / Path(clip["data_path"]).name)
        save_yaml(partial / "clips.yaml", clips_list(clips, args.folder / "masks"))
    print(f"{args.clips} clips: {args.folder / 'clips.yaml'}")


if __name__ == "__main__":
    command_line(main)
