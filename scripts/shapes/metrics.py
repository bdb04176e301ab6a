"""What pictures and clips of the shapes world show: by their pixels, by the world's ground truth,
and by the judge.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import torch

from scripts.shapes import world
from tokenflow.diffusion.vae import psnr
from tokenflow.evaluation import metrics
from tokenflow.evaluation.motion import Motion

LEAST_CHROMA = 20  # of a pixel with a hue, of 255: its distance from the grey of its brightness
ATTRIBUTES = ("fill", "color", "shape", "background", "surface")
LEAST_AREA = 0.01  # of an object, as a share of the frame
RIM = 6  # pixels along a frame's edges that are background


def hue_of_object(frame: np.ndarray, mask: np.ndarray) -> str:
    """The colour name whose hue most pixels of the mask are nearest to, or "gray".

    Hues are compared by the angle between the colours less their grey, so that neither the light
    nor a pattern's second tone, which is paler, counts. Pixels of less chroma than LEAST_CHROMA
    are gray.

    Args:
        frame: (H, W, 3) uint8 RGB.
        mask: (H, W) bool, not empty.
    """
    return (*world.COLORS, "gray")[int(np.bincount(_nearest_hues(frame[mask])).argmax())]


def _nearest_hues(pixels: np.ndarray) -> np.ndarray:
    """The number in COLORS of the nearest hue to each of (..., 3) pixels; after the last: gray."""
    hues = np.array([world.HUES[name] for name in world.COLORS])
    hues = hues - hues.mean(axis=1, keepdims=True)
    hues /= np.linalg.norm(hues, axis=1, keepdims=True)
    chroma = pixels - pixels.mean(axis=-1, keepdims=True)
    is_gray = np.linalg.norm(chroma, axis=-1) < LEAST_CHROMA
    return np.where(is_gray, len(world.COLORS), (chroma @ hues.T).argmax(axis=-1))


def color_shape_background(frame: np.ndarray) -> tuple[str, str, str]:
    """What a picture of one object shows, measured without any model.

    The background's colour is that of the frame's rim; the object is what is of another hue.

    Args:
        frame: (H, W, 3) uint8 RGB.

    Returns:
        Colour, shape and background. The colour is "none" where there is no object, the shape
        where it is none of the world's or not the only one.
    """
    background, mask = _off_background(frame)
    shape, inside, alone = _largest(mask)
    if inside is None:
        return "none", "none", background
    return hue_of_object(frame, inside > 0), shape if alone else "none", background


def color_shapes(frame: np.ndarray) -> dict[str, str]:
    """The objects that a picture shows, by their colours, as `color_shape_background` finds one.

    Args:
        frame: (H, W, 3) uint8 RGB.

    Returns:
        The shape of each colour but the background's that has LEAST_AREA of the frame; "none"
        where it is no shape of the world, or there are several.
    """
    background, mask = _off_background(frame)
    found = {}
    nearest = np.where(mask, _nearest_hues(frame), -1)
    for number, color in enumerate(world.COLORS):
        shape, inside, alone = _largest((nearest == number).astype(np.uint8))
        if color != background and inside is not None and inside.mean() > LEAST_AREA:
            found[color] = shape if alone else "none"
    return found


def _off_background(frame: np.ndarray) -> tuple[str, np.ndarray]:
    """The colour of a frame's rim, and where the frame is of another hue, (H, W) uint8, 0 or 1."""
    rim = np.ones(frame.shape[:2], bool)
    rim[RIM:-RIM, RIM:-RIM] = False
    ground = np.median(frame[rim], axis=0)
    background = hue_of_object(ground.astype(np.uint8)[None, None], np.ones((1, 1), bool))
    # The light changes along the background's own colour; what is off that line is no background.
    unit = ground / max(np.linalg.norm(ground), 1.0)
    pixels = frame.astype(np.float32)
    off = np.linalg.norm(pixels - (pixels @ unit)[..., None] * unit, axis=-1)
    return background, (off > max(LEAST_CHROMA, 4 * np.median(off[rim]))).astype(np.uint8)


