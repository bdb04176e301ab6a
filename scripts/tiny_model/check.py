"""Measure what the small model of models/tiny can do, on scenes that it was not trained on.

    python -m scripts.tiny_model.check --clips 20 --json check.json

Every clip is inverted and edited by the project's own scripts at the demo's settings, to another
colour, by TokenFlow and by each of the paper's ablations (its Table 1); the world's ground truth
(masks, optical flow, occlusions) says how well. Pictures sampled from text are measured on their
pixels (colour, shape, background) and by the model's own judge, a CLIP model (fill, texture); the
accuracy of both on rendered pictures is measured too. So are pictures of the second world
(world2.py), and pictures of two objects, of both worlds in turn. Finished edits are kept in the
work folder and reused as long as the model, the settings and the code do not change.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from tabulate import tabulate
from tqdm import tqdm

import preprocess
import run_tokenflow_pnp as pnp
from scripts.demo import inversion_options
from scripts.shapes import metrics, world, world2
from scripts.shapes.pictures import HELD_OUT, SIZE
from scripts.shapes.textures import TEXTURES
from scripts.tiny_model.denoiser import draw_pictures
from tokenflow.cache.options import arguments
from tokenflow.cache.source_cache import Manifest, open_cache
from tokenflow.diffusion.checkpoints import checkpoint_folder, checkpoint_revision
from tokenflow.diffusion.models import (
    StableDiffusion,
    load_stable_diffusion,
    resolve_device,
    resolve_dtype,
)
from tokenflow.diffusion.vae import decode_latents, encode_frames, psnr
from tokenflow.editing.config import ROOT
from tokenflow.evaluation.score_table import order_verdict
from tokenflow.storage.images import load_frames, save_frames
from tokenflow.storage.reports import check_report_path, write_reports
from tokenflow.storage.schema import parse
from tokenflow.storage.yaml_files import load_yaml
from util import ArgumentParser, at_least, check_writable, command_line, setup_logging

log = logging.getLogger("tokenflow")

CONFIG = "configs/demo_pnp.yaml"
FPS = Fraction(10)
SEED = 4_000_000
QUICK = {"n_inversion_steps": 7, "n_timesteps": 7, "n_frames": 3, "keyframe_interval": 2}
METHODS = {
    "tokenflow": {},
    "fixed_keyframes": {"keyframes": "fixed"},
    "extended_attention": {"consistency": "extended_attention"},
    "per_frame": {"consistency": "none"},
}
ORDER = ("vae", *METHODS)  # of the warp errors in the paper's Table 1


def accuracies(found: Sequence[tuple], true: Sequence[tuple]) -> dict[str, float]:
    """The share of right answers for each attribute; `found` may lack the first and the last, the
    fill and the surface.
    """
    first = 0 if len(found[0]) == len(metrics.ATTRIBUTES) else 1
    part = slice(first, first + len(found[0]))
    right = np.array(found) == np.array(true)[:, part]
    names = (f"{name}_accuracy" for name in metrics.ATTRIBUTES[part])
    return dict(zip(names, right.mean(0).tolist(), strict=True))


def check_text_to_image(
    drawn: np.ndarray, decoded: np.ndarray, scenes: Sequence[world.Scene], judge: metrics.Judge
) -> dict:
    """How many pictures of captions show what they should.

    Args:
        drawn, decoded: as `draw_scenes` gives them. The accuracies of the measurement and of the
            judge themselves are those on `decoded`.
        scenes: with one object each.
    """
    true = [metrics.attributes(scene) for scene in scenes]
    by_judge = accuracies(judge(drawn), true)
    return {
        **accuracies(list(map(metrics.color_shape_background, drawn)), true),
        **{f"{name}_accuracy": by_judge[f"{name}_accuracy"] for name in ("fill", "surface")},
        "measurement": accuracies(list(map(metrics.color_shape_background, decoded)), true),
        "judge": accuracies(judge(decoded), true),
    }


def check_two_objects(
    drawn: np.ndarray, decoded: np.ndarray, scenes: Sequence[world.Scene]
) -> dict[str, float]:
    """How many pictures show two objects in their colours, each in its own shape, and no third.

    Args:
        drawn, decoded, scenes: as for `check_text_to_image`, but with two objects each.
    """
    true = [{thing.color: thing.shape for thing in scene.objects} for scene in scenes]
    return {
        name: float(
            np.mean([metrics.color_shapes(f) == t for f, t in zip(frames, true, strict=True)])
        )
        for name, frames in (("accuracy", drawn), ("measurement", decoded))
    }


def draw_scenes(
    models: StableDiffusion,
    model: Path,
    config: Mapping[str, Any],
    scenes: Sequence[world.Scene],
    time: float,
    seed: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Sample pictures of unseen scenes' captions.

    Args:
        models: of the folder `model`.
        config: of an edit; its guidance and number of steps are used.
        time: of the scenes' renderings.

    Returns:
        The pictures, (n, SIZE, SIZE, 3) uint8, and as many of the scenes, as the VAE reconstructs
        their renderings.
    """
    rendered = np.stack([world.render(scene, time, (SIZE, SIZE))[0] for scene in scenes])
    parts = {name: getattr(models, name) for name in ("unet", "vae", "text_encoder")}
    pipe = StableDiffusionPipeline.from_pretrained(model, safety_checker=None, **parts)
    options = {
        "guidance_scale": config["guidance_scale"],
        "num_inference_steps": config["n_timesteps"],
        "generator": torch.Generator(models.device).manual_seed(seed),
    }
    captions = [scene.caption for scene in scenes]
    parts = [captions[first : first + 20] for first in range(0, len(captions), 20)]
    drawn = np.concatenate(
        [draw_pictures(pipe, part, **options) for part in tqdm(parts, "text to image")]
    )
    return drawn, decode_latents(models, encode_frames(models, rendered))


