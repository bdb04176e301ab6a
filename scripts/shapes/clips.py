"""Write clips of the shapes world with their ground truth, and the list for Table 1 on them.

    python -m scripts.shapes.clips latents/shapes --clips 10
    python -m scripts.shapes.clips latents/shapes2 --kinds textured textured_crossing
    sh scripts/table1.sh latents/shapes/clips.yaml

Each clip is a folder of PNG frames, with its optical flow and visibility next to it
(`<clip>.flow.safetensors`, motion.py) and the edited object's masks in `masks/<clip>/`. The edit
asked for is another colour of the object; `--kinds` asks for others, and for clips of 40 frames of
the second world (world2.py). No scene was trained on: the seeds are the held-out ones.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np

from scripts.demo import inversion_options
from scripts.shapes import world2
from scripts.shapes.metrics import true_motion
from scripts.shapes.pictures import HELD_OUT, SIZE
from scripts.shapes.world import (
    BACKGROUNDS,
    FILLS,
    SAMPLE_FRAMES,
    Scene,
    another_color,
    random_scene,
    render_clip,
)
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
    "tune_a_video": ("guidance_scale", "train_steps", "learning_rate", "sample_every"),
}
PAN = 0.9  # travel of the background in a clip of the kind "moving", in short sides
KINDS = {  # of clips: the attribute that is edited, and demo's settings of PnP for such an edit
    "shapes": ("color", "demo_pnp"),
    "moving": ("color", "demo_pnp"),  # the camera pans three times as far or more
    "crossing": ("color", "demo_pnp"),  # a second object hides the edited one for some frames
    "fill": ("fill", "demo_pnp_fill"),
    "background": ("background", "demo_pnp_background"),
    "textured": ("color", "demo_pnp"),  # of the second world, like the next
    "textured_crossing": ("color", "demo_pnp"),
}


def scene_of(kind: str, seed: int) -> Scene:
    """The held-out scene of a clip of KINDS."""
    crossing = kind.endswith("crossing")
    if kind.startswith("textured"):
        return world2.random_scene(seed, 2 if crossing else 1, crossing, soft=False)
    scene = random_scene(seed, n_objects=2 if crossing else 1)
    if kind == "moving":
        length = PAN / math.hypot(*scene.pan)
        return replace(scene, pan=tuple(length * along for along in scene.pan))
    if kind == "crossing":  # each to the other's side: they meet in the middle at time 1/2
        across = [replace(o, travel=tuple(-2 * x for x in o.center)) for o in scene.objects]
        return replace(scene, objects=tuple(across))
    return scene


def length_of(kind: str) -> int:
    """The number of frames of a whole clip of KINDS, from time 0 to 1."""
    return world2.CLIP_FRAMES if kind.startswith("textured") else SAMPLE_FRAMES


def edited_scene(kind: str, scene: Scene) -> Scene:
    """What the edit of a clip is to show: the scene with another colour, fill or background.

    Only its caption is meant: its colours in RGB are still the source's.
    """
    attribute, thing = KINDS[kind][0], scene.objects[0]
    if attribute == "background":
        taken = {scene.background, thing.color, "gray"}
        first = BACKGROUNDS.index(scene.background)
        turned = [*BACKGROUNDS[first:], *BACKGROUNDS[:first]]
        return replace(scene, background=next(b for b in turned if b not in taken))
    value = (
        another_color(scene)
        if attribute == "color"
        else FILLS[(FILLS.index(thing.fill) + 1) % len(FILLS)]
    )
    return replace(scene, objects=(replace(thing, **{attribute: value}), *scene.objects[1:]))


def write_clip(folder: Path, seed: int, n_frames: int, kind: str = "shapes") -> dict:
    """Write a scene's clip with its ground truth; returns its entry in the list of clips."""
    scene = scene_of(kind, seed)
    clip = render_clip(scene, length_of(kind), SIZE)
    path = folder / f"{kind}-{seed}"
    save_frames(path, clip.frames[:n_frames])
    save_motion(truth_file(path), true_motion(clip, n_frames))
    masks = folder / "masks" / path.name
    masks.mkdir(parents=True)
    for number, mask in enumerate(clip.masks[:n_frames]):
        cv2.imwrite(str(masks / f"{number:05d}.png"), 255 * (mask == 1).astype(np.uint8))
    # PnP is guided away from the source's caption, as in the demo.
    own = {"negative_prompt": scene.caption}
    if KINDS[kind][1] != "demo_pnp":
        config = load_yaml(ROOT / "configs" / f"{KINDS[kind][1]}.yaml")
        own |= {key: config[key] for key in OWN["pnp"] if key in config}
    prompts = {"inversion_prompt": scene.caption, "prompt": edited_scene(kind, scene).caption}
    return {"data_path": str(path), **prompts, "pnp": own}


