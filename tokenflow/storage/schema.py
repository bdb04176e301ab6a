"""Checks everything that is read from outside: configs, command lines, manifests, lists, records.

Declare what is expected as a model, and read it with one of the functions below:

    class Row(Model):
        prompt: str = Field(description="what the edited video shows")      # required
        n_frames: int = Field(40, ge=1, le=MAX_COUNT, description="frames to use, at most")
        blend: Literal["sigmoid", "linear"] = Field("sigmoid", description="weights of Eq. 7")
        fps: float | None = Field(None, gt=0, description="frame rate; null: the clip's")

        @model_validator(mode="after")
        def check_rules(self) -> Row:
            if ...: raise ValueError("n_frames: 3 is odd, ...")             # names its keys itself
            return self

    parse(Row, mapping, "clips.yaml")         -> "clips.yaml: n_frames: expected at least 1, got 0"
    load_config(Row, path, ["n_frames=8"])    a YAML file and --set overrides
    add_arguments(parser, Row); from_arguments(Row, parser.parse_args(argv))    a command line

Values are not converted (strict), except whole numbers where a float is expected; unknown keys
are refused. Every fault is a UserError of one line. Lists, mappings and models may be nested:
`clips: list[Row]` gives "clips.yaml: clips: number 3: prompt: expected text, got 7". A validator of
one field raises ValueError("expected a city, got 'x'"): its place is put before it. `ALIASES` are
other names of fields, such as those of the released code. `model_copy(update=...)` does not check.
A `PresetModel` has the key `preset`: a named set of values that keys next to it win over.
"""

from __future__ import annotations

import argparse
import difflib
import logging
import re
import typing
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from tokenflow.storage.yaml_files import MAX_CONFIG_BYTES, load_yaml, parse_yaml
from util import UserError, check_text, shown, shown_key

log = logging.getLogger("tokenflow")

PRESETS_FILE = Path(__file__).parents[2] / "configs" / "presets.yaml"
MAX_COUNT = 1_000_000  # of frames, steps or a batch: far beyond use, far below overflow
Count = Annotated[int, Field(ge=1, le=MAX_COUNT)]
CountOrNull = Annotated[int | None, Field(ge=1, le=MAX_COUNT)]
Share = Annotated[float, Field(ge=0, le=1)]
MAX_SEED = 2**63 - 1  # torch's generators accept no more
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]


