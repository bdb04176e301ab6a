"""The keys of an edit's configuration that all techniques share, and how a script reads them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import Field, PlainValidator, model_validator

from tokenflow.cache.options import Dtype, Numbers, SdVersion, Texts
from tokenflow.diffusion.model_names import TEMPORAL_DECODER, TINY_TEMPORAL_DECODER
from tokenflow.storage.images import MAX_SIDE
from tokenflow.storage.schema import (
    MAX_COUNT,
    Count,
    CountOrNull,
    PresetModel,
    Seed,
    Share,
    load_config,
)
from tokenflow.storage.video import MAX_FPS
from tokenflow.storage.yaml_files import MAX_CONFIG_BYTES, load_yaml
from util import ArgumentParser, UserError, shown

ROOT = Path(__file__).parents[2]
# Backends that need nothing from the hub at run time.
CPU_BACKENDS = ("native", "_native_math")
CUDA_BACKENDS = ("xformers", "flash", "sage", "flex", "_native_flash", "_native_efficient")
CUDA_BACKENDS += ("_native_cudnn",)


def _chunk_size(value: Any) -> Any:
    whole = isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_COUNT
    if not whole and value not in ("auto", None):
        raise ValueError(f"expected auto, a whole number from 1 or null, got {shown(value)}")
    return value


ChunkSize = Annotated[Literal["auto"] | int | None, PlainValidator(_chunk_size)]


class EditConfig(PresetModel):
    """The keys that all techniques share."""

    ALIASES: ClassVar = {"batch_size": "keyframe_interval"}  # the released code's name
    PRESET_SECTIONS: ClassVar = ("edit",)

    # what to edit
    data_path: str = Field(
        description="the clip that was preprocessed: video, GIF or folder of images"
    )
    prompt: str = Field(
        description="what the edited video shows; a list in a file: an edit of each"
    )
    negative_prompt: str = Field("", description="what it does not show")
    latents_path: str = Field(
        "latents", description="folder of the caches, preprocess.py's save_dir"
    )
    output_path: str = Field("tokenflow-results", description="folder of the results")
    n_inversion_steps: CountOrNull = Field(
        None,
        description="preprocess.py's steps, if the clip has several caches; null: its only one",
    )
    frame_start: int | None = Field(
        None, ge=0, le=MAX_COUNT, description="preprocess.py's frame_start, likewise"
    )
    frame_stride: CountOrNull = Field(None, description="preprocess.py's frame_stride, likewise")
    n_frames: CountOrNull = Field(
        None, description="use the first frames of the cache, at most this many; null: all"
    )
    H: int | None = Field(
        None,
        ge=8,
        le=MAX_SIDE,
        description="frame height that the cache must have, a multiple of 8; null: any",
    )
    W: int | None = Field(None, ge=8, le=MAX_SIDE, description="the same for the width")
    fps: float | None = Field(
        None, ge=0.1, le=MAX_FPS, description="frame rate of the result; null: the clip's"
    )
    output_size: Literal["model", "source"] = Field(
        "model",
        description="size of the frames and videos written; source: resized to the clip's own, "
        "rounded down to even numbers",
    )
    audio: bool = Field(
        True, description="copy the clip's sound, which the cache holds, into the videos"
    )
    # model
    sd_version: SdVersion | None = Field(
        None,
        description="Stable Diffusion version, in quotes ('2.1' is the paper's); null: the cache's",
    )
    model_key: str | None = Field(
        None,
        description="hub id, local folder in diffusers' format, or single .safetensors file in the "
        "original layout; wins over sd_version; null: by sd_version, or the cache's",
    )
    architecture_key: str | None = Field(
        None,
        description="hub id or local folder of the checkpoint whose configurations and tokenizer a "
        "single-file model_key has; null: sd_version's; the cache's where model_key is null too",
    )
    lora: Texts = Field(
        None,
        description="LoRAs, one or a list: .safetensors files or hub ids (owner/name or "
        "owner/name/file); null: the cache's",
    )
    lora_scale: Numbers = Field(
        None,
        description="how much of each LoRA is added, a number or a list; null: 1, or the cache's",
    )
    embeddings: Texts = Field(
        None,
        description="textual-inversion embeddings, likewise; a file's token, or its name, in a "
        "prompt stands for it",
    )
    lora_for: Literal["both", "edit"] = Field(
        "both",
        description="both: the cache was made with the same LoRAs and embeddings; edit: without "
        "any, and its source pass takes none",
    )
    allow_pickle: bool = Field(
        False,
        description="also load models that have pickled weights (.bin) only, if you trust them",
    )
    device: str = Field(
        "auto", description="auto, cpu, cuda or cuda:N; auto: cuda where there is one"
    )
    dtype: Dtype = Field("auto", description="auto is float16 on CUDA, float32 elsewhere")
    attention_backend: Literal[CPU_BACKENDS + CUDA_BACKENDS] = Field(
        "native", description="diffusers' backend of the UNet's self-attention in edits"
    )
    compile: bool = Field(
        False,
        description="compile the UNet with torch.compile: for long runs on CUDA, one process only; "
        "changes a result by rounding only",
    )
    # what to keep
    mask: str | None = Field(
        None,
        description="edit only where it is not 0: a folder of PNG files numbered like the clip's "
        "frames, a folder with a folder of them for each clip (as DAVIS has), or one PNG file for "
        "all frames; null: edit everything",
    )
    composite: bool = Field(
        True,
        description="with a mask: the source's own pixels outside of it, with a soft border; "
        "false: the decoded ones",
    )
    # running: no key changes a result
    checkpoint_every: int = Field(
        5, ge=1, description="save a checkpoint after every so many steps, to resume from"
    )
    estimate: bool | None = Field(
        None,
        description="true: print the memory and the disk that the edit needs, and stop; null: log "
        "the memory on CUDA before the models are loaded, which takes seconds; false: do not",
    )
    verify: bool = Field(
        False,
        description="compare the checksums of all files of the cache and of a finished result "
        "first; files that are read are always compared",
    )
    preview_every: CountOrNull = Field(
        None,
        description="draw three frames as they are expected to become after every so many steps, "
        "in <result>-preview.png; null: do not",
    )
    preview_vae: str | None = Field(
        None,
        description="hub id or local folder of an AutoencoderTiny that decodes previews faster "
        "(madebyollin/taesd); null: the model's VAE",
    )
    # sampling
    seed: Seed = Field(1, description="seed of Gaussian noise, where a technique draws any")
    n_timesteps: int | None = Field(
        None,
        ge=1,
        le=1000,
        description="sampling steps, whose latents the cache must hold; null: all that it holds",
    )
    sampler: Literal["ddim", "dpmpp_2m"] = Field(
        "ddim",
        description="ddim, as in the paper; dpmpp_2m: DPM-Solver++ (2M), of second order",
    )
    guidance_scale: float = Field(
        7.5, ge=0, description="classifier-free guidance; 1 is none, at half the time"
    )
    decoder: Literal["image", "temporal"] = Field(
        "image",
        description="image: the checkpoint's VAE; temporal: Stable Video Diffusion's decoder, "
        "which sees 20 frames at once and flickers less",
    )
    decoder_key: str | None = Field(
        None,
        description="hub id (owner/name or owner/name/folder) or local folder of the temporal "
        "decoder; null: the one known for sd_version",
    )
    # TokenFlow
    keyframe_interval: Count = Field(8, description="frames per keyframe")
    chunk_size: ChunkSize = Field(
        None,
        description="frames evaluated at once: lower it if memory runs out; changes no result; "
        "null: keyframe_interval; auto: as many as the GPU's free memory holds, at most 32 (on the "
        "CPU 8)",
    )
    source_features: Literal["auto", "save", "live"] = Field(
        "auto",
        description="auto: read what the cache holds (preprocess.py --cache_features) if it serves "
        "this edit, else compute it; save: and save what was computed for later edits, in the "
        "place of others; live: always compute it; changes a result by rounding only",
    )
    max_keyframes: int | None = Field(
        None,
        ge=2,
        le=MAX_COUNT,
        description="largest number of keyframes that attend to each other, for very long clips; "
        "an approximation (docs/performance.md); null: all, as in the paper",
    )
    keyframe_seed: Seed = Field(1, description="seed of the random keyframes")
    consistency: Literal["tokenflow", "extended_attention", "first_frame", "none"] = Field(
        "tokenflow",
        description="tokenflow, or one to compare with: extended_attention (all frames attend to "
        "all, nothing is propagated: Table 1's 'w/o TokenFlow'; memory grows with the frames), "
        "first_frame (each frame attends to the first, as in Text2Video-Zero), none (each frame on "
        "its own)",
    )
    keyframes: Literal["random", "fixed"] = Field(
        "random", description="random: drawn at each step, as in the paper; fixed: an ablation"
    )
    propagation: Literal["paper", "released"] = Field(
        "paper",
        description="paper: Eq. 5-7; released: the published code's neighbours, weights, start "
        "noise and propagated source pass",
    )
    blend: Literal["sigmoid", "linear"] = Field(
        "sigmoid", description="weights of the two keyframes; sigmoid: Eq. 7"
    )
    correspondence: Literal["nn", "flow", "hybrid"] = Field(
        "nn",
        description="nn: nearest source tokens, Eq. 5; flow: optical flow, interpolated between "
        "tokens; hybrid: flow where forward and backward flow agree, nn elsewhere",
    )
    smooth_steps: Share = Field(
        0.0,
        description="share of the steps, from the first, in which the predicted clean latents are "
        "averaged with the neighbouring frames' along the optical flow",
    )
    deflicker: bool = Field(
        False,
        description="average each frame at the end with its neighbours along the optical flow; the "
        "method's name says so",
    )
    flow_model: Literal["auto", "raft", "dis"] = Field(
        "auto",
        description="estimates the optical flow: raft (fetched once) or OpenCV's dis; auto: raft "
        "if its weights are in torch's cache, else dis",
    )

    @model_validator(mode="after")
    def _check_rules(self) -> EditConfig:
        if (self.H is None) != (self.W is None) or (self.H or 0) % 8 or (self.W or 0) % 8:
            raise ValueError(f"H: {self.H}, W: {self.W}; expected both or neither, multiples of 8")
        if self.propagation == "released" and self.blend != "sigmoid":
            raise ValueError("blend: linear goes with propagation: paper; released has its own")
        if self.decoder_key is not None and self.decoder == "image":
            raise ValueError(f"decoder_key: {self.decoder_key} goes with decoder: temporal")
        if self.propagation == "released" and self.sampler != "ddim":
            raise ValueError(
                f"sampler: {self.sampler} goes with propagation: paper; released takes ddim"
            )
        if self.propagation == "released" and self.correspondence != "nn":
            raise ValueError(
                f"correspondence: {self.correspondence} goes with propagation: paper; released "
                "takes the nearest tokens"
            )
        steps = self.n_timesteps
        if self.n_inversion_steps is not None and steps and self.n_inversion_steps % steps:
            raise ValueError(
                f"n_timesteps: {self.n_timesteps} does not divide n_inversion_steps: "
                f"{self.n_inversion_steps}; the timesteps of the one must be among the other's"
            )
        return self

    @property
    def temporal_decoder(self) -> str | None:
        """The hub id or folder of the temporal decoder; None for the image decoder."""
        if self.decoder == "image":
            return None
        known = TINY_TEMPORAL_DECODER if self.sd_version == "tiny" else TEMPORAL_DECODER
        return self.decoder_key or known

    @property
    def uses_flow(self) -> bool:
        """Whether the edit needs the source's optical flow."""
        propagated = self.consistency == "tokenflow" and self.correspondence != "nn"
        return propagated or self.smooth_steps > 0 or self.deflicker


