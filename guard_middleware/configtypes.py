"""The kinds of values that a configuration file holds: durations, sizes, URLs, names, networks, patterns.

Each is an annotated type for pydantic that refuses with a reason and a remedy (``refuse``); all are pure.
"""

from __future__ import annotations

import ipaddress
import re
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo
from pydantic_core import PydanticCustomError


def refuse(reason: str, remedy: str, *at: str | int) -> PydanticCustomError:
    """A refusal of a valid shape; ``at`` leads from the value that is validated to the part that is wrong."""
    return PydanticCustomError("refused", "{reason}", {"reason": reason, "remedy": remedy, "at": at})


_DURATION = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,6})?)(ms|s|m)")
_SIZE = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,3})?) ?(B|kB|KB|KiB|MB|MiB|GB|GiB)")
_SIZE_UNITS = {"B": 1, "kB": 10**3, "KB": 10**3, "KiB": 2**10, "MB": 10**6, "MiB": 2**20, "GB": 10**9, "GiB": 2**30}


def _duration(value: Any, info: ValidationInfo) -> Any:
    if isinstance(value, str) and (match := _DURATION.fullmatch(value)):
        return float(match[1]) * {"ms": 0.001, "s": 1.0, "m": 60.0}[match[2]]
    if isinstance(value, str) or (info.context is not None and not isinstance(value, bool)):
        raise refuse("not a duration", "write a number and its unit: 500ms, 2s or 1m")
    return value


_AGE = re.compile(r"([0-9]{1,6})(s|m|h|d)")


def _age(value: Any, info: ValidationInfo) -> Any:
    if isinstance(value, str) and (match := _AGE.fullmatch(value)):
        return float(match[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86_400}[match[2]]
    if isinstance(value, str) or (info.context is not None and not isinstance(value, bool)):
        raise refuse("not an age", "write a whole number and its unit: 90s, 15m, 12h or 7d")
    return value


def _size(value: Any) -> Any:
    if isinstance(value, str):
        if match := _SIZE.fullmatch(value):
            return round(float(match[1]) * _SIZE_UNITS[match[2]])
        raise refuse("not a size", "write bytes, or a number and its unit: 512kB, 20MB, 8MiB")
    return value


Seconds = Annotated[float, Field(gt=0, le=600), BeforeValidator(_duration)]
Age = Annotated[float, Field(ge=1, le=30 * 86_400), BeforeValidator(_age)]
Bytes = Annotated[int, Field(gt=0, le=2**31), BeforeValidator(_size)]


def _url(value: str) -> str:
    try:
        parts = urlsplit(value)
        host, _ = parts.hostname or "", parts.port
    except ValueError:
        host, parts = "", urlsplit("")
    if parts.scheme not in ("http", "https") or not re.fullmatch(r"[a-z0-9._-]+|[0-9a-f:.]+", host):
        raise refuse("not an http(s) URL", "write scheme, host and base path: http://127.0.0.1:8000/v1")
    if parts.username is not None or parts.password is not None:
        raise refuse("a URL that holds credentials", "send them as a header: upstream.headers_from_env")
    if parts.query or parts.fragment or not value.isascii() or re.search(r"[\s\\]", value):
        raise refuse("a URL with more than scheme, host, port and path", "write http://127.0.0.1:8000/v1")
    return value.rstrip("/")


def _host_port(value: str) -> str:
    match = re.fullmatch(r"([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]):([0-9]{1,5})", value)
    if not match or not 1 <= int(match[2]) <= 65535:
        raise refuse("not host:port", "write one host and one port, without scheme, path or wildcard: images.corp:443")
    return value.lower()


def _header(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,64}", value):
        raise refuse("not a header name", "write letters, digits and -: x-tenant")
    return value


def _path(value: str) -> str:
    stem = value.removesuffix("/*")
    if (stem and not re.fullmatch(r"(/[A-Za-z0-9._~!$&'()+,;=:@-]+)+/?", stem)) or not value.startswith("/"):
        raise refuse(
            "not a path", "write a path as clients send it (/v1/chat/completions), or a prefix that ends in /*"
        )
    if {".", ".."} & set(stem.split("/")):
        raise refuse("a path with dot segments", "write the path that they lead to")
    return value


def _network(value: str) -> str:
    if value == "unix":
        return value
    try:
        network = ipaddress.ip_network(value)
    except ValueError:
        try:
            meant = f"did you mean {ipaddress.ip_network(value, strict=False)}? "
        except ValueError:
            meant = ""
        raise refuse("not a network", f"{meant}write an address, a CIDR such as 10.0.0.0/8, or unix") from None
    if network.prefixlen == 0:
        raise refuse("a network that holds every address", "name your proxies: any client could choose its tenant")
    return str(network)


def _sha256(value: str) -> str:
    if not re.fullmatch(r"[0-9a-fA-F]{64}", value):
        raise refuse("not a SHA-256 in hex", 'write 64 hex digits: printf %s "$KEY" | sha256sum (never the key itself)')
    return value.lower()


def _pattern(value: str) -> str:
    try:
        empty = re.compile(value).search("") is not None
    except re.error as error:
        raise refuse(
            f"not a regular expression ({error.msg})", "write a Python regular expression, quoted with ''"
        ) from None
    if empty:
        raise refuse(
            "a pattern that matches the empty text", "use + instead of *, so that it takes at least one character"
        )
    return value


Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]
Env = Annotated[str, Field(pattern=r"^[A-Z_][A-Z0-9_]{0,127}$")]
HeaderName = Annotated[str, AfterValidator(_header)]  # in the case in which it is written
Url = Annotated[str, AfterValidator(_url)]
Origin = Annotated[str, AfterValidator(_host_port)]
Network = Annotated[str, AfterValidator(_network)]
RoutePath = Annotated[str, AfterValidator(_path)]
Sha256 = Annotated[str, AfterValidator(_sha256)]
Pattern = Annotated[str, AfterValidator(_pattern)]
FieldName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_.-]{0,127}$")]
