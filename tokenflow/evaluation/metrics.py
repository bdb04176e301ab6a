"""What an edited clip is measured by: pure functions of frames, and the CLIP and DINO models.

docs/evaluation.md defines each measure and says why it is taken so. A measure that is not defined
(one frame has no pairs, an empty mask no pixels) is None.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPModel,
    ViTModel,
)

from tokenflow.diffusion.checkpoints import for_inference, load_model, single_model_folder
from tokenflow.diffusion.optical_flow import warp
from tokenflow.evaluation.motion import Motion
from util import UserError

log = logging.getLogger("tokenflow")

CHUNK = 8  # frames that a model sees at once

# ---------------------------------------------------------------------------------------------
# Frames


def warp_error(frames: np.ndarray, motion: Motion, where: np.ndarray | None = None) -> float | None:
    """How much a clip changes along a motion, x1e-3 (the paper's Table 1).

    The mean over consecutive frames of the squared difference, over RGB in [0, 1] and the pixels
    that are visible in both, between a frame and the one before it warped to it.

    Args:
        frames: (n, H, W, 3) uint8 RGB, edited or not.
        motion: the source's, of n frames; None is returned where it shows no pixel.
        where: (n, H, W) bool, which pixels of a pair's later frame count; None: all.
    """
    errors = pair_errors(frames, motion, where)
    known = errors[~np.isnan(errors)]
    return float(known.mean()) if len(known) else None


def pair_errors(frames: np.ndarray, motion: Motion, where: np.ndarray | None = None) -> np.ndarray:
    """`warp_error` of each pair of consecutive frames, (n - 1,) float64; NaN: no pixel is visible.

    Args: as `warp_error`'s.
    """
    errors = np.full(max(len(frames) - 1, 0), np.nan)
    for p in range(len(errors)):
        visible = motion.visible[p].numpy()
        if where is not None:
            visible = visible & where[p + 1]
        if visible.any():
            difference = (warp(frames[p], motion.flow[p]) - frames[p + 1])[visible]
            errors[p] = 1e3 * np.square(difference, dtype=np.float64).mean() / 255.0**2
    return errors


def sharpness(frames: np.ndarray, where: np.ndarray | None = None) -> float | None:
    """The root mean square of the gradient over RGB in [0, 1], a pixel: a blurred clip has less.

    Differences to the next pixel, right and down. The square makes blur show: the mean of the
    gradient's magnitude across an edge is the edge's height, however blurred it is.

    Args:
        frames: (n, H, W, 3) uint8 RGB.
        where: (n, H, W) bool, which pixels count, pooled over the clip; None: all.
    """
    total, count = 0.0, 0
    for i, frame in enumerate(frames):
        pixels, squares = frame / 255.0, np.zeros(frame.shape[:2])
        squares[:-1] += np.square(np.diff(pixels, axis=0)).mean(axis=-1)
        squares[:, :-1] += np.square(np.diff(pixels, axis=1)).mean(axis=-1)
        counted = squares if where is None else squares[where[i]]
        total, count = total + float(counted.sum()), count + counted.size
    return (total / count) ** 0.5 if count else None


def ssim(
    frames: np.ndarray, source: np.ndarray, mask: np.ndarray | None = None
) -> tuple[float, float | None, float | None]:
    """Mean structural similarity in [-1, 1]: of all pixels, of the mask's, of the others.

    Args:
        frames, source: (n, H, W, 3) uint8.
        mask: (n, H, W) bool; without one, or without such pixels, the others are None.
    """
    sums = np.zeros((2, 2))  # of the mask's pixels and the others: similarity, and how many
    for i, pair in enumerate(zip(frames, source, strict=True)):
        similarity = ssim_map(*pair)
        inside = np.zeros(similarity.shape, bool) if mask is None else mask[i]
        for row, where in zip(sums, (inside, ~inside), strict=True):
            row += similarity[where].sum(), where.sum()
    whole, *parts = (float(s / n) if n else None for s, n in (sums.sum(axis=0), *sums))
    return (whole, None, None) if mask is None else (whole, *parts)


def ssim_map(frame: np.ndarray, source: np.ndarray) -> np.ndarray:
    """Structural similarity around each pixel of (H, W, 3) uint8, averaged over RGB: (H, W).

    The standard window, an 11x11 Gaussian of sigma 1.5, mirrored at the edges. It is torchmetrics'
    figure in float64 (tested) in a hundredth of the time on a CPU; variances are small differences,
    so that in float32 it was measured 5e-4 off on flat pictures.

    Source: Wang, Bovik, Sheikh, Simoncelli 2004, Eq. 13.
    """
    x, y = frame / 255.0, source / 255.0
    c1, c2 = 0.01**2, 0.03**2
    mean_x, mean_y = _window_mean(x), _window_mean(y)
    variance_x = _window_mean(x * x) - mean_x**2
    variance_y = _window_mean(y * y) - mean_y**2
    covariance = _window_mean(x * y) - mean_x * mean_y
    light = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return (light * structure).mean(axis=-1)


def _window_mean(image: np.ndarray) -> np.ndarray:
    return cv2.GaussianBlur(image, (11, 11), 1.5, borderType=cv2.BORDER_REFLECT_101)


# ---------------------------------------------------------------------------------------------
# CLIP


class ClipEmbedder:
    """CLIP's joint space of pictures and text, of `model_folder`'s folder.

    Raises:
        UserError: the folder holds no CLIP model.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.model, self.device = _load(CLIPModel, folder, device), device
        self.processor = CLIPImageProcessor.from_pretrained(folder)
        # The others need no such word: their class is named here, not by the folder's files.
        self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        self.most_tokens = self.model.config.text_config.max_position_embeddings

    @torch.inference_mode()
    def embed_frames(self, frames: np.ndarray) -> Tensor:
        """(n, H, W, 3) uint8 RGB to (n, d) float32 of length 1, on the CPU."""
        model = self.model
        parts = [
            model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)
            for pixels in _pixels(frames, self.processor, self.device)
        ]
        return F.normalize(torch.cat(parts).float(), dim=-1).cpu()

    @torch.inference_mode()
    def embed_text(self, text: str) -> Tensor:
        """A text to (d,) float32 of length 1, on the CPU; what CLIP cannot read is warned of."""
        count = len(self.tokenizer(text, verbose=False).input_ids)
        if count > self.most_tokens:
            log.warning(
                "prompt: CLIP reads %d of its %d tokens: %.60s...", self.most_tokens, count, text
            )
        tokens = self.tokenizer(
            text, truncation=True, max_length=self.most_tokens, return_tensors="pt"
        ).to(self.device)
        features = self.model.text_model(tokens.input_ids, tokens.attention_mask)
        embedding = self.model.text_projection(features.pooler_output)[0]
        return F.normalize(embedding.float(), dim=-1).cpu()


