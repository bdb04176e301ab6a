"""The options of preprocess.py, their defaults and the rules between them."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, PlainSerializer, PlainValidator, model_validator

from tokenflow.diffusion.model_names import DEPTH_ESTIMATOR, MODELS, ControlKind, control_settings
from tokenflow.storage.images import check_size
from tokenflow.storage.schema import (
    MAX_COUNT,
    Count,
    CountOrNull,
    PresetModel,
    Seed,
    Share,
    add_arguments,
    from_arguments,
)
from tokenflow.storage.video import frame_rate
from util import ArgumentParser, shown

# The cheapest inversion at 50 sampling steps: dearer ones reconstruct better, but where it was
# measured they edit no better (docs/quality.md).
FAST = {"steps": 50, "save_steps": 50, "inversion_iters": 1}
FRAME_RANGE = ("frame_start", "frame_stride")
# What cached features depend on, here and in an edit's config.
FEATURE_OPTIONS = ("keyframe_interval", "keyframe_seed", "pnp_attn_t", "pnp_f_t", "correspondence")
ADAPTER_OPTIONS = ("lora", "lora_scale", "embeddings")
CONTROL_OPTIONS = ("control", "controlnet_key", "controlnet_scale", "canny_low", "canny_high")


def _spelled(settings: dict[str, Any]) -> str:
    return " ".join(f"--{name} {value:g}" for name, value in settings.items())


def _batch_size(value: Any) -> Any:
    """None for auto."""
    if isinstance(value, str) and value != "auto":
        raise ValueError(f"{shown(value)}, expected auto or a whole number")
    return None if value == "auto" else value


def _listed(value: Any) -> Any:
    return value if value is None or isinstance(value, list) else [value]


def _numbers(value: Any) -> Any:
    """A list of numbers of one, or of the words of a command line."""
    values = _listed(value)
    return values and [float(each) if isinstance(each, (str, int)) else each for each in values]


Texts = Annotated[list[str] | None, BeforeValidator(_listed)]
Numbers = Annotated[list[float] | None, BeforeValidator(_numbers)]
FrameRate = Annotated[
    Fraction, PlainValidator(lambda value: frame_rate(str(value))), PlainSerializer(str)
]
SdVersion = Literal[tuple(MODELS)]
Reconstruction = Literal["full", "sample", "none"]
Dtype = Literal["auto", "float32", "float16", "bfloat16"]


class PreprocessOptions(PresetModel):
    """What preprocess.py is asked to do; `fast` is replaced by the settings that it stands for."""

    ALIASES: ClassVar = {  # the keys of an edit, and an earlier name
        "latents_path": "save_dir",
        "n_inversion_steps": "steps",
        "n_timesteps": "save_steps",
        "chunk_size": "batch_size",
        "interval": "keyframe_interval",
    }
    PRESET_SECTIONS: ClassVar = ("preprocess",)

    data_path: str = Field(description="video, GIF or folder of images")
    save_dir: str = Field("latents", description="folder of the caches")
    frame_start: int = Field(0, ge=0, le=MAX_COUNT, description="first frame to use")
    frame_stride: Count = Field(1, description="use every N-th frame")
    n_frames: Count = Field(40, description="frames to use, at most")
    H: int | None = Field(
        None,
        ge=8,
        multiple_of=8,
        description="height, a multiple of 8 (default: 512 if square, else 384 or 672)",
    )
    W: int | None = Field(
        None,
        ge=8,
        multiple_of=8,
        description="width, a multiple of 8 (default: 512 if square, else 672 or 384)",
    )
    fit: Literal["stretch", "crop"] = Field("stretch", description="how frames get that size")
    fps: FrameRate | None = Field(
        None,
        description="frame rate, a number or a fraction (default: the clip's; 24 for images)",
    )
    audio: bool = Field(
        True, description="keep the clip's sound for inverted.mp4 and the edits (default)"
    )
    sd_version: SdVersion = Field("2.1", description="Stable Diffusion version")
    model_key: str | None = Field(
        None,
        description="hub id, local folder or single .safetensors file of a checkpoint; wins over "
        "sd_version",
    )
    architecture_key: str | None = Field(
        None,
        description="hub id or local folder of the checkpoint whose configurations and tokenizer a "
        "single file has (default: sd_version's)",
    )
    allow_pickle: bool = Field(
        False, description="also load models that have pickled weights (.bin) only"
    )
    lora: Texts = Field(
        None,
        json_schema_extra={"nargs": "+", "metavar": "FILE"},
        description="LoRAs: .safetensors files, or hub ids (owner/name or owner/name/file)",
    )
    lora_scale: Numbers = Field(
        None,
        json_schema_extra={"nargs": "+", "metavar": "X"},
        description="how much of each LoRA is added (default: 1)",
    )
    embeddings: Texts = Field(
        None,
        json_schema_extra={"nargs": "+", "metavar": "FILE"},
        description="textual-inversion embeddings, likewise; a file's token, or its name, in a "
        "prompt stands for it",
    )
    inversion_prompt: str = Field("", description="what the clip shows (default: empty)")
    steps: Count = Field(500, description="inversion steps")
    save_steps: Count = Field(50, description="sampling steps whose latents are saved")
    inversion_iters: Count = Field(1, description="noise evaluations per step, at most")
    inversion_tol: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="stop iterating a frame's step at a residual below this share of its latents; "
        "0 makes every evaluation, 0.001 is a good value",
    )
    fast: bool = Field(
        False,
        description="a tenth of the default's inversion work (docs/inversion.md): the same as "
        f"{_spelled(FAST)}, none of which may be given too",
    )
    recon_steps: CountOrNull = Field(
        None, description="steps of the reconstruction (default: save_steps)"
    )
    reconstruction: Reconstruction = Field(
        "full",
        description="what is sampled back from the inverted latents, to see how good they are; "
        "edits do not need it: full (inverted.mp4 and its PSNR), sample (the PSNR of every eighth "
        "frame) or none",
    )
    batch_size: Annotated[int | None, BeforeValidator(_batch_size)] = Field(
        None,
        ge=1,
        le=MAX_COUNT,
        json_schema_extra={"metavar": "auto|N"},
        description="frames evaluated at once (default: auto, what the GPU's memory holds, or 8 on "
        "the CPU)",
    )
    cache_features: bool = Field(
        True, description="also run the source pass of edits and save its results (default)"
    )
    keyframe_interval: Count = Field(8, description="the edits' keyframe_interval")
    keyframe_seed: Seed = Field(1, description="seed of the edits' keyframes")
    pnp_attn_t: Share = Field(0.5, description="largest pnp_attn_t of the edits")
    pnp_f_t: Share = Field(0.8, description="largest pnp_f_t of the edits")
    correspondence: Literal["nn", "flow", "hybrid"] = Field(
        "nn",
        description="the edits' correspondence; features for flow serve no other edits: they hold "
        "no nearest tokens, and take no source pass where PnP injects nothing",
    )
    save_tokens: Literal["keyframes", "all"] = Field(
        "keyframes",
        description="all: also the tokens of every frame, layer and step, for figures",
    )
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    dtype: Dtype = Field("auto", description="auto is float16 on CUDA, float32 elsewhere")
    control: ControlKind = Field(
        "canny", description="what the ControlNet of sd_version ControlNet follows"
    )
    controlnet_key: str | None = Field(
        None, description="hub id or local folder of that ControlNet"
    )
    controlnet_scale: float = Field(1.0, ge=0, description="weight of that ControlNet")
    canny_low: int = Field(100, ge=0, le=255, description="lower Canny threshold")
    canny_high: int = Field(200, ge=0, le=255, description="upper Canny threshold")
    depth_model: str = Field(
        DEPTH_ESTIMATOR,
        description="depth estimator: hub id or local folder, or checkpoint: the checkpoint's own",
    )
    seed: int = Field(1, description="ignored, for released command lines: nothing is random here")
    overwrite: bool = Field(False, description="replace a cache made with other settings")
    verify: bool = Field(
        False, description="compare the checksums of all files of an existing cache"
    )
    estimate: bool = Field(False, description="print the memory and disk that it needs, and stop")

    @classmethod
    def take_preset(cls, given: dict[str, Any]) -> dict[str, Any]:
        """Replaces `fast`, and then `preset`, by the settings that they stand for.

        A reconstruction takes save_steps steps by default.
        """
        if given.get("fast") is True:
            for name in [name for name in FAST if name in given]:
                raise ValueError(
                    f"--fast and --{name} {shown(given[name])}: --fast sets --{name} "
                    f"{FAST[name]:g}; give only one of them (--fast stands for {_spelled(FAST)})"
                )
            given |= {**FAST, "fast": False}
        given = super().take_preset(given)
        if given.get("recon_steps") is None:
            given["recon_steps"] = given.get("save_steps", cls.model_fields["save_steps"].default)
        return given

    @model_validator(mode="after")
    def _check_rules(self) -> PreprocessOptions:
        if (self.H is None) != (self.W is None):
            raise ValueError("--H and --W: give both or neither")
        if self.H is not None:
            check_size("--H and --W", self.H, self.W)
        for name in ("save_steps", "recon_steps"):
            if self.steps % getattr(self, name):
                raise ValueError(
                    f"--{name}: {getattr(self, name)} does not divide --steps {self.steps}; "
                    "the timesteps of the one must be among the other's"
                )
        if self.sd_version != "ControlNet":
            for name in CONTROL_OPTIONS:
                if getattr(self, name) != default(name):
                    raise ValueError(f"--{name}: goes with --sd_version ControlNet only")
        else:
            control_settings(self)
        return self


def default(name: str) -> Any:
    """An option's default."""
    return PreprocessOptions.model_fields[name].default


