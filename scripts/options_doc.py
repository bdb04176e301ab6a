"""Writes docs/options.md: every option of preprocess.py and every key of the edits' YAML files.

python -m scripts.options_doc
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from pydantic.fields import FieldInfo

from tokenflow.cache.options import PreprocessOptions
from tokenflow.editing.config import EditConfig
from tokenflow.editing.results import TECHNIQUES
from tokenflow.editing.techniques import load_technique
from tokenflow.storage import schema
from util import ArgumentParser, atomic_file, command_line

PATH = Path(__file__).parents[1] / "docs" / "options.md"
HEAD = """# Options

This page is written by `python -m scripts.options_doc` from the models that check the options; edit
`tokenflow/cache/options.py`, `tokenflow/editing/config.py` or a run script, and run it again.
"""
LISTS = {list[str]: "text or a list of texts", list[float]: "number or a list of numbers"}
PREPROCESS = """
## preprocess.py

Write an option as `--name value`; one whose value is "flag" has no value.
"""
CONFIG = """
## Keys of the run scripts' YAML files

`configs/config_<technique>.yaml` has them all. `--set key=value` overrides one on the command line.
These keys are the same for all techniques:
"""


def render() -> str:
    """The page."""
    parts = [HEAD, PREPROCESS, _table(PreprocessOptions, PreprocessOptions.model_fields, "--")]
    parts += [CONFIG, _table(EditConfig, EditConfig.model_fields)]
    for technique in TECHNIQUES:
        cls = load_technique(technique).config
        own = [name for name in cls.model_fields if name not in EditConfig.model_fields]
        parts += [f"\n### run_tokenflow_{technique}.py\n", _table(cls, own)]
    return "\n".join(parts) + "\n"


def _table(cls: type[schema.Model], names: Iterable[str], dashes: str = "") -> str:
    lines = ["| name | value | default | meaning |", "|---|---|---|---|"]
    for name in names:
        field = cls.model_fields[name]
        aliases = [alias for alias, of in cls.ALIASES.items() if of == name]
        if dashes and field.default is True:
            aliases.append(f"no_{name}")
        shown = ", ".join(f"`{dashes}{each}`" for each in (name, *aliases))
        default = "required" if field.is_required() else f"`{json.dumps(field.default)}`"
        if dashes and field.default in (None, ""):  # cannot be written on a command line
            default = ""
        cells = shown, _value(field, bool(dashes)), default, field.description
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def _value(field: FieldInfo, command_line: bool) -> str:
    if command_line and schema.plain_type(field.annotation) is bool:
        return "flag"
    choices = schema.choices_of(field.annotation)
    if choices:
        return ", ".join(f"`{choice}`" for choice in choices)
    kind = schema.expected(field.annotation).removeprefix("a ")
    kind = kind or LISTS.get(schema.plain_type(field.annotation), "number or fraction")
    if command_line:
        kind = kind.removesuffix(" or null")
    bounds = schema.limits(field)
    for no_bound in (schema.MAX_COUNT, schema.MAX_SEED):
        bounds = bounds.removesuffix(f" and at most {no_bound}")
    return f"{kind}, {bounds}" if bounds else kind


def main(argv: Sequence[str] | None = None) -> None:
    ArgumentParser(description=__doc__.splitlines()[0]).parse_args(argv)
    with atomic_file(PATH) as temporary:
        temporary.write_text(render(), encoding="utf-8")
    print(PATH)


if __name__ == "__main__":
    command_line(main)
