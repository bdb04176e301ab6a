"""What pictures and clips of the shapes world show: by its ground truth, and by the judge."""

from __future__ import annotations

import sys
from pathlib import Path

import cv2
import numpy as np
import torch
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

# Scripts in this folder are run from the repository root, which Python does not search by itself.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from shapes_world import BACKGROUNDS, COLORS, FILLS, HUES, SHAPES, Scene, ShapesClip

from diffusion import psnr


def hue_of_object(frame: np.ndarray, mask: np.ndarray) -> str:
    """The colour name whose hue most pixels of the mask are nearest to.

    Hues are compared by the angle between the colours less their grey, so that neither the light
    nor a pattern's second tone, which is paler, counts.

    Args:
        frame: (H, W, 3) uint8 RGB.
        mask: (H, W) bool, not empty.
    """
    votes = np.bincount(_nearest_hues(frame[mask]), minlength=len(HUES))
    return COLORS[int(votes.argmax())]


def _nearest_hues(pixels: np.ndarray) -> np.ndarray:
    """Numbers in COLORS, (n,), of (n, 3) uint8 RGB pixels."""
    hues = np.array([HUES[name] for name in COLORS])
    hues = hues - hues.mean(axis=1, keepdims=True)
    hues /= np.linalg.norm(hues, axis=1, keepdims=True)
    chroma = pixels - pixels.mean(axis=1, keepdims=True)
    return (chroma @ hues.T).argmax(axis=1)


def warp_error(frames: np.ndarray, clip: ShapesClip) -> float:
    """How much a clip changes along the true motion, x1e-3 (the paper's Table 1).

    The mean over consecutive frames of the squared difference, in RGB of [0, 1], between a frame
    and the one before it warped to it by the true flow, where the true occlusions allow.

    Args:
        frames: (n, H, W, 3) uint8 RGB, n >= 2, edited or not.
        clip: the source's ground truth.
    """
    rows, columns = np.mgrid[: frames.shape[1], : frames.shape[2]].astype(np.float32)
    errors = []
    for i in range(1, len(frames)):
        flow, visible = clip.flow(i, i - 1)
        before = frames[i - 1].astype(np.float32)
        warped = cv2.remap(
            before, columns + flow[..., 0], rows + flow[..., 1], cv2.INTER_LINEAR,
            borderMode=cv2.BORDER_REPLICATE,
        )  # fmt: skip
        errors.append((np.square(warped - frames[i])[visible] / 255.0**2).mean())
    return 1e3 * float(np.mean(errors))


def background_psnr(frames: np.ndarray, reference: np.ndarray, masks: np.ndarray) -> float:
    """PSNR in dB over all pixels more than a latent cell away from the objects."""
    kernel = np.ones((17, 17), np.uint8)
    outside = np.stack([cv2.dilate(np.minimum(mask, 1), kernel) == 0 for mask in masks])
    return psnr(frames[outside], reference[outside])


class Judge:
    """The model's CLIP, asked which caption of a scene with one object fits a picture best."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.processor = CLIPImageProcessor.from_pretrained(folder)
        self.model = CLIPModel.from_pretrained(folder).float().to(device).eval()
        self.choices = [
            (fill, color, shape, background)
            for fill in FILLS
            for color in COLORS
            for shape in SHAPES
            for background in BACKGROUNDS
            if background != color
        ]
        tokenizer = CLIPTokenizer.from_pretrained(folder)
        captions = [one_object_caption(*choice) for choice in self.choices]
        tokens = tokenizer(captions, padding="max_length", return_tensors="pt").input_ids
        self.tokens = tokens.to(device)

    @torch.inference_mode()
    def __call__(self, frames: np.ndarray) -> list[tuple[str, str, str, str]]:
        """Fill, colour, shape and background of each of (n, H, W, 3) uint8 frames."""
        pixels = self.processor(images=list(frames), return_tensors="pt").pixel_values
        similarity = self.model(
            input_ids=self.tokens, pixel_values=pixels.to(self.tokens.device)
        ).logits_per_image
        return [self.choices[best] for best in similarity.argmax(dim=1).tolist()]


def one_object_caption(fill: str, color: str, shape: str, background: str) -> str:
    fill = "" if fill == "plain" else f"{fill} "
    return f"a {fill}{color} {shape} on a {background} background"


def attributes(scene: Scene) -> tuple[str, str, str, str]:
    """Fill, colour, shape and background of a scene with one object."""
    thing = scene.objects[0]
    return thing.fill, thing.color, thing.shape, scene.background
