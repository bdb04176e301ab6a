"""The options of evaluate.py; imports no library of models, so that mistakes are told at once."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from tokenflow.storage.schema import Model

CLIP_MODEL = "openai/clip-vit-large-patch14"


class Protocol(Model):
    """How edited videos are measured; also the options of evaluate.py."""

    flow: Literal["raft", "dis", "truth"] = Field("raft", description="optical flow of the source")
    flow_weights: str | None = Field(
        None,
        description="RAFT's, a safetensors file (default: torchvision's)",
        json_schema_extra={"metavar": "FILE"},
    )
    truth: str | None = Field(
        None,
        description="the true motion (default: next to the clip)",
        json_schema_extra={"metavar": "FILE|FOLDER"},
    )
    masks: str | None = Field(
        None,
        description="folder of a clip's PNG masks, or of one such folder for each clip",
        json_schema_extra={"metavar": "FOLDER"},
    )
    clip_model: str | None = Field(CLIP_MODEL, description="hub id, folder or none")
    dino_model: str | None = Field(
        None, description="a ViT: hub id, folder or none (default: none)"
    )
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")

    @field_validator("clip_model", "dino_model")
    @classmethod
    def _none_is_no_model(cls, value: str | None) -> str | None:
        return None if value == "none" else value

    @model_validator(mode="after")
    def _options_fit_the_flow(self) -> Protocol:
        if self.flow_weights is not None and self.flow != "raft":
            raise ValueError("--flow_weights: goes with --flow raft only")
        if self.truth is not None and self.flow != "truth":
            raise ValueError("--truth: goes with --flow truth only")
        return self


class OtherVideo(Model):
    """Any program's edited video and its source; also the options of evaluate.py that name it."""

    source: str = Field("", description="the clip: a video, GIF or folder of images")
    edited: str = Field("", description="the edited video, of as many frames")
    prompt: str | None = Field(None, description="what the edited video should show")
    method: str | None = Field(None, description="its name (default: the edited video's)")
    n_frames: int | None = Field(None, ge=1, description="frames to score (default: all)")
    start: int = Field(0, ge=0, description="first frame of the source (default: 0)")
    match: Literal["frames", "times"] | None = Field(
        None,
        description="where the frame rates differ: compare frames of the same number, or of the "
        "same time (default: refuse)",
    )
    H: int | None = Field(None, ge=8, description="height to resize both to (default: their own)")
    W: int | None = Field(None, ge=8, description="width to resize both to (default: their own)")

    @model_validator(mode="after")
    def _a_size_is_complete(self) -> OtherVideo:
        if (self.H is None) != (self.W is None):
            raise ValueError("--H and --W: give both or neither")
        return self