def parse_args(argv: Sequence[str] | None) -> PreprocessOptions:
    """Reads and checks the command line; a UserError names what is wrong."""
    parser = ArgumentParser(
        description="Inverts a clip with DDIM and writes the cache that every edit of it reads."
    )
    add_arguments(parser, PreprocessOptions)
    return from_arguments(PreprocessOptions, parser.parse_args(argv))


def arguments(options: dict[str, object]) -> list[str]:
    """Spells options as a command line; None leaves one out, "" makes it a flag without a value."""
    words = []
    for name, value in options.items():
        if value is None or value == []:
            continue
        if isinstance(value, list):
            words += [f"--{name}", *map(str, value)]
        elif str(value).startswith("-"):  # as a word of its own it would be taken for an option
            words.append(f"--{name}={value}")
        else:
            words += [f"--{name}", str(value)] if value != "" else [f"--{name}"]
    return words


def edit_keys(options: PreprocessOptions) -> dict[str, object]:
    """The keys of an edit that finds the cache of these options; its prompt is not among them."""
    best = PreprocessOptions.preset_values("best").items()
    best = best if best <= options.model_dump().items() else ()
    keys = {"preset": "best"} if best else {}
    keys |= {"data_path": options.data_path, "latents_path": options.save_dir}
    if options.save_dir == default("save_dir"):
        del keys["latents_path"]
    keys["n_inversion_steps"] = options.steps
    names = (*FRAME_RANGE, "n_frames", "sd_version", "model_key", "architecture_key")
    names += ADAPTER_OPTIONS + (FEATURE_OPTIONS if options.cache_features else ())
    for name in names:
        if getattr(options, name) != default(name) and (name, getattr(options, name)) not in best:
            keys[name] = getattr(options, name)
    return keys


def set_words(keys: Mapping[str, object]) -> list[str]:
    """Spells keys of an edit as a command line: --set KEY=VALUE for each."""
    return [word for key, value in keys.items() for word in ("--set", f"{key}={value}")]


def edit_command(options: PreprocessOptions) -> str:
    """The command of an edit that finds the cache of these options, but for its prompt."""
    technique = "controlnet" if options.sd_version == "ControlNet" else "pnp"
    words = set_words(edit_keys(options) | {"prompt": "..."})
    return shlex.join(["python", f"run_tokenflow_{technique}.py", *words])


def preprocess_command(options: dict[str, object]) -> str:
    """The command that runs preprocess.py with these options, quoted for a shell."""
    return shlex.join(["python", "preprocess.py", *arguments(options)])
