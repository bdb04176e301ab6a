"""TokenFlow from Python: `preprocess` and `edit`; the modules below are in layers.

    import tokenflow
    cache = tokenflow.preprocess("clip.mp4", preset="best", inversion_prompt="a wolf")
    result = tokenflow.edit("clip.mp4", "a marble sculpture of a wolf", preset="best")
    frames = result.frames()

A module imports only from its own layer and from those before it in this order:
ops, storage, diffusion, cache, editing, evaluation, figures, benchmarks.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenflow.cache.source_cache import SourceCache
    from tokenflow.editing.results import Result


def preprocess(data_path: str | os.PathLike, **options: Any) -> SourceCache:
    """Inverts a clip, unless that is done.

    Args:
        data_path: a video, a GIF or a folder of images.
        options: of preprocess.py, by their names.

    Returns:
        the cache: its `folder`, `frames(n)`, `latents(t, n)`, and in `manifest` its PSNR, seconds
        and settings.

    Raises:
        UserError: an option does not fit the clip or the model; the message says what does.
    """
    from tokenflow.cache.build import build_cache
    from tokenflow.cache.options import PreprocessOptions
    from tokenflow.cache.source_cache import open_cache
    from tokenflow.storage.schema import parse

    given = options | {"data_path": os.fspath(data_path)}
    return open_cache(build_cache(parse(PreprocessOptions, given, "preprocess")))


def edit(data_path: str | os.PathLike, prompt: str, technique: str = "pnp", **keys: Any) -> Result:
    """Edits a preprocessed clip, unless a finished result exists.

    Args:
        data_path: as it was preprocessed.
        prompt: what the edited video shows.
        technique: pnp, sdedit or controlnet.
        keys: of the technique's YAML file. What they leave out is the cache's, or the default.

    Returns:
        the result: its `folder`, `frames()`, `method`, `cache()`, and in `run` its figures.

    Raises:
        UserError: naming what is missing or does not fit.
    """
    from tokenflow.editing.results import TECHNIQUES, read_result
    from tokenflow.editing.techniques import load_technique
    from tokenflow.storage.schema import parse
    from util import UserError

    if technique not in TECHNIQUES:
        raise UserError(f"technique: {technique!r}, expected one of {', '.join(TECHNIQUES)}")
    script = load_technique(technique)
    given = keys | {"data_path": os.fspath(data_path), "prompt": prompt}
    return read_result(script.edit(parse(script.config, given, technique)))
