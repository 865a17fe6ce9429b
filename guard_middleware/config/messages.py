"""How pydantic's errors become messages for operators: the line, what is wrong, and what to write instead.

The remedy is the ``description`` of the nearest field. Values that may be secrets are not repeated.
"""

from __future__ import annotations

import difflib
import re
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from guard_middleware import strictyaml
from guard_middleware.config.content import LimitsSection
from guard_middleware.errors import ConfigError
from guard_middleware.limits import Limits

#: Values that may be secrets, or may hold one by mistake: never repeated in a message.
_NOT_REPEATED = {"api_key_sha256", "url", "headers_from_env", "hmac_key_env"}


_FAULTS = {
    "model_type": "not a mapping",
    "dict_type": "not a mapping",
    "mapping_type": "not a mapping",
    "tuple_type": "not a list",
    "string_type": "not text",
    "string_too_short": "too short",
    "string_too_long": "too long",
    "string_pattern_mismatch": "not in the form that is read here",
    "bool_type": "neither true nor false",
    "int_type": "not a whole number",
    "int_from_float": "not a whole number",
    "float_type": "not a number",
    "greater_than": "too small",
    "greater_than_equal": "too small",
    "less_than": "too large",
    "less_than_equal": "too large",
    "literal_error": "not one of the choices",
}


def config_error(
    error: ValidationError,
    document: strictyaml.Document,
    path: str | None,
    *,
    root: type[BaseModel],
    prefix: strictyaml.Path = (),
) -> ConfigError:
    """The error at the earliest line, as one message; errors lie in the section ``root``, below ``prefix``."""
    errors = error.errors(include_url=False)
    problems = sorted((_problem(e, document, root, prefix) for e in errors), key=lambda p: p[0])
    line, message, remedy = problems[0]
    others = sorted({other for other, _, _ in problems[1:]})
    if others:
        remedy += f" (then see line{'s' if len(others) > 1 else ''} {', '.join(map(str, others))})"
    return ConfigError(message, path=path, line=line if document.lines else None, remedy=remedy)


def _problem(
    error: ErrorDetails, document: strictyaml.Document, root: type[BaseModel], prefix: strictyaml.Path
) -> tuple[int, str, str]:
    """(line, what is wrong, what to write instead) of one pydantic error."""
    context = error.get("ctx", {})
    loc = tuple(step for step in (*prefix, *error["loc"], *context.get("at", ())) if step != "[key]")
    where, parent = _dotted(loc), _dotted(loc[:-1]) or "the file"
    section, description = _schema(root, loc)
    given, fault = error["input"], error["type"]
    remedy = f"write {description}" if description else "write sections, such as `policies:`"
    match fault:
        case "extra_forbidden":
            message = f"unknown key `{str(loc[-1])[:80]}` in {parent}"
            remedy = choose(str(loc[-1]), section.model_fields if section else ())
        case "missing":
            message = f"`{loc[-1]}` is missing in {parent}"
        case "refused":
            message, remedy = f"{where or 'the file'}: {context['reason']}", context["remedy"]
        case _ if given is None:
            message = f"{where} is empty"
        case _:
            message = f"{where or 'the file'}: {_FAULTS.get(fault, 'not valid')}"
            if isinstance(given, str | int | float) and not _NOT_REPEATED & set(loc):
                message += f" ({given!r:.80})"
            if fault == "literal_error" and (near := _near(str(given), re.findall(r"'(\w+)'", context["expected"]))):
                remedy = f"did you mean `{near}`? {remedy}"
            if fault == "string_type":
                remedy = f"put it in quotes; {remedy}"
    return document.line(loc), message, remedy


def _near(given: str, names: Iterable[str]) -> str | None:
    names = list(names)
    near = difflib.get_close_matches(given, names, n=1) or [name for name in names if given and name.startswith(given)]
    return near[0] if near else None


def choose(given: str, names: Iterable[str]) -> str:
    """The remedy for a name that is none of ``names``."""
    near = _near(given, names)
    return f"did you mean `{near}`?" if near else f"choose from {', '.join(names)}"


def _dotted(loc: strictyaml.Path) -> str:
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step[:80]}" for step in loc).removeprefix(".")


def _schema(root: type[BaseModel], loc: strictyaml.Path) -> tuple[type[BaseModel] | None, str]:
    """The section that holds ``loc``, and how to write its value: the nearest description."""
    kind: Any = root
    section: type[BaseModel] | None = None
    description = ""
    for step in loc:
        if type(None) in typing.get_args(kind):
            kind = typing.get_args(kind)[0]
        if kind is Limits:
            kind = LimitsSection
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            section = kind
            field = kind.model_fields.get(str(step))
            if field is None:
                break
            kind, description = field.annotation, field.description or description
            continue
        arguments = typing.get_args(kind)
        kind = arguments[-1] if typing.get_origin(kind) is Mapping else next(iter(arguments), None)
    return section, description