def check_pictures(
    models: StableDiffusion, model: Path, config: Mapping[str, Any], count: int, seed: int
) -> dict:
    """What pictures show: `count` of the first world, of the second, and of two objects.

    Args:
        models, model, config: as for `draw_scenes`.
    """
    figures = {}
    for name, of, surfaces in (("", world, ("",)), ("world2", world2, ("", *TEXTURES))):
        scenes = [of.random_scene(seed + i, n_objects=1) for i in range(count)]
        pictures = draw_scenes(models, model, config, scenes, 0.5, seed)
        judge = metrics.Judge(model / "judge", models.device, surfaces)
        found = check_text_to_image(*pictures, scenes, judge)
        figures |= {name: found} if name else found
    scenes = [(world, world2)[i % 2].random_scene(seed + i, n_objects=2) for i in range(count)]
    pictures = draw_scenes(models, model, config, scenes, 0.0, seed)
    return figures | {"two_objects": check_two_objects(*pictures, scenes)}


# ------------------------------------------------------------------------------------------ clips


def check_clip(
    models: StableDiffusion,
    model: Path,
    work: Path,
    config: Mapping[str, Any],
    accuracy: Mapping[str, int],
    seed: int,
) -> dict:
    """Invert and edit the clip of a scene with one object, and measure the results.

    Args:
        work: for the clip, its caches and its edits.
        config: of the demo's edit.
        accuracy: steps and frames of the inversions that are measured.
    """
    scene = world.random_scene(seed, n_objects=1)
    clip = world.render_clip(scene, world.SAMPLE_FRAMES, SIZE)
    source, target = work / "clips" / f"{seed}", world.another_color(scene)
    save_frames(source, clip.frames)
    true, masks = clip.frames[: config["n_frames"]], clip.masks[: config["n_frames"]]
    decoded = decode_latents(models, encode_frames(models, true))
    shared = {"data_path": str(source), "model_key": str(model), "device": str(models.device)}

    def invert(save_dir: str, **changes: object) -> Manifest:
        options = inversion_options(config) | shared | changes
        options |= {"save_dir": work / save_dir, "fps": FPS, "inversion_prompt": scene.caption}
        return open_cache(preprocess.preprocess(preprocess.parse_args(arguments(options)))).manifest

    def edit(method: Mapping[str, str]) -> np.ndarray:
        places = {"latents_path": str(work / "latents"), "output_path": str(work / "results")}
        prompts = {"prompt": world.recolored(scene, target), "negative_prompt": scene.caption}
        settings = {**config, **shared, **places, **prompts, **method}
        return load_frames(pnp.edit(parse(pnp.PnPConfig, settings, CONFIG)) / "frames")

    invert("latents")
    few = {"n_frames": accuracy["accuracy_frames"], "no_cache_features": ""}
    few |= dict.fromkeys(("steps", "save_steps"), accuracy["accuracy_steps"])
    plain = invert("plain", **few, inversion_iters=1)
    refined = invert("refined", **few, inversion_iters=5)
    clips = {"source": true, "vae": decoded} | {name: edit(m) for name, m in METHODS.items()}
    frames = clips["tokenflow"]
    found = [metrics.hue_of_object(f, m > 0) for f, m in zip(frames, masks, strict=True)]
    return {
        "seed": seed,
        "caption": scene.caption,
        "target": target,
        "vae_psnr": psnr(decoded, true),
        "inversion_vae_psnr": plain.vae_psnr,
        "inversion_psnr": plain.psnr,
        "inversion_iters_5_psnr": refined.psnr,
        "edit_color_success": float(np.mean([color == target for color in found])),
        "background_psnr": metrics.background_psnr(frames, decoded, masks, models.vae_factor),
        "warp_error": {name: metrics.warp_error(frames, clip) for name, frames in clips.items()},
    }


def summary(clips: Sequence[dict]) -> dict:
    """The clips' means."""
    means = {}
    for name, value in clips[0].items():
        if isinstance(value, dict):
            means[name] = summary([clip[name] for clip in clips])
        elif isinstance(value, float):
            means[name] = float(np.mean([clip[name] for clip in clips]))
    return means


