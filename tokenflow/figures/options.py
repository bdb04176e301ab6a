"""visualize.py's options, without the libraries that draw."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from tokenflow.cache.options import Dtype
from tokenflow.storage.schema import Model

LAYER = "up_blocks.2.attentions.1"  # the default: in the middle of the decoder


class ViewOptions(Model):
    """The options of visualize.py that say how features are taken."""

    layer: str = Field(LAYER, description="a self-attention layer")
    timestep: int | None = Field(
        None, description="of the inversion's (default: the middle of sampling)"
    )
    what: Literal["input", "output"] = Field(
        "input", description="the self-attention's input tokens or its output"
    )
    model_key: str | None = Field(
        None, description="the checkpoint, if it is not where the cache says"
    )
    batch_size: int = Field(8, ge=1, description="frames evaluated at once")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    dtype: Dtype = Field("auto", description="auto is float16 on CUDA, float32 elsewhere")


class FeatureOptions(ViewOptions):
    """Figure 2: frames, features and x-t slices of the source and of edits of it."""

    result: str = Field(description="the edit's folder")
    per_frame: str | None = Field(None, description="folder of an edit with consistency: none")
    row: int | None = Field(None, description="image row of the x-t slices (default: the middle)")
    n_frames: int | None = Field(None, ge=1, description="use the first N frames (default: all)")
    columns: int = Field(6, ge=1, description="frames that features.png shows")
    out: str = Field(description="folder of the pictures")


class CorrespondenceOptions(ViewOptions):
    """Figure 3: a frame rebuilt from another one's pixels, and from its tokens."""

    cache: str | None = Field(None, description="the clip's cache, as preprocess.py prints it")
    result: str | None = Field(None, description="an edit's folder: its cache")
    frame: int = Field(description="the frame to rebuild, from 0")
    keyframe: int = Field(description="the frame to rebuild it from")
    out: str = Field(description="folder of the pictures")

    @model_validator(mode="after")
    def _one_source(self) -> CorrespondenceOptions:
        if (self.cache is None) == (self.result is None):
            raise ValueError("--cache and --result: give one of them")
        return self


class KeyframeOptions(Model):
    """The keyframes of each step of a result."""

    result: str = Field(description="the edit's folder")
    out: str = Field(description="folder of the pictures")