def clip_score(frames: Tensor, text: Tensor) -> float:
    """Mean cosine of frames' embeddings (n, d) and a text's (d,)."""
    return float((frames @ text).mean())


def clip_frame_consistency(frames: Tensor) -> float | None:
    """Mean cosine of consecutive frames' embeddings (n, d); None of one frame."""
    if len(frames) < 2:
        return None
    return float((frames[1:] * frames[:-1]).sum(-1).mean())


def clip_directional(
    frames: Tensor, source_frames: Tensor, text: Tensor, source_text: Tensor
) -> float | None:
    """Mean cosine of what changed in the frames, (n, d), and what changed in the text, (d,).

    All are of length 1. A frame that did not change counts as 0; None if the text did not.
    """
    direction = text - source_text
    if direction.norm() < 1e-6:
        return None
    return float(F.cosine_similarity(frames - source_frames, direction[None]).mean())


# ---------------------------------------------------------------------------------------------
# DINO


class DinoKeys:
    """The keys of a ViT's last layer, whose self-similarity is a picture's structure.

    Raises:
        UserError: the folder, of `model_folder`, holds no ViT.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        model = _load(ViTModel, folder, device, add_pooling_layer=False)
        self.model, self.device = model, device
        self.processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
        # transformers 4 calls this projection key, transformers 5 k_proj.
        names = [n for n, _ in model.named_modules() if n.rpartition(".")[2] in ("key", "k_proj")]
        self.last_key = model.get_submodule(names[-1])

    @torch.inference_mode()
    def __call__(self, frames: np.ndarray) -> Tensor:
        """(n, H, W, 3) uint8 RGB to (n, tokens, d) float32, heads joined, on the CPU."""
        found = []
        with self.last_key.register_forward_hook(lambda *call: found.append(call[2].cpu())):
            for pixels in _pixels(frames, self.processor, self.device):
                self.model(pixel_values=pixels, interpolate_pos_encoding=True)
        return torch.cat(found).float()


def structure_distance(keys: Tensor, source_keys: Tensor) -> float:
    """Mean squared difference of the cosine self-similarities of keys, (n, tokens, d).

    Source: Tumanyan et al., Splicing ViT Features, CVPR 2022, Eq. 2-3, as a mean.
    """
    distances = []
    for pair in zip(keys, source_keys, strict=True):
        a, b = (F.normalize(keys, dim=-1) for keys in pair)  # (tokens, d)
        distances.append(F.mse_loss(a @ a.T, b @ b.T))
    return float(np.mean(distances))


# ---------------------------------------------------------------------------------------------
# Loading


def model_folder(key: str, option: str) -> Path:
    """The local folder of a CLIP or DINO model, as checkpoints.single_model_folder finds it.

    Raises:
        UserError: it cannot be had or is damaged; says how to leave the measure out.
    """
    try:
        return single_model_folder(key, option)
    except UserError as error:
        raise type(error)(
            f"{error}; --{option} FOLDER names a copy, --{option} none leaves the measure out"
        ) from error


def _load(cls: type, folder: Path, device: torch.device, **options: object) -> torch.nn.Module:
    kind = cls.config_class.model_type
    found = cls.config_class.get_config_dict(folder)[0].get("model_type")
    if found != kind:
        raise UserError(f"{folder}: its model_type is {found}, expected {kind}")
    # In float32 whatever its weights are saved in: half precision would show in the cosines.
    return for_inference(load_model(cls, folder, **options).float(), device)


def _pixels(frames: np.ndarray, processor: Callable, device: torch.device) -> Iterator[Tensor]:
    """What a model sees of (n, H, W, 3) frames, CHUNK at a time."""
    for start in range(0, len(frames), CHUNK):
        inputs = processor(images=list(frames[start : start + CHUNK]), return_tensors="pt")
        yield inputs.pixel_values.to(device)
