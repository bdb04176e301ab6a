"""benchmark.py's options and the settings that they name, without the libraries that run them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from pydantic import Field

from tokenflow.cache.options import Dtype
from tokenflow.storage.schema import Model
from util import UserError

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("preprocess", "edit")
RANDOM_MODELS = {
    "tiny-random": ("--architecture", "tiny"),
    "medium-random": ("--architecture", "medium"),
    "sd21-random": ("--architecture", "sd21", "--dtype", "float16"),
}

# The key=value of the edit's config that a named setting stands for.
EDIT_SETTINGS = {
    "tokenflow": None,
    "three_branch": None,
    "cached": "source_features=auto",
    "live": "source_features=live",
    "compiled": "compile=true",
    "per_frame": "consistency=none",
    "extended_attention": "consistency=extended_attention",
    "first_frame": "consistency=first_frame",
    "released": "propagation=released",
    "flow": "correspondence=flow",
}
# The options of preprocess.py: {steps} is the number of sampling steps, {n} that in the name.
PREPROCESS_SETTINGS = {
    "fast": "--steps {steps} --inversion_iters 1",
    "early_stop": "--steps {steps} --inversion_iters 3 --inversion_tol 0.001",
    "plainN": "--steps {n} --inversion_iters 1 --recon_steps {n}",
    "itersN": "--steps {steps} --inversion_iters {n}",
}


class Options(Model):
    """benchmark.py's command line, without what its modes add."""

    model: str = Field(
        "tiny",
        description="a folder in diffusers' format, a name of preprocess.py's --sd_version, or one "
        f"that is written to --work: {', '.join(RANDOM_MODELS)}",
    )
    data_path: str = Field(
        str(ROOT / "data" / "star.mp4"), description="a clip; too short, it plays back and forth"
    )
    frames: int = Field(
        16,
        ge=1,
        json_schema_extra={"nargs": "+"},
        description="frames of the clip to use; with --simulate any number of them",
    )
    size: str = Field("256", description="pixels, as a number or HEIGHTxWIDTH")
    steps: int = Field(50, ge=1, description="sampling steps")
    technique: Literal["pnp", "sdedit"] = Field("pnp", description="technique of the edits")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    dtype: Dtype = Field("auto", description="auto is float16 on CUDA, float32 elsewhere")
    inversion: str = Field("fast", description="preprocess setting of the cache that is edited")
    work: str = Field("latents/benchmark", description="for models, clips, caches and results")
    warm_up: int = Field(1, ge=0, description="runs before the timed ones")
    repeats: int = Field(3, ge=1, description="timed runs, or pairs of them")
    memory_limit: float | None = Field(
        None, gt=0, description="GiB of a GPU's memory that may be taken, as if there were no more"
    )


def read_setting(name: str, steps: int = 1) -> tuple[Literal["edit", "preprocess"], list[str]]:
    """Whether a setting is of an edit or of preprocess, and what it changes.

    Returns:
        "preprocess" and options of preprocess.py, or "edit" and key=value of the edit's config.

    Raises:
        UserError: if it is neither.
    """
    kind, number = re.fullmatch(r"(.*?)(\d*)", name).groups()
    if options := PREPROCESS_SETTINGS.get(kind + "N" if number else kind):
        return "preprocess", options.format(steps=steps, n=number).split()
    overrides = []
    for part in name.split("+"):
        setting = EDIT_SETTINGS.get(part, part.replace("attention:", "attention_backend="))
        if setting is not None and "=" not in setting:
            raise UserError(
                f"{part}: unknown setting; of an edit: {', '.join(EDIT_SETTINGS)}, "
                "attention:BACKEND, key=value (joined by +); of preprocess: "
                f"{', '.join(PREPROCESS_SETTINGS)}"
            )
        overrides += [setting] if setting else []
    return "edit", overrides
