"""Measure what the small model of models/tiny can do, on scenes that it was not trained on.

    python -m scripts.tiny_model.check --clips 20 --json check.json

Every clip is inverted and edited by the project's own scripts at the demo's settings, to another
colour, by TokenFlow and by each of the paper's ablations (its Table 1); the world's ground truth
(masks, optical flow, occlusions) says how well. Pictures sampled from text are measured on their
pixels (colour, shape, background) and by the model's own judge, a CLIP model (fill); the accuracy
of both on rendered pictures is measured too. Finished edits are kept in the work folder and reused
as long as the model, the settings and the code do not change.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from tabulate import tabulate
from tqdm import tqdm

import preprocess
import run_tokenflow_pnp as pnp
from scripts.demo import inversion_options
from scripts.shapes.metrics import (
    Judge,
    attributes,
    background_psnr,
    color_shape_background,
    hue_of_object,
    warp_error,
)
from scripts.shapes.pictures import HELD_OUT, SIZE
from scripts.shapes.world import (
    SAMPLE_FRAMES,
    Scene,
    another_color,
    random_scene,
    recolored,
    render,
    render_clip,
)
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
from tokenflow.storage.images import load_frames, save_frames
from tokenflow.storage.reports import check_report_path, write_reports
from tokenflow.storage.schema import parse
from tokenflow.storage.yaml_files import load_yaml
from util import (
    ArgumentParser,
    UserError,
    check_writable,
    command_line,
    setup_logging,
)

ROOT = Path(__file__).resolve().parents[2]

log = logging.getLogger("tokenflow")

CONFIG = "configs/demo_pnp.yaml"
FPS = Fraction(10)
SEED = 4_000_000
QUICK = {"n_inversion_steps": 7, "n_timesteps": 7, "n_frames": 3, "batch_size": 2}
METHODS = {
    "tokenflow": {},
    "fixed_keyframes": {"keyframes": "fixed"},
    "extended_attention": {"consistency": "extended_attention"},
    "per_frame": {"consistency": "none"},
}
MEASURED = ("color", "shape", "background")  # what color_shape_background tells
ORDER = ("vae", *METHODS)  # of the warp errors in the paper's Table 1


def accuracies(
    names: Sequence[str], told: Sequence[tuple], true: Sequence[tuple]
) -> dict[str, float]:
    """The share of right answers for each attribute."""
    right = (np.array(told) == np.array(true)).mean(axis=0)
    return {f"{name}_accuracy": float(share) for name, share in zip(names, right, strict=True)}


# ---------------------------------------------------------------------------------- text to image


def check_text_to_image(
    models: StableDiffusion,
    model: Path,
    judge: Judge,
    config: Mapping[str, Any],
    count: int,
    seed: int,
) -> dict:
    """Sample pictures of unseen scenes' captions, and say how many show what they should.

    The accuracies of the measurement and of the judge themselves are those on the scenes'
    renderings, as the VAE reconstructs them.

    Args:
        models: of the folder `model`.
        config: of an edit; its guidance and number of steps are used.
    """
    scenes = [random_scene(seed + i, n_objects=1) for i in range(count)]
    true = [attributes(scene) for scene in scenes]
    rendered = np.stack([render(scene, 0.5, (SIZE, SIZE))[0] for scene in scenes])
    pipe = StableDiffusionPipeline(
        vae=models.vae,
        text_encoder=models.text_encoder,
        tokenizer=models.tokenizer,
        unet=models.unet,
        scheduler=DDIMScheduler.from_pretrained(model / "scheduler"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator(models.device).manual_seed(seed)
    sampled = []
    for first in tqdm(range(0, count, 20), "text to image"):
        images = pipe(
            [scene.caption for scene in scenes[first : first + 20]],
            guidance_scale=config["guidance_scale"],
            num_inference_steps=config["n_timesteps"],
            generator=generator,
            output_type="np",
        ).images
        sampled.append((images * 255).round().astype(np.uint8))
    drawn = np.concatenate(sampled)
    decoded = decode_latents(models, encode_frames(models, rendered))
    answers = [answer[1:] for answer in true]
    judged = ("fill", *MEASURED)
    return {
        **accuracies(MEASURED, list(map(color_shape_background, drawn)), answers),
        "fill_accuracy": accuracies(judged, judge(drawn), true)["fill_accuracy"],
        "measurement": accuracies(MEASURED, list(map(color_shape_background, decoded)), answers),
        "judge": accuracies(judged, judge(decoded), true),
    }


# ------------------------------------------------------------------------------------------ clips


@dataclass(frozen=True)
class ClipCheck:
    """With what the clips are checked, and where their caches and edits are kept."""

    models: StableDiffusion
    model: Path
    work: Path
    device: str
    config: Mapping[str, Any]  # of the demo's edit
    accuracy_steps: int  # of the inversions whose accuracy is measured, apart from the edits'
    accuracy_frames: int  # of those inversions

    def __call__(self, seed: int) -> dict:
        """Invert and edit the clip of a scene with one object, and measure the results."""
        scene = random_scene(seed, n_objects=1)
        clip = render_clip(scene, SAMPLE_FRAMES, SIZE)
        source = self.work / "clips" / f"{seed}"
        save_frames(source, clip.frames)
        target = another_color(scene)
        n_frames = self.config["n_frames"]
        true = clip.frames[:n_frames]
        decoded = decode_latents(self.models, encode_frames(self.models, true))

        options = inversion_options(self.config)
        self._invert(source, scene, "latents", options)
        options |= {"n_frames": self.accuracy_frames}
        options |= {"steps": self.accuracy_steps, "save_steps": self.accuracy_steps}
        options |= {"no_cache_features": ""}
        plain = self._invert(source, scene, "plain", {**options, "inversion_iters": 1})
        refined = self._invert(source, scene, "refined", {**options, "inversion_iters": 5})
        edited = {name: self._edit(source, scene, target, name) for name in METHODS}
        frames, masks = edited["tokenflow"], clip.masks[:n_frames]
        found = [hue_of_object(f, m > 0) for f, m in zip(frames, masks, strict=True)]
        return {
            "seed": seed,
            "caption": scene.caption,
            "target": target,
            "vae_psnr": psnr(decoded, true),
            "inversion_vae_psnr": plain.vae_psnr,
            "inversion_psnr": plain.psnr,
            "inversion_iters_5_psnr": refined.psnr,
            "edit_color_success": float(np.mean([color == target for color in found])),
            "background_psnr": background_psnr(frames, decoded, masks, self.models.vae_factor),
            "warp_error": {
                "source": warp_error(true, clip),
                "vae": warp_error(decoded, clip),
                **{name: warp_error(frames, clip) for name, frames in edited.items()},
            },
        }

    def _invert(
        self, source: Path, scene: Scene, save_dir: str, options: Mapping[str, object]
    ) -> Manifest:
        options = {
            **options,
            "data_path": source,
            "save_dir": self.work / save_dir,
            "model_key": self.model,
            "fps": FPS,
            "inversion_prompt": scene.caption,
            "device": self.device,
        }
        return open_cache(preprocess.preprocess(preprocess.parse_args(arguments(options)))).manifest

    def _edit(self, source: Path, scene: Scene, target: str, method: str) -> np.ndarray:
        settings = {
            **self.config,
            "data_path": str(source),
            "model_key": str(self.model),
            "latents_path": str(self.work / "latents"),
            "output_path": str(self.work / "results"),
            "prompt": recolored(scene, target),
            "negative_prompt": scene.caption,
            "device": self.device,
            **METHODS[method],
        }
        config = parse(pnp.PnPConfig, settings, f"{CONFIG} for {source}")
        return load_frames(pnp.edit(config) / "frames")


def summary(clips: Sequence[dict]) -> dict:
    """The clips' means."""
    names = [name for name, value in clips[0].items() if isinstance(value, float)]
    means = {name: float(np.mean([clip[name] for clip in clips])) for name in names}
    methods = clips[0]["warp_error"]
    means["warp_error"] = {
        name: float(np.mean([clip["warp_error"][name] for clip in clips])) for name in methods
    }
    return means