def _largest(mask: np.ndarray) -> tuple[str, np.ndarray | None, bool]:
    """The shape of a mask's largest part, that part (None: there is none), and whether it is nearly
    all of the mask.
    """
    mask = cv2.morphologyEx(mask, cv2.MORPH_OPEN, np.ones((3, 3), np.uint8))
    contours, nesting = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    if not contours:
        return "none", None, False
    areas = np.array([cv2.contourArea(contour) for contour in contours])
    parents = nesting[0, :, 3]
    outer = np.where(parents < 0, areas, 0)
    number = int(outer.argmax())
    inside = cv2.drawContours(np.zeros_like(mask), contours, number, 1, cv2.FILLED) & mask
    shape = _shape(contours[number], holes=areas[parents == number].sum())
    return shape, inside, bool(outer.sum() <= 1.2 * outer[number])


def _shape(outline: np.ndarray, holes: float) -> str:
    """The shape of an outline, told by how much it fills of its hull and of the smallest shapes
    around it; `holes` is the area of the holes in it. "none" if it is no shape of the world.
    """
    area = max(cv2.contourArea(outline), 1.0)
    is_round = area > 0.85 * np.pi * cv2.minEnclosingCircle(outline)[1] ** 2
    if holes > 0.05 * area:
        return "ring" if is_round else "none"
    if is_round:
        return "circle"
    if area < 0.8 * cv2.contourArea(cv2.convexHull(outline)):
        return "star"
    if area > 0.85 * cv2.minEnclosingTriangle(outline)[0]:
        return "triangle"
    sides = sorted(cv2.minAreaRect(outline)[1])
    is_square = area > 0.85 * sides[0] * sides[1] and sides[0] > 0.75 * sides[1]
    return "square" if is_square else "none"


def true_motion(clip: world.ShapesClip, n_frames: int | None = None) -> Motion:
    """The ground truth of how a clip's first n_frames move (None: all), at least 2."""
    pairs = [clip.flow(i, i - 1) for i in range(1, n_frames or len(clip.frames))]
    flow, visible = (torch.from_numpy(np.stack(parts)) for parts in zip(*pairs, strict=True))
    return Motion(flow.permute(0, 3, 1, 2).contiguous(), visible)


def warp_error(frames: np.ndarray, clip: world.ShapesClip) -> float:
    """`metrics.warp_error` along a clip's true motion.

    Args:
        frames: (n, H, W, 3) uint8 RGB, n >= 2, edited or not: the clip's first.
        clip: the source's ground truth.
    """
    return metrics.warp_error(frames, true_motion(clip, len(frames)))


def background_psnr(
    frames: np.ndarray, reference: np.ndarray, masks: np.ndarray, margin: int
) -> float:
    """PSNR in dB over all pixels more than a margin (a latent cell, say) away from the objects.

    Args:
        frames, reference: (n, H, W, 3) uint8.
        masks: (n, H, W), 0 is background.
    """
    kernel = np.ones((2 * margin + 1, 2 * margin + 1), np.uint8)
    outside = np.stack([cv2.dilate(np.minimum(mask, 1), kernel) == 0 for mask in masks])
    return psnr(frames[outside], reference[outside])


class Judge:
    """The model's CLIP, asked which caption of a scene with one object fits a picture best.

    Args:
        surfaces: of the captions' backgrounds; world.py's have none ("").

    Raises:
        UserError: the folder holds no CLIP model.
    """

    def __init__(self, folder: Path, device: torch.device, surfaces: Sequence[str] = ("",)) -> None:
        self.clip = metrics.ClipEmbedder(folder, device)
        every = itertools.product(
            world.FILLS, world.COLORS, world.SHAPES, world.BACKGROUNDS, surfaces
        )
        self.choices = [choice for choice in every if choice[1] != choice[3]]
        captions = (world.caption_of([choice[:3]], *choice[3:]) for choice in self.choices)
        self.texts = torch.stack([self.clip.embed_text(caption) for caption in captions], dim=1)

    def __call__(self, frames: np.ndarray) -> list[tuple[str, ...]]:
        """The ATTRIBUTES of each of (n, H, W, 3) uint8 frames."""
        best = (self.clip.embed_frames(frames) @ self.texts).argmax(dim=1)
        return [self.choices[number] for number in best.tolist()]


def attributes(scene: world.Scene) -> tuple[str, ...]:
    """The ATTRIBUTES of a scene's first object and its background."""
    thing = scene.objects[0]
    return thing.fill, thing.color, thing.shape, scene.background, scene.surface
