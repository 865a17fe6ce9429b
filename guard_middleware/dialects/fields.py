"""The allow-list machinery that every dialect shares: one rule per field, one walk per object.

A dialect declares tables of ``name -> Rule``; ``admit`` applies one table to one JSON object and hands back
what may be sent on, apart from what must first be read. A field outside the table passes only as a number, a
boolean or null, unless the operator named it. Names count as content too: an unknown name must be a short
token, must not be a case variant of a known one (lenient upstreams would read it), and must not name guards. In
what chat templates may print whole (``printed``: tools, messages, parts, calls) the guard reads unknown names too.

Refuses (with ``FieldError``): unknown fields that can carry text, values of the wrong JSON type, over-long or
oddly spelled tokens and identifiers, switches whose effect cannot be screened.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum

from guard_middleware.dialects.base import Options
from guard_middleware.errors import RejectKind
from guard_middleware.strictjson import JSONValue, dumps


class Rule(Enum):
    """What is done with one field."""

    TEXT = "a string that the guard reads"
    JSON = "any value; its JSON text is what the guard reads"
    NESTED = "read by its own table or function; never passed as it came"
    SCALAR = "a number, a boolean or null"
    WORD = "a short word such as an enumeration's"
    WORDS = "an object or list of a few short words, numbers and booleans"
    CHOICE = "a short word, or an object; the guard reads it unless it is one of the usual words"
    NUMBERS = "an object of numbers, at any depth; strings in it are dropped"
    IDENTIFIER = "an opaque printable string of bounded length without spaces, passed unread"
    SEALED = "what the model service encrypted or signed for itself: base64 that is not text, passed unread"
    OFF = "a switch that may only be off: its effect cannot be screened"
    REFUSED = "never accepted, unless null"
    DROPPED = "removed, unless null, before the value is sent on or released"


Table = Mapping[str, Rule]

#: vendors' ways to have the upstream see an image at another size than the guard: of a request, or of one image
RESIZING: Table = dict.fromkeys(
    (
        "max_dynamic_patch",
        "max_pixels",
        "min_dynamic_patch",
        "min_pixels",
        "resized_height",
        "resized_width",
        "vl_high_resolution_images",
    ),
    Rule.REFUSED,
)

_WORD = re.compile(r"[A-Za-z0-9_.:/-]{1,64}")
_IDENTIFIER = re.compile(r"[!-~]{1,256}")
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_GUARD = re.compile(r"guard|moderat", re.IGNORECASE)
#: in the name of an option: it is about a guard, ours or the upstream's
_GUARD_OPTION = re.compile(r"guard|moderat|safe|content_?filter|jailbreak", re.IGNORECASE)
_SEALED = re.compile(r"[A-Za-z0-9+/_-]{0,1048576}={0,2}")
_SHORT = 256
_LEAVES = 32
#: words of options that need no reading
USUAL = ("auto", "none", "required", "any", "validated", "minimal", "low", "medium", "high", "xhigh", "max", "default")


class FieldError(Exception):
    """Inside the dialects only: the entry points turn it into ``RequestRejected`` or ``UpstreamError``."""

    def __init__(self, kind: RejectKind, path: str, reason: str) -> None:
        self.kind, self.path = kind, path
        self.message = f"{path}: {reason}" if path else reason
        super().__init__(self.message)


def invalid(path: str, reason: str) -> FieldError:
    return FieldError(RejectKind.INVALID_REQUEST, path, reason)


def unsupported_field(path: str, reason: str) -> FieldError:
    return FieldError(RejectKind.UNSUPPORTED_FIELD, path, reason)


def unsupported_content(path: str, reason: str) -> FieldError:
    return FieldError(RejectKind.UNSUPPORTED_CONTENT, path, reason)


@dataclass(slots=True)
class Admitted:
    """One object after its table: ``kept`` is sent on; ``texts`` and ``extras`` (by name) are for the guard.

    ``kept`` holds everything but NESTED and DROPPED fields; the reader adds what it made of the NESTED ones.
    """

    kept: dict[str, JSONValue] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    extras: dict[str, str] = field(default_factory=dict)


def join(path: str, name: str) -> str:
    """The public path of a member; a name that is not a short token is content and is left out."""
    shown = name if _NAME.fullmatch(name) else "?"
    return f"{path}.{shown}" if path else shown


def as_object(value: JSONValue, path: str) -> dict[str, JSONValue]:
    if not isinstance(value, dict):
        raise invalid(path, "must be an object")
    return value


def as_list(value: JSONValue, path: str, longest: int) -> list[JSONValue]:
    if not isinstance(value, list):
        raise invalid(path, "must be an array")
    if len(value) > longest:
        raise invalid(path, f"has more than {longest} items")
    return value


def as_str(value: JSONValue, path: str) -> str:
    if not isinstance(value, str):
        raise invalid(path, "must be a string")
    return value


def as_word(value: JSONValue, path: str) -> str:
    if not isinstance(value, str) or not _WORD.fullmatch(value):
        raise invalid(path, "must be a short word")
    return value


def as_identifier(value: JSONValue, path: str) -> str:
    if not isinstance(value, str) or not _IDENTIFIER.fullmatch(value):
        raise invalid(path, "must be at most 256 printable characters without spaces")
    return value


def as_sealed(value: JSONValue, path: str) -> str:
    """Base64 of bytes that are no text. Short values are identifiers: some servers sign with one."""
    if not isinstance(value, str) or not _SEALED.fullmatch(value) or (len(value) > _SHORT and _seals_text(value)):
        raise invalid(path, "must be base64 of something encrypted")
    return value


def _seals_text(value: str) -> bool:
    padded = value.rstrip("=").replace("+", "-").replace("/", "_")
    try:
        base64.urlsafe_b64decode(padded + "=" * (-len(padded) % 4)).decode("utf-8")
    except UnicodeDecodeError:
        return False
    except binascii.Error:
        return True
    return True


def as_flag(value: JSONValue, path: str) -> bool:
    """A boolean that may be null or missing."""
    if value is not None and not isinstance(value, bool):
        raise invalid(path, "must be a boolean")
    return bool(value)


def refuse_guards(names: Iterable[str], path: str = "") -> None:
    """Refuses a name of an option that is about guards: the client cannot configure them."""
    for name in names:
        if _GUARD_OPTION.search(name):
            raise unsupported_field(join(path, name), "cannot configure a guard")


def json_text(value: JSONValue) -> str:
    """What the guard reads of a structure: its text itself, or its compact JSON."""
    return value if isinstance(value, str) else dumps(value).decode("utf-8")


def is_scalar(value: JSONValue) -> bool:
    return value is None or isinstance(value, bool | int | float)


def in_order(source: Mapping[str, JSONValue], kept: dict[str, JSONValue]) -> dict[str, JSONValue]:
    """``kept`` with its keys in the order in which they came."""
    return {name: kept[name] for name in source if name in kept}


def admit(table: Table, value: JSONValue, path: str, options: Options, *, printed: bool = False) -> Admitted:
    """Apply ``table`` to the object ``value``; raises ``FieldError``.

    ``printed`` objects may stand in a prompt with all their keys: an unknown name is read with its value, or is
    left out with its null.
    """
    result = Admitted()
    for name, item in as_object(value, path).items():
        rule = table.get(name)
        if rule is None:
            _unknown(table, name, item, join(path, name), options, result, printed)
            continue
        where = f"{path}.{name}" if path else name  # not join: what a table names is fit to be shown
        if item is None and rule is not Rule.NESTED:
            result.kept[name] = None
        elif rule is Rule.TEXT:
            result.texts[name] = as_str(item, where)
            result.kept[name] = item
        elif rule is Rule.JSON:
            result.texts[name] = json_text(item)
            result.kept[name] = item
        elif rule not in (Rule.DROPPED, Rule.NESTED):
            result.kept[name] = _constrained(rule, item, where)
    return result


def _unknown(
    table: Table, name: str, item: JSONValue, where: str, options: Options, result: Admitted, printed: bool
) -> None:
    said = options.extra_fields.get(name)
    if said is None:
        if not _NAME.fullmatch(name) or name.casefold().replace("-", "_") in table or _GUARD.search(name):
            raise unsupported_field(where, "is not a field of this API")
        if not is_scalar(item):
            raise unsupported_field(where, "is unknown and can carry content, which could not be moderated")
        if printed:
            if item is None:
                return
            result.extras[name] = f"{name} {json_text(item)}"
    elif said == "moderated" and item is not None:
        result.extras[name] = json_text(item)
    result.kept[name] = item


def _constrained(rule: Rule, item: JSONValue, where: str) -> JSONValue:
    # Many servers write "" where they have nothing to say, and clients send back the items that they got.
    if item == "" and rule in (Rule.WORD, Rule.IDENTIFIER):
        return item
    match rule:
        case Rule.SCALAR:
            if not is_scalar(item):
                raise invalid(where, "must be a number or a boolean")
            return item
        case Rule.WORD:
            return as_word(item, where)
        case Rule.IDENTIFIER:
            return as_identifier(item, where)
        case Rule.SEALED:
            return as_sealed(item, where)
        case Rule.OFF:
            if item is False or (type(item) is int and item == 0):
                return item
            raise unsupported_field(where, "is not available, because its effect cannot be moderated")
        case Rule.WORDS:
            _only_words(item, where)
            return item
        case Rule.CHOICE:
            return as_word(item, where) if not isinstance(item, dict) else item
        case Rule.NUMBERS:
            return _numbers(as_object(item, where))
        case _:
            raise unsupported_field(where, "is not available, because it cannot be moderated")


def _only_words(value: JSONValue, where: str) -> None:
    queue: list[JSONValue] = [value]
    leaves = 0
    while queue:
        item = queue.pop()
        leaves += 1
        if leaves > _LEAVES:
            raise invalid(where, f"has more than {_LEAVES} values")
        if isinstance(item, dict):
            queue.extend(item)
            queue.extend(item.values())
        elif isinstance(item, list):
            queue.extend(item)
        elif isinstance(item, str) and not _WORD.fullmatch(item):
            raise invalid(where, "may hold short words only")


def _numbers(value: dict[str, JSONValue]) -> dict[str, JSONValue]:
    kept: dict[str, JSONValue] = {}
    for name, item in value.items():
        if not _NAME.fullmatch(name):
            continue
        if is_scalar(item):
            kept[name] = item
        elif isinstance(item, dict):
            kept[name] = _numbers(item)
    return kept