def _short_names(accuracy: Mapping[str, float]) -> list[tuple[str, float]]:
    return [(name.removesuffix("_accuracy"), value) for name, value in accuracy.items()]


def table(figures: dict) -> str:
    """The figures in rows, with the required values, for the terminal."""
    percent, decibel = "{:.1f} %".format, "{:.2f} dB".format
    frames, steps = figures["accuracy_frames"], figures["accuracy_steps"]
    vae = figures["inversion_vae_psnr"]
    rows = [
        ("text to image: colour", percent(100 * figures["color_accuracy"]), ">= 95 %"),
        ("text to image: shape", percent(100 * figures["shape_accuracy"]), ">= 90 %"),
        ("text to image: background", percent(100 * figures["background_accuracy"]), ">= 90 %"),
        ("text to image: fill", percent(100 * figures["fill_accuracy"]), ""),
        *(
            (f"  the {by} on ground truth: {name}", percent(100 * value), "")
            for by in ("measurement", "judge")
            for name, value in _short_names(figures[by])
        ),
        ("VAE reconstruction", decibel(figures["vae_psnr"]), ">= 30 dB"),
        (f"the same, first {frames} frames", decibel(vae), ""),
        (
            f"their inversion, {steps} steps",
            decibel(figures["inversion_psnr"]),
            f">= {decibel(vae - 3)}",
        ),
        (
            "  with --inversion_iters 5",
            decibel(figures["inversion_iters_5_psnr"]),
            f">= {decibel(vae - 0.5)}",
        ),
        ("frames in the colour asked for", percent(100 * figures["edit_color_success"]), ">= 90 %"),
        ("background against the VAE's", decibel(figures["background_psnr"]), ">= 22 dB"),
        *(
            (f"warp error x1e-3: {name.replace('_', ' ')}", f"{value:.2f}", "")
            for name, value in figures["warp_error"].items()
        ),
    ]
    lines = [tabulate(rows, ("", "measured", "asked"), "plain", colalign=("left", "right", "left"))]
    order = sorted(ORDER, key=figures["warp_error"].get)
    held = "holds" if order == list(ORDER) else f"does not hold, but {' < '.join(order)}"
    lines.append(f"The paper's order, {' < '.join(ORDER)}: {held}".replace("_", " "))
    return "\n".join(lines)


