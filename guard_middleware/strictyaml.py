"""YAML as plain data that remembers its lines, for configuration written by people.

The tree holds only dict, tuple, str, int, float, bool and None. Every refusal is a ``ConfigError`` that
names the line and what to write instead.

Refuses:
    - more than ``MAX_CHARS`` characters, ``MAX_VALUES`` values after aliases are expanded, ``MAX_DEPTH`` levels
    - more than one document, broken syntax, control characters
    - every tag beyond text, number, true/false, null, list and mapping: configuration is data, never objects
    - the same key twice in one mapping, keys that are not text, merge keys (``<<``)
    - ``yes no on off``: YAML 1.1 reads them as true and false, YAML 1.2 as text
    - octal, hexadecimal, base-60 (``1:30``) and underscored numbers, ``.nan``, ``.inf``, bare dates
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import yaml

from guard_middleware.errors import ConfigError

MAX_CHARS = 256 * 1024
MAX_VALUES = 20_000
MAX_DEPTH = 24

Path = tuple[str | int, ...]

_TAG = "tag:yaml.org,2002:"
_INT = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_FLOAT = re.compile(r"[-+]?[0-9]+\.[0-9]*([eE][-+][0-9]{1,3})?")
_BOOL = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}


@dataclass(frozen=True, slots=True)
class Document:
    """``value`` is the tree; ``lines`` gives the 1-based line on which each key or item is written."""

    value: Any
    lines: dict[Path, int]

    def line(self, path: Path) -> int:
        """The line of ``path``, or of its nearest ancestor that is written in the file."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, 1)


def parse(text: str, *, path: str | None = None) -> Document:
    """The tree in ``text`` (an empty document is an empty mapping); raises ``ConfigError`` and nothing else."""
    if len(text) > MAX_CHARS:
        raise ConfigError(
            f"the file has more than {MAX_CHARS} characters",
            path=path,
            remedy="a configuration is a few pages; check that this is the right file",
        )
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        return Document({}, {}) if node is None else _Reader(path).document(node)
    except yaml.reader.ReaderError as error:
        raise ConfigError(
            "a control character that YAML does not allow",
            path=path,
            line=text.count("\n", 0, error.position) + 1,
            remedy="save the file as plain UTF-8 text",
        ) from None
    except yaml.MarkedYAMLError as error:
        raise _syntax(error, path) from None
    except RecursionError:
        raise ConfigError("the file is nested too deeply", path=path, remedy=_NESTING) from None


_NESTING = f"use at most {MAX_DEPTH} levels, and no alias (*name) inside its own anchor (&name)"


def _syntax(error: yaml.MarkedYAMLError, path: str | None) -> ConfigError:
    mark = error.problem_mark or error.context_mark
    problem = error.problem or error.context or "broken YAML"
    if "\\t" in problem:
        remedy = "indent with spaces, not tabs"
    elif "single document" in (error.context or ""):
        remedy = "keep one document in the file; remove the `---` in its middle"
    elif "alias" in problem:
        remedy = "define the anchor (&name) above its first use, or quote a value that begins with *"
    else:
        remedy = "check indentation, and quote values that hold `: `, `#`, `{`, `[`, `%` or `@`"
    return ConfigError(f"not YAML: {problem}", path=path, line=mark.line + 1 if mark else None, remedy=remedy)


class _Reader:
    def __init__(self, path: str | None) -> None:
        self.path = path
        self.lines: dict[Path, int] = {}
        self.values = 0

    def document(self, node: yaml.Node) -> Document:
        return Document(self.read(node, ()), self.lines)

    def refuse(self, node: yaml.Node, message: str, remedy: str) -> ConfigError:
        return ConfigError(message, path=self.path, line=node.start_mark.line + 1, remedy=remedy)

    def read(self, node: yaml.Node, at: Path) -> Any:
        self.values += 1
        if self.values > MAX_VALUES:
            raise self.refuse(
                node, f"more than {MAX_VALUES} values", "use fewer aliases (*name): each use counts again"
            )
        if len(at) > MAX_DEPTH:
            raise self.refuse(node, "the file is nested too deeply", _NESTING)
        self.lines.setdefault(at, node.start_mark.line + 1)
        if isinstance(node, yaml.MappingNode) and node.tag == f"{_TAG}map":
            return self.mapping(node, at)
        if isinstance(node, yaml.SequenceNode) and node.tag == f"{_TAG}seq":
            return tuple(self.read(item, (*at, index)) for index, item in enumerate(node.value))
        if isinstance(node, yaml.ScalarNode):
            return self.scalar(node)
        raise self.tag(node)

    def mapping(self, node: yaml.MappingNode, at: Path) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if key_node.tag == f"{_TAG}merge":
                raise self.refuse(
                    key_node, "merge keys (<<) are not read", "write the keys out, or use an alias for the whole value"
                )
            key = self.scalar(key_node) if isinstance(key_node, yaml.ScalarNode) else None
            if not isinstance(key, str):
                raise self.refuse(key_node, "a key that is not text", "put the key in quotes")
            if key in result:
                raise self.refuse(
                    key_node,
                    f"the key `{key[:80]}` is given twice (first on line {self.lines[(*at, key)]})",
                    "keep one of the two",
                )
            self.lines[(*at, key)] = key_node.start_mark.line + 1
            result[key] = self.read(value_node, (*at, key))
        return result

    def scalar(self, node: yaml.ScalarNode) -> str | int | float | bool | None:
        text = node.value
        match node.tag.removeprefix(_TAG):
            case "str":
                return str(text)
            case "null":
                return None
            case "bool" if text in _BOOL:
                return _BOOL[text]
            case "bool":
                raise self.refuse(
                    node,
                    f"`{text}` is true or false in one YAML version and text in another",
                    "write true, false, or quote it",
                )
            case "int" if _INT.fullmatch(text) and len(text) <= 18:
                return int(text)
            case "float" if _FLOAT.fullmatch(text):
                return float(text)
            case "int" | "float":
                raise self.refuse(
                    node,
                    "a number in a form that YAML versions read differently",
                    "write a plain decimal number, or quote it",
                )
            case "timestamp":
                raise self.refuse(node, "a bare date", "quote it")
            case _:
                raise self.tag(node)

    def tag(self, node: yaml.Node) -> ConfigError:
        return self.refuse(
            node,
            f"the tag `{node.tag.replace(_TAG, '!!')[:80]}` is not read: a configuration is data and runs no code",
            "remove the tag",
        )
