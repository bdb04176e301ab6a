"""What several test files need: clips, caches of them, and what lies in a folder."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

import preprocess
from scripts.shapes.world import random_scene, render_clip
from tokenflow.cache.options import arguments
from tokenflow.storage.video import save_video
from tokenflow.storage.yaml_files import save_yaml

HEIGHT, WIDTH = 48, 80  # latents of 6x10: no square, and odd sizes deeper in the UNet
TEMPORAL_WIDTHS = [32, 32, 32, 32]  # of a temporal decoder: equal, as the tiny model's VAE's are


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Seeded normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def shapes_frames(n_frames: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    """A clip's frames, (n_frames, height, width, 3) uint8."""
    return render_clip(random_scene(seed), n_frames, (height, width)).frames


def make_clip(path: Path, n_frames: int = 5, seed: int = 0, fps: Fraction | int = 10) -> Path:
    """Write a video of HEIGHT x WIDTH."""
    save_video(path, shapes_frames(n_frames, HEIGHT, WIDTH, seed), Fraction(fps))
    return path


def make_image_folder(folder: Path, n_frames: int = 3) -> Path:
    """Write a folder of images, named as DAVIS names them."""
    folder.mkdir(parents=True)
    for i, frame in enumerate(shapes_frames(n_frames, HEIGHT, WIDTH, seed=1)):
        Image.fromarray(frame).save(folder / f"{i:05d}.jpg")
    return folder


def preprocess_words(clip: Path, save_dir: Path, model: Path, **options: object) -> list[str]:
    """preprocess.py's command line for a clip in few steps on the CPU, without features."""
    small = {"n_frames": 5, "H": HEIGHT, "W": WIDTH, "steps": 10, "save_steps": 5, "device": "cpu"}
    if "cache_features" not in options:
        small["no_cache_features"] = ""
    return arguments(
        small | {"data_path": clip, "save_dir": save_dir, "model_key": model, **options}
    )


def invert(clip: Path, save_dir: Path, model: Path, **options: object) -> Path:
    """Preprocess a clip with `preprocess_words`; returns the cache's folder."""
    words = preprocess_words(clip, save_dir, model, **options)
    return preprocess.preprocess(preprocess.parse_args(words))


def edit_keys(folder: Path, model: Path, **changes: object) -> dict:
    """The keys of a small edit of clip.mp4 and latents/ in a folder, as `invert` writes them."""
    return {
        "data_path": str(folder / "clip.mp4"),
        "latents_path": str(folder / "latents"),
        "output_path": str(folder / "results"),
        "model_key": str(model),
        "n_inversion_steps": 10,
        "n_timesteps": 5,
        "n_frames": 5,
        "prompt": "a green star",
        "keyframe_interval": 3,
        "device": "cpu",
        **changes,
    }


def edit(script, clip: Path, model: Path, **changes: object) -> Path:
    """Edit a clip whose cache is in latents/ next to it by a run script; the result's folder."""
    config = clip.with_suffix(".yaml")
    save_yaml(config, edit_keys(clip.parent, model, data_path=str(clip), **changes))
    return script.main(["--config", str(config)])


def write_list(model: Path, **changes: object) -> Path:
    """Write list.yaml for a batch: small edits of clips `a` and `b`."""
    small = {"n_frames": 3, "n_inversion_steps": 2, "n_timesteps": 2, "keyframe_interval": 2}
    given = {
        "settings": {"model_key": str(model), "H": HEIGHT, "W": WIDTH, "device": "cpu", **small},
        "prompts": ["a {clip} of marble"],
        "clips": [{"data_path": "a"}, {"data_path": "b"}],
    }
    save_yaml("list.yaml", given | changes)
    return Path("list.yaml")


def contents(folder: Path) -> dict[str, int]:
    """All that lies in a folder, and when files last changed: equal if none was written."""
    return {
        str(path.relative_to(folder)): path.stat().st_mtime_ns if path.is_file() else 0
        for path in folder.rglob("*")
    }


def video_facts(path: Path) -> tuple[int, Fraction, tuple[int, int]]:
    """Decode a video: its number of frames, frame rate, and (height, width)."""
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
        rate = container.streams.video[0].average_rate
    return len(frames), rate, (frames[0].height, frames[0].width)


def no_model_may_load(*args: object) -> None:
    """Put this in the place of a loader that must not be reached."""
    pytest.fail("a model was loaded")


def forward(unet, frames=2, seed=0):
    """The prediction of a tiny UNet for some frames."""
    x = randn(frames, 4, 6, 10, seed=seed)
    text = randn(frames, 77, unet.config.cross_attention_dim, seed=seed + 1)
    with torch.no_grad():
        return unet(x, 500, encoder_hidden_states=text).sample


def pictures_of(figure):
    """The pictures of a figure, axis by axis."""
    return [np.asarray(axis.images[-1].get_array()) for axis in figure.axes]


def save_masks(folder: Path, masks: np.ndarray) -> None:
    """As DAVIS has them: PNG files whose palette's indices are the objects."""
    folder.mkdir(parents=True)
    for i, mask in enumerate(masks):
        image = Image.fromarray(mask, "P")
        image.putpalette([255, 255, 255, 128, 0, 0, 0, 128, 0])  # of background too, not black
        image.save(folder / f"{i:05d}.png")