class Model(BaseModel):
    """What is expected of a mapping; see the module's docstring."""

    model_config = ConfigDict(
        strict=True,
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        validate_default=False,
        protected_namespaces=(),
    )
    ALIASES: ClassVar[Mapping[str, str]] = {}  # other names of fields, to the field's

    @model_validator(mode="before")
    @classmethod
    def take_aliases(cls, given: Any) -> Any:
        """A mapping with the fields' own names; a validator of a subclass runs before this one."""
        if not isinstance(given, Mapping):
            return given
        values = {}
        for key, value in given.items():
            name = cls.ALIASES.get(key, key)
            if name in values:
                raise ValueError(f"{name} is given twice, under one of its other names too")
            values[name] = value
        return cls.take_preset(values)

    @classmethod
    def take_preset(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Replaces the key `preset` by the values that it stands for, where there is such a key."""
        return values

    @field_validator("*", mode="after")
    @classmethod
    def _texts_can_be_written(cls, value: Any) -> Any:
        for text in _texts(value):
            check_text(text)
        return value


class PresetModel(Model):
    """A model with the key `preset`, which stands for other keys' values in configs/presets.yaml.

    Keys given in the same mapping win over it. What is read has the values, and `preset` no more.
    """

    PRESET_SECTIONS: ClassVar[Sequence[str]] = ()  # of a preset in that file; later ones win

    preset: Literal["paper", "released", "best"] = Field(
        "paper",
        exclude=True,
        description="named set of keys (configs/presets.yaml), which keys given next to it win "
        "over: paper (none), released (the published code's settings) or best (the best edits that "
        "we measured)",
    )

    @classmethod
    def preset_values(cls, name: Any) -> dict[str, Any]:
        """The keys that a preset stands for; none for an unknown name, which is refused later."""
        sections = _presets().get(name, {}) if isinstance(name, str) else {}
        found = [sections.get(section, {}) for section in cls.PRESET_SECTIONS]
        return {key: value for section in found for key, value in section.items()}

    @classmethod
    def take_preset(cls, values: dict[str, Any]) -> dict[str, Any]:
        name = values.get("preset")
        if not isinstance(name, str) or name not in _presets():
            return values
        values = cls.preset_values(name) | values
        del values["preset"]
        return values


@lru_cache
def _presets() -> dict[str, dict[str, dict[str, Any]]]:
    return load_yaml(PRESETS_FILE)


M = TypeVar("M", bound=Model)


def parse(cls: type[M], given: Any, where: str) -> M:
    """Checks a mapping.

    Args:
        where: what the mapping is read from, for errors.

    Raises:
        UserError: a key is unknown or missing, or a value is not as declared; begins with
            "<where>: <key>: ". An error that a validator raises keeps its type.
    """
    return _parse(cls, given, lambda key, fault: _joined(where, key))


def load_config(
    cls: type[M],
    path: str | Path,
    overrides: Sequence[str] = (),
    replaced: Mapping[str, Any] | None = None,
) -> M:
    """Reads a YAML file.

    Args:
        overrides: "key=value" strings that win over the file. The value of a text is taken as it
            stands (except quotes around all of it, and null); others are YAML. A preset among them
            wins over the file's keys too.
        replaced: values in the place of the file's.

    Raises:
        MissingFileError: there is no such file.
        UserError: as for `parse`; begins with "<path>: <key>: " or "--set <key>: ", or names the
            overrides that break a rule between keys.
    """
    values = {**load_yaml(path, MAX_CONFIG_BYTES), **(replaced or {})}
    overridden = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        key = key.strip()
        if not equals or not key:
            raise UserError(f"--set {shown_key(text)}: expected key=value")
        where = f"--set {shown_key(key)}"
        if len(value) > MAX_CONFIG_BYTES:
            raise UserError(f"{where}: longer than {MAX_CONFIG_BYTES >> 10} KB")
        key = cls.ALIASES.get(key, key)
        field = cls.model_fields.get(key)
        overridden[key] = where
        values = {name: values[name] for name in values if cls.ALIASES.get(name) != key}
        values[key] = _override(value, field.annotation if field else str, where)
    if issubclass(cls, PresetModel):
        values = _without_replaced(cls, values, set(overridden), path)

    def place(key: str, fault: str) -> str:
        named = [key] if key else ["preset", *re.findall(r"\w+", fault)]
        words = ", ".join(dict.fromkeys(overridden[name] for name in named if name in overridden))
        if key and words:
            return words
        return f"{path} with {words}" if words else _joined(str(path), key)

    return _parse(cls, values, place)


def _without_replaced(
    cls: type[PresetModel], values: dict[Any, Any], overridden: set[str], path: str | Path
) -> dict[Any, Any]:
    """Leaves out a file's keys that an overriding preset sets; logs those that win over its own."""
    preset = cls.preset_values(values.get("preset"))
    own = {key: cls.ALIASES.get(key, key) for key in values}
    own = {key: name for key, name in own.items() if name in preset and name not in overridden}
    if "preset" in overridden:
        return {key: value for key, value in values.items() if key not in own}
    kept = [f"{key}: {values[key]}" for key, name in own.items() if values[key] != preset[name]]
    if kept and values["preset"] != "paper":
        text = "%s: its own %s win over preset: %s; leave them out to have the preset's"
        log.warning(text, path, ", ".join(kept), values["preset"])
    return values


def add_arguments(parser: argparse.ArgumentParser, cls: type[Model]) -> None:
    """Adds one option for each field to a parser; `from_arguments` reads and checks the values.

    A bool is a flag without a value; one that is true by default has --no_<name> too. A field's
    json_schema_extra holds other arguments of `add_argument`: the "metavar" of its value.
    """
    for name, field in cls.model_fields.items():
        names = [name, *(alias for alias, of in cls.ALIASES.items() if of == name)]
        flags = [f"--{each}" for each in names]
        options: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS}
        if plain_type(field.annotation) is bool:
            parser.add_argument(*flags, action="store_true", help=_help(field), **options)
            if field.default is True:
                flags = [f"--no_{each}" for each in names]
                text = f"do not: see --{name}"
                parser.add_argument(*flags, action="store_false", help=text, **options)
            continue
        choices = choices_of(field.annotation)
        kind = {int: "N", float: "X"}.get(plain_type(field.annotation))
        options["metavar"] = "{" + ",".join(map(str, choices)) + "}" if choices else kind
        options |= {"required": field.is_required(), **(field.json_schema_extra or {})}
        parser.add_argument(*flags, help=_help(field), **options)


