"""What app.py's page asks for, and the work behind its buttons: no web server is needed here.

It calls what the command lines call, with the same words, in the same folders.
"""

from __future__ import annotations

import os
import shlex
import time
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import report
from preprocess import preprocess
from tokenflow.cache.options import PreprocessOptions, arguments, edit_keys, parse_args, set_words
from tokenflow.editing.config import EditConfig, read_configs
from tokenflow.editing.results import TECHNIQUES
from tokenflow.editing.techniques import load_technique
from tokenflow.storage.video import clip_name, read_clip
from util import UserError

UPLOADS = Path(PreprocessOptions.model_fields["save_dir"].default, "uploads")
RESULTS = Path(EditConfig.model_fields["output_path"].default)  # all that the page may read


class Form(NamedTuple):
    """What the page's fields hold, in their order."""

    bundled: str
    upload: str  # wins over `bundled`
    shows: str
    prompts: str  # one a line
    technique: str
    preset: str
    sd_version: str
    model_key: str
    options: str  # more of preprocess.py's, as a shell takes them
    keys: str  # more of the edits', KEY=VALUE, one a line

    @property
    def clip(self) -> str:
        if clip := self.upload or self.bundled:
            return clip
        raise UserError("clip: choose or upload one, or give the path of one")

    def commands(self) -> list[list[str]]:
        """The command lines that do what is asked for: of the inversion, the edits, the report.

        Raises:
            UserError: a field is wrong, as far as that can be told without reading the clip.
        """
        try:
            invert = shlex.split(self.options)
        except ValueError as error:
            raise UserError(f"options of preprocess.py: {error}") from error
        same = {"preset": self.preset, "data_path": self.clip, "sd_version": self.sd_version}
        same |= {"model_key": self.model_key} if self.model_key else {}
        invert += arguments(same | {"inversion_prompt": self.shows or None})
        options = parse_args(invert)
        keys = edit_keys(options) | {"n_frames": options.n_frames}
        for line in filter(None, map(str.strip, self.keys.splitlines())):
            key, equals, value = line.partition("=")
            if not equals:
                raise UserError(f"keys of the edits: {line}: expected KEY=VALUE")
            keys[key.strip()] = value
        edit = set_words(keys | same | {"output_path": RESULTS})
        for prompt in filter(None, map(str.strip, self.prompts.splitlines())):
            edit += set_words({"prompt": prompt})
        folders = {name: RESULTS / name / clip_name(self.clip) for name in TECHNIQUES}
        shown = [str(f) for name, f in folders.items() if name == self.technique or f.is_dir()]
        return [
            ["python", "preprocess.py", *invert],
            ["python", f"run_tokenflow_{self.technique}.py", *edit],
            ["python", "report.py", *shown, "--out", str(RESULTS / "report")],
        ]


def command_lines(form: Form) -> str:
    """The commands as a shell takes them, or what is wrong with the form."""
    try:
        return "\n".join(map(shlex.join, form.commands()))
    except UserError as error:
        return f"# {error}"


def describe(form: Form) -> str:
    """What the clip is, by its first frame, or why it is none."""
    try:
        clip, name = read_clip(form.clip, 1, own_size=True), clip_name(form.clip)
    except UserError as error:
        return str(error)
    size = "{1}x{0}".format(*clip.native_size)
    return f"{name}: {clip.n_source} frames of {size} at {float(clip.fps):g} fps"


def invert(form: Form) -> str:
    """Inverts the clip, unless that is done; returns a message."""
    return f"inverted: {preprocess(parse_args(form.commands()[0][2:]))}"


def edit(form: Form) -> tuple[str, str]:
    """Makes the edits, after the inversion if that is missing.

    Returns:
        a message, and a frame with the page of all results of the clip, of any technique.
    """
    if not form.prompts.strip():
        raise UserError("prompts: expected one at least, each on a line of its own")
    inversion, edits, _ = (words[2:] for words in form.commands())
    technique = load_technique(form.technique)
    configs, overwrite = read_configs(technique.config, edits, technique.name, technique.about)
    from tokenflow.diffusion.models import KeptModels  # slow to import, both
    from tokenflow.figures.report_page import PAGE

    load = KeptModels()
    preprocess(parse_args(inversion), load)
    folders = [str(technique.edit(config, overwrite, load)) for config in configs]
    report.main(form.commands()[2][2:])
    page = quote(os.path.abspath(RESULTS / "report" / PAGE))
    address = f"gradio_api/file={page}?{time.time_ns()}"  # a new one: it was replaced
    return f"edited: {', '.join(folders)}", f'<iframe title="Results" src="{address}"></iframe>'