def table(figures: dict) -> str:
    """The figures in rows, with the required values, for the terminal."""
    frames, steps = figures["accuracy_frames"], figures["accuracy_steps"]
    vae = figures["inversion_vae_psnr"]
    asked = {"color": ">= 95 %", "shape": ">= 90 %", "background": ">= 90 %"}
    percents = []
    for label, found in (("", figures), (", world 2", figures["world2"])):
        shown = [n for n in metrics.ATTRIBUTES if label or n != "surface"]
        percents += [(f"text to image{label}: {n}", found[f"{n}_accuracy"], asked.get(n, ""))
                     for n in shown]  # fmt: skip
        for by in ("measurement", "judge"):
            least = ">= 90 %" if by == "judge" else ""
            percents += [(f"  the {by} on ground truth: {n}", found[by][f"{n}_accuracy"],
                          least if n == "shape" else "")
                         for n in shown if f"{n}_accuracy" in found[by]]  # fmt: skip
    two = figures["two_objects"]
    percents.append(("text to image: two objects, not mixed up", two["accuracy"], ">= 80 %"))
    percents.append(("  the measurement on ground truth", two["measurement"], ""))
    percents.append(("frames in the colour asked for", figures["edit_color_success"], ">= 90 %"))
    decibels = [
        ("VAE reconstruction", figures["vae_psnr"], 30),
        (f"the same, first {frames} frames", vae, None),
        (f"their inversion, {steps} steps", figures["inversion_psnr"], vae - 3),
        ("  with --inversion_iters 5", figures["inversion_iters_5_psnr"], vae - 0.5),
        ("background against the VAE's", figures["background_psnr"], 22),
    ]
    rows = [(name, f"{100 * value:.1f} %", least) for name, value, least in percents]
    rows += [(name, f"{value:.2f} dB", "" if low is None else f">= {low:.2f} dB")
             for name, value, low in decibels]  # fmt: skip
    errors = {name.replace("_", " "): value for name, value in figures["warp_error"].items()}
    rows += [(f"warp error x1e-3: {name}", f"{value:.2f}", "") for name, value in errors.items()]
    text = tabulate(rows, ("", "measured", "asked"), "plain", colalign=("left", "right", "left"))
    return f"{text}\n{order_verdict(errors, [name.replace('_', ' ') for name in ORDER])[1]}"


def code_version() -> str:
    """12 hex digits that change with any code of the repository."""
    files = [path for pattern in ("*.py", "tokenflow/**/*.py", "scripts/**/*.py")
             for path in sorted(ROOT.glob(pattern))]  # fmt: skip
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]


def main(argv: Sequence[str] | None = None) -> dict:
    """Run the script; returns the figures."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add, work = parser.add_argument, Path("tokenflow-results/check_tiny")
    add("--model", type=Path, default=Path("models/tiny"), help="(default: models/tiny)")
    add("--clips", type=at_least(1), default=20, help="number of clips to edit (default: 20)")
    add("--pictures", type=at_least(1), default=200, help="to sample from text (default: 200)")
    add("--seed", type=at_least(HELD_OUT), default=SEED, help=f"of the first scene ({SEED})")
    add("--json", type=Path, metavar="FILE", help="write the figures there too; -: to stdout")
    add("--work", type=Path, default=work, help=f"for caches and edits (default: {work})")
    add("--quick", action="store_true", help="few frames and steps: shows that it runs")
    add("--device", default="auto", help="auto, cpu, cuda, ... (default: auto)")
    args = parser.parse_args(argv)
    setup_logging()
    check_writable(args.work, "--work")
    if args.json:
        check_report_path(args.json, "--json")
    device = resolve_device(args.device)
    folder, dtype = checkpoint_folder(str(args.model)), resolve_dtype("auto", device)
    models = load_stable_diffusion(folder, device, dtype)
    quick, steps, frames = (QUICK, 10, 1) if args.quick else ({}, 50, 2)
    accuracy = {"accuracy_steps": steps, "accuracy_frames": frames}
    # Like a picture from text, an edit by SDEdit has no negative prompt.
    sdedit = load_yaml(ROOT / "configs/demo_sdedit.yaml") | quick
    figures = check_pictures(models, args.model, sdedit, args.pictures, args.seed)
    # Another model's caches and edits would be refused: each model has a folder.
    work = args.work / f"{checkpoint_revision(args.model)}_{code_version()}"
    config, clips = load_yaml(ROOT / CONFIG) | quick, []
    for number in range(args.clips):
        seed = args.seed + number
        clips.append(check_clip(models, args.model, work, config, accuracy, seed))
        log.info("clip %d of %d: %s", number + 1, args.clips, json.dumps(clips[-1]))
    figures |= {**accuracy, "quick": args.quick, **summary(clips), "clips": clips}
    reports = [(args.json, json.dumps(figures, indent=2) + "\n")] if args.json else []
    write_reports(table(figures), reports)
    return figures


if __name__ == "__main__":
    command_line(main)