def from_arguments(cls: type[M], args: argparse.Namespace) -> M:
    """The model of a command line that `add_arguments` described.

    Raises:
        UserError: a value is not as declared: "--n_frames: 0, expected at least 1".
    """
    given = {}
    for name, value in vars(args).items():
        if name in cls.model_fields:
            given[name], kind = value, plain_type(cls.model_fields[name].annotation)
            if kind in (int, float):
                with suppress(ValueError):  # a word that spells no number is refused below
                    given[name] = kind(value)
    return _parse(cls, given, lambda key, fault: f"--{key}" if key else "", command_line=True)


def expected(annotation: Any) -> str:
    """What a value should be, in words: "a number or null", "one of nn, flow"."""
    choices = choices_of(annotation)
    kind = plain_type(annotation)
    if typing.get_origin(kind) in (typing.Union, UnionType):  # "auto, a whole number or null"
        parts = [part for part in typing.get_args(kind) if part is not type(None)]
        texts = [*map(expected, parts), *(["null"] if _optional(kind) else [])]
        return f"{', '.join(texts[:-1])} or {texts[-1]}" if all(texts) else ""
    if len(choices) == 1:
        return str(choices[0])
    text = f"one of {', '.join(map(str, choices))}" if choices else _KIND_NAMES.get(kind, "")
    return f"{text} or null" if text and _optional(annotation) else text


def limits(field: FieldInfo | None) -> str:
    """A field's range in words, "at least 1 and at most 1000"; empty if it has none."""
    words = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
    rules = field.metadata if field else ()
    found = [(name, getattr(rule, name, None)) for name in words for rule in rules]
    return " and ".join(f"{words[name]} {bound}" for name, bound in found if bound is not None)


def choices_of(annotation: Any) -> tuple[Any, ...]:
    """The only values that a type allows; empty if it is no such type."""
    plain = plain_type(annotation)
    return typing.get_args(plain) if typing.get_origin(plain) is Literal else ()


# ---------------------------------------------------------------- in detail

_KIND_NAMES = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
_MAPPING = "keys and values"
_TYPE_NAMES = {"list_type": "a list", "dict_type": _MAPPING, "model_type": _MAPPING}
_UNKNOWN = ("extra_forbidden", "invalid_key")
_RANGES = ("greater_than", "greater_than_equal", "less_than", "less_than_equal")


def _parse(cls: type[M], given: Any, place: Any, command_line: bool = False) -> M:
    """`place` says where a key of the mapping stands, or the whole of it (""), given its fault."""
    if not isinstance(given, Mapping):
        raise UserError(f"{place('', '')}: expected {_MAPPING}, got {shown(given)}")
    try:
        return cls.model_validate(dict(given))
    except ValidationError as error:
        faults = error.errors(include_url=False)
    # A misspelt key is missing too: the misspelling says more.
    fault = min(faults, key=lambda each: (each["type"] == "missing") - (each["type"] in _UNKNOWN))
    raised = fault.get("ctx", {}).get("error")
    kind = type(raised) if isinstance(raised, UserError) else UserError
    first, *rest = fault["loc"] or ("",)
    *inner, last = [f"number {p + 1}" if isinstance(p, int) else shown_key(p) for p in rest] or [""]
    if fault["type"] in _UNKNOWN and rest:
        last = shown_key(rest[-1])
    where = _joined(place(shown_key(first), str(raised or "")), *inner, last)
    raise kind(f"{where}: {_fault_text(cls, fault, where, command_line)}" if where else str(raised))