def clips_list(clips: Sequence[dict], masks: Path, n_frames: int) -> dict:
    """The list for Table 1: the demo's settings, and the world's truth to measure by."""
    configs = {name: load_yaml(ROOT / "configs" / f"demo_{name}.yaml") for name in OWN}
    own = {name: {key: configs[name][key] for key in keys} for name, keys in OWN.items()}
    options = inversion_options(configs["pnp"])
    return {
        "latents_path": "latents/table1",
        "output_path": "tokenflow-results/table1",
        "settings": {key: configs["pnp"][key] for key in SHARED} | {"n_frames": n_frames},
        **own,
        "preprocess": {key: options[key] for key in ("H", "W", "inversion_iters")},
        "evaluate": {"flow": "truth", "masks": str(masks), "clip_model": "models/tiny/judge"},
        "clips": list(clips),
    }


def write_clips(
    folder: Path, seed: int, count: int, kinds: Sequence[str], n_frames: int | None = None
) -> Path:
    """Write clips of these kinds in turn, of one seed after another; returns their list.

    Args:
        n_frames: of each clip, from its start; None: as many as the demo's, but whole clips where
            all are of the second world.
    """
    if n_frames is None:
        shortest = min(map(length_of, kinds))
        demo = load_yaml(ROOT / "configs/demo_pnp.yaml")["n_frames"]
        n_frames = shortest if shortest == world2.CLIP_FRAMES else demo
    with atomic_dir(folder) as partial:
        each = zip(range(count), itertools.cycle(kinds), strict=False)
        clips = [write_clip(partial, seed + i, n_frames, kind) for i, kind in each]
        for clip in clips:
            clip["data_path"] = str(folder / Path(clip["data_path"]).name)
        save_yaml(partial / "clips.yaml", clips_list(clips, folder / "masks", n_frames))
    return folder / "clips.yaml"


def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where to; must not be there yet")
    parser.add_argument("--clips", type=at_least(1), default=10, help="how many (default: 10)")
    parser.add_argument(
        "--seed", type=at_least(HELD_OUT), default=SEED, help=f"of the first (default: {SEED})"
    )
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["shapes"], metavar="KIND",
                        help=f"some of {', '.join(KINDS)}, in turn (default: shapes)")  # fmt: skip
    parser.add_argument("--frames", type=at_least(2), help="of each clip, from its start (default: "
                        "the demo's number; all where every kind is textured)")  # fmt: skip
    args = parser.parse_args(argv)
    most = min(map(length_of, args.kinds))
    if (args.frames or 0) > most:
        raise UserError(f"--frames: clips of these --kinds have {most}, got {args.frames}")
    if args.folder.exists():
        raise UserError(f"{args.folder}: exists already; remove it or name another")
    check_writable(args.folder.parent, "folder")
    path = write_clips(args.folder, args.seed, args.clips, args.kinds, args.frames)
    print(f"{args.clips} clips: {path}")


if __name__ == "__main__":
    command_line(main)