def code_version() -> str:
    """12 hex digits that change with any code of the repository."""
    digest = hashlib.sha256()
    for pattern in ("*.py", "tokenflow/**/*.py", "scripts/**/*.py"):
        for path in sorted(ROOT.glob(pattern)):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def main(argv: Sequence[str] | None = None) -> dict:
    """Run the script; returns the figures."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", type=Path, default=Path("models/tiny"), help="(default: models/tiny)")
    add("--clips", type=int, default=20, help="number of clips to edit (default: 20)")
    add("--pictures", type=int, default=200, help="to sample from text (default: 200)")
    add("--seed", type=int, default=SEED, help=f"of the first scene (default: {SEED})")
    add("--json", type=Path, metavar="FILE", help="write the figures there too; -: to stdout")
    work = Path("tokenflow-results/check_tiny")
    add("--work", type=Path, default=work, help=f"for caches and edits (default: {work})")
    add("--quick", action="store_true", help="few frames and steps: shows that it runs")
    add("--device", default="auto", help="auto, cpu, cuda, ... (default: auto)")
    args = parser.parse_args(argv)
    for name, low in (("clips", 1), ("pictures", 1), ("seed", HELD_OUT)):
        if getattr(args, name) < low:
            raise UserError(f"--{name}: expected at least {low}, got {getattr(args, name)}")
    setup_logging()
    check_writable(args.work, "--work")
    if args.json:
        check_report_path(args.json, "--json")
    device = resolve_device(args.device)
    models = load_stable_diffusion(
        checkpoint_folder(str(args.model)), device, resolve_dtype("auto", device)
    )
    quick = QUICK if args.quick else {}
    config = load_yaml(ROOT / CONFIG) | quick

    accuracy = {"accuracy_steps": 10 if args.quick else 50}
    accuracy |= {"accuracy_frames": 1 if args.quick else 2}
    # Like a picture from text, it has no negative prompt.
    sdedit = load_yaml(ROOT / "configs/demo_sdedit.yaml") | quick
    judge = Judge(args.model / "judge", device)
    figures = check_text_to_image(models, args.model, judge, sdedit, args.pictures, args.seed)
    # Another model's caches and edits would be refused: each model has a folder.
    version = f"{checkpoint_revision(args.model)}_{code_version()}"
    check = ClipCheck(models, args.model, args.work / version, args.device, config, **accuracy)
    clips = []
    for number in range(args.clips):
        clips.append(check(args.seed + number))
        log.info("clip %d of %d: %s", number + 1, args.clips, json.dumps(clips[-1]))
    figures |= {**accuracy, "quick": args.quick, **summary(clips), "clips": clips}
    reports = [(args.json, json.dumps(figures, indent=2) + "\n")] if args.json else []
    write_reports(table(figures), reports)
    return figures


if __name__ == "__main__":
    command_line(main)
