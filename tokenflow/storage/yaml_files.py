"""YAML files: read with limits, written atomically."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from util import UserError, atomic_file, existing_file, shown

MAX_YAML_BYTES = 4 << 20  # of any YAML file: a manifest of 20,000 files
MAX_CONFIG_BYTES = 256 << 10  # of what a user writes: the parser takes seconds for so much
_MAX_YAML_NODES = 1_000_000  # of a file with every alias written out
_MAX_NUMBER_LENGTH = 1000  # of a number or date as YAML spells it
# Numbers of base 60, 8 and 2: YAML 1.1's, which other readers take for text or decimal numbers.
_OTHER_BASE = re.compile(r"[-+]?[0-9_]+:[0-9_:.]+|[-+]?0[0-9_]+|[-+]?0b[01_]+")
_TEXT_TAG = "tag:yaml.org,2002:str"


class _YamlLoader(yaml.SafeLoader):
    """The safe loader, without the ways in which a short text takes endless time or memory.

    It refuses a key given twice too (YAML would silently take the last).
    """

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None and _written_out(node, {}) > _MAX_YAML_NODES:
            raise yaml.YAMLError("its aliases stand for too much")
        return node

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    problem = f"the key {shown(key.value)} is given twice"
                    raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
                seen.add(key.value)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        is_text = not isinstance(node, yaml.ScalarNode) or node.tag == _TEXT_TAG
        if not is_text and len(node.value) > _MAX_NUMBER_LENGTH:
            problem = f"{shown(node.value)} is too long for a number; text needs quotes"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        if not is_text and not node.style and _OTHER_BASE.fullmatch(node.value):
            problem = f"{shown(node.value)} is no decimal number: write one, or quote it as text"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        try:
            return super().construct_object(node, deep)
        except (LookupError, AttributeError) as error:  # of "!!bool x", "!!timestamp x", "!!int ''"
            problem = f"a value is not what its tag {node.tag} says"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark) from error


def _written_out(node: yaml.Node, known: dict[int, float]) -> float:
    """How many nodes a tree has with every alias written out; infinite if one holds itself."""
    if id(node) not in known:
        known[id(node)] = math.inf  # while it is counted
        if isinstance(node, yaml.MappingNode):
            children = [child for pair in node.value for child in pair]
        else:
            children = node.value if isinstance(node, yaml.SequenceNode) else []
        known[id(node)] = 1 + sum(_written_out(child, known) for child in children)
    return known[id(node)]


def parse_yaml(text: str | bytes, where: str) -> Any:
    """Reads YAML of plain values.

    Raises:
        UserError: it is not valid; begins with `where`.
    """
    try:
        return yaml.load(text, Loader=_YamlLoader)
    except yaml.MarkedYAMLError as error:
        line = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{where}: not valid YAML{line}: {error.problem}") from error
    except RecursionError as error:
        raise UserError(f"{where}: not valid YAML: nested too deep") from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise UserError(f"{where}: not valid YAML: {error}") from error


def save_yaml(path: str | Path, mapping: Mapping[str, Any]) -> None:
    """Write a mapping as YAML, in its own order."""
    text = yaml.safe_dump(dict(mapping), sort_keys=False, allow_unicode=True)
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def load_yaml(path: str | Path, limit: int = MAX_YAML_BYTES) -> dict[Any, Any]:
    """Read a YAML mapping; no YAML tag can make anything but plain values.

    Args:
        limit: how many bytes the file may have.

    Raises:
        MissingFileError: there is no such file.
        UserError: it is too large, not valid YAML (names the line), or not a mapping.
    """
    with open(existing_file(path), "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise UserError(f"{path}: larger than the {limit >> 10} KB that such a file may have")
    value = parse_yaml(data, str(path))
    if not isinstance(value, dict):
        found = "nothing" if value is None else type(value).__name__
        raise UserError(f"{path}: expected a mapping (key: value), found {found}")
    return value