class NoiseConfig(EditConfig):
    """The keys of techniques that may start from Gaussian noise."""

    noise: Literal["ddim", "shared", "warped"] | None = Field(
        None,
        description="start noise: ddim (DDIM-inverted, keeps structure), shared (one Gaussian "
        "noise for all frames), warped (Gaussian noise that moves along with the clip); null: ddim "
        "if use_ddim_noise, else shared",
    )
    use_ddim_noise: bool = Field(True, description="the released code's key, if noise is null")

    @property
    def start_noise(self) -> str:
        """`noise`, or what `use_ddim_noise` stands for."""
        return self.noise or ("ddim" if self.use_ddim_noise else "shared")

    @property
    def uses_flow(self) -> bool:
        return super().uses_flow or self.start_noise == "warped"


Config = TypeVar("Config", bound=EditConfig)


def read_configs(
    cls: type[Config], argv: Sequence[str] | None, technique: str, about: str
) -> tuple[list[Config], bool]:
    """Reads a run script's command line and its YAML config.

    Args:
        cls: the script's configuration.
        argv: the command line without the program's name; None for sys.argv's.
        technique: whose configs/config_<technique>.yaml is read where no file is named.
        about: the script's one-line description.

    Returns:
        a configuration for each prompt (the file may have a list of them, and the command line
        several), and whether to replace finished results (--overwrite).

    Raises:
        UserError: if the command line, the file or one of its values is wrong.
    """
    parser = ArgumentParser(description=about)
    add, flags = parser.add_argument, ("device", "allow_pickle", "verify")
    default = f"configs/config_{technique}.yaml"
    text = f"YAML file (default: {default})"
    add("--config", "--config_path", default=ROOT / default, help=text)
    text = "override one key of the file; any number of times (several prompts: several edits)"
    add("--set", action="append", default=[], metavar="KEY=VALUE", help=text)
    for key in flags:
        options = {} if key == "device" else {"action": "store_const", "const": "true"}
        value = options.get("const", "...")
        text = f"{cls.model_fields[key].description}; the same as --set {key}={value}"
        add(f"--{key}", help=text, **options)
    add("--overwrite", action="store_true", help="replace a finished result")
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        key = unknown[0].removeprefix("--").partition("=")[0]
        hint = f"; use --set {key}=..." if key in cls.model_fields else ""
        raise UserError(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    overrides = [f"{key}={getattr(args, key)}" for key in flags if getattr(args, key)]
    said = [text.partition("=")[0].strip() for text in args.set]
    prompts = [text for text, key in zip(args.set, said, strict=True) if key == "prompt"]
    if args.config == ROOT / default and "data_path" in said and not prompts:
        raise UserError('prompt: is missing: say what the edited video shows by --set prompt="..."')
    overrides = [text for text in args.set if text not in prompts] + overrides
    read = partial(load_config, cls, args.config)
    if prompts:
        return [read([*overrides, prompt]) for prompt in prompts], args.overwrite
    listed = load_yaml(args.config, MAX_CONFIG_BYTES).get("prompt")
    if not isinstance(listed, list):
        return [read(overrides)], args.overwrite
    if not listed:
        raise UserError(f"{args.config}: prompt: expected a text or a list of texts, got []")
    return [read(overrides, {"prompt": text}) for text in listed], args.overwrite