def _joined(*parts: str) -> str:
    return ": ".join(part for part in parts if part)


def _fault_text(cls: type[Model], fault: ErrorDetails, where: str, command_line: bool) -> str:
    """What is wrong with one value, without where it stands."""
    if fault["type"] in ("value_error", "assertion_error"):
        return str(fault["ctx"]["error"])
    if fault["type"] in _UNKNOWN:
        owner = plain_type(_declared(cls, fault["loc"][:-1])[0])
        fields = [*owner.model_fields, *owner.ALIASES]
        near = difflib.get_close_matches(shown_key(fault["loc"][-1]), fields, n=1)
        known = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(fields)}"
        return f"unknown key; {known}"
    annotation, field = _declared(cls, fault["loc"])
    text = expected(annotation)
    if fault["type"] == "missing":
        return f"is missing; expected {text}" if text else "is missing"
    if fault["type"] in _RANGES and limits(field):
        text = limits(field)
    elif fault["type"] in ("finite_number", "multiple_of"):
        text = ""  # pydantic says it
    text = text or _TYPE_NAMES.get(fault["type"]) or fault["msg"].removeprefix("Input should be ")
    value = fault["input"]
    got = "nothing" if value is None else shown(value)
    if command_line:
        return f"{got}, expected {text}"
    is_choice = fault["type"] == "literal_error"
    quoted = _quote_hint(value, where) if is_choice or fault["type"] == "string_type" else ""
    if value is None and fault["type"] == "string_type":
        quoted = "; '' is the empty text"
    if is_choice and quoted:  # sd_version: 2.1
        return f"expected text, got {got}{quoted}"
    return f"expected {text}{';' if is_choice else ','} got {got}{quoted}"


def _declared(annotation: Any, loc: Sequence[str | int]) -> tuple[Any, FieldInfo | None]:
    """The type, and the field if it is one's, that a place within a model leads to."""
    field = None
    for part in loc:
        annotation = plain_type(annotation)
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            field = annotation.model_fields.get(str(part))
            annotation = field.annotation if field else Any
        else:  # an item of a list, or a value of a mapping
            annotation, field = (typing.get_args(annotation) or (Any,))[-1], None
    return plain_type(annotation) if field is None else annotation, field


def _override(text: str, annotation: Any, where: str) -> Any:
    """The value of an override; a text is not read as YAML: a prompt may hold "#" or ": "."""
    if not (plain_type(annotation) is str or choices_of(annotation)):
        return parse_yaml(text, where)
    if text.strip() in ("null", "~", *([""] if _optional(annotation) else [])):
        return None
    quoted = len(text) > 1 and text[0] in "'\"" and text.find(text[0], 1) == len(text) - 1
    return text[1:-1] if quoted else text


def plain_type(annotation: Any) -> Any:
    """X of the type `X | None`."""
    kinds = [part for part in typing.get_args(annotation) if part is not type(None)]
    return kinds[0] if _optional(annotation) and len(kinds) == 1 else annotation


def _optional(annotation: Any) -> bool:
    return type(None) in typing.get_args(annotation)


def _texts(value: Any) -> list[str]:
    """The texts in lists and mappings, keys too."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [text for item in value.items() for part in item for text in _texts(part)]
    return [text for part in value for text in _texts(part)] if isinstance(value, list) else []


def _help(field: FieldInfo) -> str:
    text = (field.description or "").replace("%", "%%")
    if field.is_required() or field.default is False or field.default in (None, ""):
        return text
    return f"{text} (default: {field.default})" if field.default is not True else text


def _quote_hint(value: Any, where: str) -> str:
    """Says how to write a number, date or yes/no as text; nothing for lists and mappings."""
    if value is None or isinstance(value, (str, list, dict)):
        return ""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return f"; quote it: {where.rpartition(' ')[2]}: '{value if is_number else '...'}'"
