"""What lists of clips in YAML have in common: their sections, settings and inversions."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import run_tokenflow_controlnet as controlnet
import run_tokenflow_pnp as pnp
import run_tokenflow_sdedit as sdedit
from tokenflow.cache.options import PreprocessOptions
from tokenflow.editing.config import EditConfig
from tokenflow.storage.schema import parse
from util import UserError, check_text


@dataclass(frozen=True)
class Technique:
    """A kind of edits: the class of its configuration, and what makes a result of one."""

    config: type[EditConfig]
    make: Callable[..., Any]


TECHNIQUES = {
    "pnp": Technique(pnp.PnPConfig, pnp.edit),
    "sdedit": Technique(sdedit.SDEditConfig, sdedit.edit),
    "controlnet": Technique(controlnet.ControlNetConfig, controlnet.edit),
}

# Options of preprocess.py, and the keys of an edit that ask for them.
INVERSION_OPTIONS = {
    "data_path": "data_path",
    "save_dir": "latents_path",
    "sd_version": "sd_version",
    "model_key": "model_key",
    "steps": "n_inversion_steps",
    "save_steps": "n_timesteps",
    "n_frames": "n_frames",
    "H": "H",
    "W": "W",
    "interval": "batch_size",
    "keyframe_seed": "keyframe_seed",
    "pnp_attn_t": "pnp_attn_t",
    "pnp_f_t": "pnp_f_t",
    "device": "device",
    "dtype": "dtype",
    "allow_pickle": "allow_pickle",
    "verify": "verify",
}


def mapping(value: object, where: str) -> dict[str, Any]:
    """A section of a list: keys and values.

    Raises:
        UserError: it is something else.
    """
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise UserError(f"{where}: expected keys and values, got {value!r:.60}")
    return value


def text(value: object, where: str) -> str:
    """A text of a list.

    Raises:
        UserError: it is something else.
    """
    if not isinstance(value, str):
        raise UserError(f"{where}: expected text, got {value!r:.60}")
    check_text(value, where)
    return value


def check_keys(given: Iterable[object], known: Iterable[str], where: str) -> None:
    """Refuses a key that is not known.

    Raises:
        UserError: naming it and the nearest known one, or all.
    """
    known = sorted(known)
    for key in sorted(map(str, set(given) - set(known))):
        near = difflib.get_close_matches(key, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(known)}"
        raise UserError(f"{where}: {key}: unknown key; {hint}")


def merged_config(
    cls: type[EditConfig], sections: Iterable[Mapping[str, Any]], where: str
) -> EditConfig:
    """The configuration of an edit from sections of a list, of which later ones win.

    Raises:
        UserError: naming the key that is unknown, missing or wrong.
    """
    keys: dict[str, Any] = {}
    for section in sections:
        keys |= section
    return parse(cls, keys, where)


def inversion_options(config: EditConfig) -> dict[str, Any]:
    """The options of preprocess.py that an edit asks for; None leaves one out, "" is a flag."""
    options = {
        option: getattr(config, key)
        for option, key in INVERSION_OPTIONS.items()
        if hasattr(config, key)
    }
    return {
        option: ("" if value else None) if isinstance(value, bool) else value
        for option, value in options.items()
    }


def of_inversion(config: EditConfig, args: PreprocessOptions) -> EditConfig:
    """A config that names the cache of an inversion, whatever other caches of the clip there are.

    Args:
        args: the inversion's.
    """
    found = {key: getattr(args, key) for key in ("frame_start", "frame_stride")}
    return config.model_copy(update=found | {"n_inversion_steps": args.steps})
