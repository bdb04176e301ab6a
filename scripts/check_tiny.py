"""Measure what the small model of models/tiny can do, on scenes that it was not trained on.

    python scripts/check_tiny.py --clips 20 --json check.json

Every clip is inverted and edited by the project's own scripts at the demo's settings, to another
colour, by TokenFlow and by each of the paper's ablations (its Table 1); the world's ground truth
(masks, optical flow, occlusions) says how well. What text-to-image samples show is told by the
model's own judge, a CLIP model, whose accuracy on rendered pictures is measured too. Finished
clips are kept in the work folder and not made again.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from tqdm import tqdm

# Scripts in this folder are run from the repository root, which Python does not search by itself.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from demo import INVERSION, SIZE, arguments
from shapes_metrics import Judge, attributes, background_psnr, hue_of_object, warp_error
from shapes_world import COLORS, Scene, random_scene, render, render_clip

import preprocess
import run_tokenflow_pnp as pnp
from checkpoints import checkpoint_folder, checkpoint_revision
from diffusion import (
    StableDiffusion,
    decode_latents,
    encode_frames,
    load_stable_diffusion,
    psnr,
    resolve_device,
)
from edit_inputs import open_inputs, read_config
from editing import run_edit
from source_cache import Manifest, open_cache
from util import (
    ArgumentParser,
    UserError,
    atomic_file,
    check_writable,
    command_line,
    setup_logging,
)
from video import load_frames, save_frames

log = logging.getLogger("tokenflow")

CONFIG = "configs/demo_pnp.yaml"
FPS = Fraction(10)
# The accuracy of the inversion is measured apart from the edits, over more steps and fewer frames.
ACCURACY_STEPS = 50
ACCURACY_FRAMES = 4
METHODS = {
    "tokenflow": [],
    "fixed_keyframes": ["keyframes=fixed"],
    "extended_attention": ["consistency=extended_attention"],
    "per_frame": ["consistency=none"],
}


def accuracies(told: Sequence[tuple], true: Sequence[tuple]) -> dict[str, float]:
    """The share of right answers for each attribute."""
    right = (np.array(told) == np.array(true)).mean(axis=0)
    names = ("fill_accuracy", "color_accuracy", "shape_accuracy", "background_accuracy")
    return {name: float(share) for name, share in zip(names, right, strict=True)}


# ---------------------------------------------------------------------------------- text to image


def check_text_to_image(
    folder: Path, judge: Judge, device: torch.device, count: int, seed: int
) -> dict:
    """Sample pictures of unseen scenes' captions, and have them judged beside rendered ones."""
    scenes = [random_scene(seed + i, n_objects=1) for i in range(count)]
    true = [attributes(scene) for scene in scenes]
    rendered = np.stack([render(scene, 0.5, (SIZE, SIZE))[0] for scene in scenes])

    pipe = StableDiffusionPipeline.from_pretrained(
        folder, safety_checker=None, torch_dtype=torch.float32
    ).to(device)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator(device).manual_seed(seed)
    sampled = []
    for first in tqdm(range(0, count, 20), "text to image"):
        captions = [scene.caption for scene in scenes[first : first + 20]]
        images = pipe(
            captions, guidance_scale=7.5, num_inference_steps=25, generator=generator,
            output_type="np",
        ).images  # fmt: skip
        sampled.append((images * 255).round().astype(np.uint8))
    return {
        **accuracies(judge(np.concatenate(sampled)), true),
        "judge": accuracies(judge(rendered), true),
    }


# ------------------------------------------------------------------------------------------ clips


