"""The measures of FiVE-Bench (Li et al., ICCV 2025) that need CLIP and a DINO ViT at most.

They are defined by its published scorer: each is a mean over frames, and pictures whose edited
part is left out are black there, as black pixels count. evaluate.py's own measures pool the pixels
of a clip, and leave out what a mask leaves out. `structure_distance` is of pixels in [0, 255]
normalised as if they were in [0, 1]: so the scorer does it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from types import SimpleNamespace

import numpy as np
import torch
from torchvision.transforms.v2 import functional as transforms

from tokenflow.evaluation.metrics import ClipEmbedder, DinoKeys, ssim_map, structure_distance

# What the scorer multiplies a measure by in its table of means.
SCALES = {
    "structure_distance": 1e3,
    "psnr_unedit_part": 1.0,
    "mse_unedit_part": 1e4,
    "ssim_unedit_part": 1e2,
    "clip_similarity_source_image": 1.0,
    "clip_similarity_target_image": 1.0,
    "clip_similarity_target_image_edit_part": 1.0,
}
CLIP_MODEL, DINO_MODEL = "openai/clip-vit-large-patch14", "facebook/dino-vitb8"
DINO_SIDE, DINO_LONGEST = 224, 480  # pixels: of the short side, and at most of the long one
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and deviation


def measures(
    edited: np.ndarray,
    source: np.ndarray,
    masks: np.ndarray,
    source_prompt: str,
    target_prompt: str,
    clip: ClipEmbedder | None,
    dino: DinoKeys | None,
) -> dict[str, float | None]:
    """The measures of SCALES, without its factors; None where no frame has such a part.

    Args:
        edited, source: (n, H, W, 3) uint8 RGB.
        masks: (n, H, W) bool, True where the edit is meant to be.
        clip: embeds pictures and prompts; None leaves its measures out.
        dino: prepared by `prepare_dino`; None leaves its measure out.
    """
    parts = list(_unedited(edited, source, masks))
    errors = [float(np.square(a / 255.0 - b / 255.0).mean()) for a, b in parts]
    found = {
        "psnr_unedit_part": _mean([-10 * math.log10(e) if e else math.inf for e in errors]),
        "mse_unedit_part": _mean(errors),
        "ssim_unedit_part": _mean([float(ssim_map(a, b).mean()) for a, b in parts]),
    }
    if clip is not None:
        inside = masks.any(axis=(1, 2))
        shown = edited[inside] * masks[inside][..., None]
        found |= {
            "clip_similarity_source_image": _clip(clip, source, source_prompt),
            "clip_similarity_target_image": _clip(clip, edited, target_prompt),
            "clip_similarity_target_image_edit_part": _clip(clip, shown, target_prompt),
        }
    if dino is not None:
        found["structure_distance"] = structure_distance(dino(edited), dino(source))
    return {name: found[name] for name in SCALES if name in found}


def prepare_dino(dino: DinoKeys) -> DinoKeys:
    """Lets a ViT see pictures as the scorer's does."""
    dino.processor = _dino_pixels
    return dino


def _dino_pixels(images: Sequence[np.ndarray], return_tensors: str) -> SimpleNamespace:
    """Takes the place of an image processor: (n, H, W, 3) uint8 to (n, 3, h, w) float32."""
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float()
    pixels = transforms.resize(pixels, [DINO_SIDE], max_size=DINO_LONGEST, antialias=True)
    return SimpleNamespace(pixel_values=transforms.normalize(pixels, *IMAGENET))


def _unedited(
    edited: np.ndarray, source: np.ndarray, masks: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Both pictures of each frame that has pixels outside of its mask, black inside of it."""
    for a, b, mask in zip(edited, source, masks, strict=True):
        if not mask.all():
            yield a * ~mask[..., None], b * ~mask[..., None]


def _clip(clip: ClipEmbedder, frames: np.ndarray, text: str) -> float | None:
    """The mean over frames of 100 times the cosine with a text, of which 0 is the least."""
    if not len(frames):
        return None
    cosines = clip.embed_frames(frames) @ clip.embed_text(text)
    return float((100 * cosines).clamp(min=0).mean())


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