@dataclass(frozen=True)
class ClipCheck:
    """With what the clips are checked, and where their caches and edits are kept."""

    models: StableDiffusion
    model: Path
    work: Path
    device: str
    inversion: Mapping[str, object] = field(default_factory=lambda: INVERSION)
    settings: tuple[str, ...] = ()  # of every edit, over the config's
    methods: Sequence[str] = tuple(METHODS)
    accuracy_steps: int = ACCURACY_STEPS
    accuracy_frames: int = ACCURACY_FRAMES

    def __call__(self, seed: int) -> dict:
        """Invert and edit the clip of a scene with one object, and measure what comes of it."""
        scene = random_scene(seed, n_objects=1)
        clip = render_clip(scene, self.inversion["n_frames"], SIZE)
        source = self.work / "clips" / f"{seed}"
        if not source.exists():
            save_frames(source, clip.frames)
        target = another_color(scene)
        decoded = decode_latents(self.models, encode_frames(self.models, clip.frames))

        self._invert(source, scene, "latents", self.inversion)
        accuracy = {**self.inversion, "n_frames": self.accuracy_frames}
        accuracy |= {"steps": self.accuracy_steps, "save_steps": self.accuracy_steps}
        plain = self._invert(source, scene, "plain", {**accuracy, "inversion_iters": 1})
        refined = self._invert(source, scene, "refined", {**accuracy, "inversion_iters": 5})
        edited = {name: self._edit(source, scene, target, name) for name in self.methods}
        frames = edited["tokenflow"]
        found = [hue_of_object(f, m > 0) for f, m in zip(frames, clip.masks, strict=True)]
        return {
            "seed": seed,
            "caption": scene.caption,
            "target": target,
            "vae_psnr": psnr(decoded, clip.frames),
            "inversion_vae_psnr": plain.vae_psnr,
            "inversion_psnr": plain.psnr,
            "inversion_iters_5_psnr": refined.psnr,
            "edit_color_success": float(np.mean([color == target for color in found])),
            "background_psnr": background_psnr(frames, decoded, clip.masks),
            "warp_error": {
                "source": warp_error(clip.frames, clip),
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
        color = scene.objects[0].color
        settings = [
            f"data_path={source}",
            f"model_key={self.model}",
            f"latents_path={self.work / 'latents'}",
            f"output_path={self.work / 'results'}",
            f"prompt={scene.caption.replace(color, target, 1)}",
            f"device={self.device}",
            *self.settings,
            *METHODS[method],
        ]
        words = [word for setting in settings for word in ("--set", setting)]
        config, _ = read_config(pnp.PnPConfig, ["--config", CONFIG, *words], CONFIG, "")
        folder = run_edit(pnp.TECHNIQUE, open_inputs(config), pnp.plan)
        return load_frames(folder / "frames")


def another_color(scene: Scene) -> str:
    """A colour for the object of a scene: the next that is neither its own nor the background's."""
    first = COLORS.index(scene.objects[0].color) + 1
    turned = [*COLORS[first:], *COLORS[:first]]
    return next(color for color in turned if color != scene.background)


def summary(clips: Sequence[dict]) -> dict:
    """The clips' means."""
    names = [name for name, value in clips[0].items() if isinstance(value, float)]
    means = {name: float(np.mean([clip[name] for clip in clips])) for name in names}
    methods = clips[0]["warp_error"]
    means["warp_error"] = {
        name: float(np.mean([clip["warp_error"][name] for clip in clips])) for name in methods
    }
    return means


def table(figures: dict) -> str:
    """The figures in rows, for the terminal."""
    percent = "{:6.1f} %".format
    rows = [
        ("text to image: colour", percent(100 * figures["color_accuracy"])),
        ("text to image: shape", percent(100 * figures["shape_accuracy"])),
        ("text to image: background", percent(100 * figures["background_accuracy"])),
        ("text to image: fill", percent(100 * figures["fill_accuracy"])),
    ]
    rows += [
        (f"the judge on rendered pictures: {name.removesuffix('_accuracy')}", percent(100 * value))
        for name, value in figures["judge"].items()
    ]
    decibel = "{:6.2f} dB".format
    rows += [
        ("VAE reconstruction", decibel(figures["vae_psnr"])),
        (f"the same, first {ACCURACY_FRAMES} frames", decibel(figures["inversion_vae_psnr"])),
        (f"their inversion, {ACCURACY_STEPS} steps", decibel(figures["inversion_psnr"])),
        ("  with --inversion_iters 5", decibel(figures["inversion_iters_5_psnr"])),
        ("frames with the colour asked for", percent(100 * figures["edit_color_success"])),
        ("background against the VAE's", decibel(figures["background_psnr"])),
    ]
    rows += [
        (f"warp error x1e-3: {name.replace('_', ' ')}", f"{value:6.2f}")
        for name, value in figures["warp_error"].items()
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", type=Path, default=Path("models/tiny"), help="(default: models/tiny)")
    add("--clips", type=int, default=20, help="number of clips to edit (default: 20)")
    add("--pictures", type=int, default=200, help="to sample from text (default: 200)")
    add("--seed", type=int, default=1_000_000, help="of the first scene (default: 1000000)")
    add("--json", type=Path, metavar="FILE", help="write the figures there too")
    add("--work", type=Path, default=Path("tokenflow-results/check_tiny"), help="for caches, edits")
    add("--device", default="auto")
    args = parser.parse_args(argv)
    for name, low in (("clips", 1), ("pictures", 1), ("seed", 0)):
        if getattr(args, name) < low:
            raise UserError(f"--{name}: expected at least {low}, got {getattr(args, name)}")
    setup_logging()
    check_writable(args.work, "--work")
    device = resolve_device(args.device)
    models = load_stable_diffusion(checkpoint_folder(str(args.model)), device, torch.float32)
    judge = Judge(args.model / "judge", device)

    figures = check_text_to_image(args.model, judge, device, args.pictures, args.seed)
    # Another model's caches and edits would be refused: each model has a folder.
    work = args.work / checkpoint_revision(args.model).rpartition(":")[2][:12]
    check = ClipCheck(models, args.model, work, args.device)
    clips = []
    for number in range(args.clips):
        clips.append(check(args.seed + number))
        log.info("clip %d of %d: %s", number + 1, args.clips, json.dumps(clips[-1]))
    figures |= summary(clips) | {"clips": clips}
    if args.json:
        with atomic_file(args.json) as temporary:
            temporary.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(table(figures))


if __name__ == "__main__":
    command_line(main)
