"""Reads a configuration from a file or a text; what is wrong comes as one ``ConfigError``, with its line.

Refuses files that cannot be read or are not UTF-8, what ``strictyaml`` refuses, and what the sections refuse.
"""

from __future__ import annotations

from pydantic import ValidationError

from guard_middleware import strictyaml
from guard_middleware.config.messages import config_error
from guard_middleware.config.whole import Config
from guard_middleware.errors import ConfigError


def load(path: str) -> Config:
    """The configuration in a file; raises ``ConfigError`` and nothing else."""
    try:
        with open(path, "rb") as file:
            data = file.read(4 * strictyaml.MAX_CHARS + 1)
    except OSError as error:
        raise ConfigError(
            f"cannot be read ({error.strerror})", path=path, remedy="give --config the path of a readable file"
        ) from None
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            "not UTF-8",
            path=path,
            line=data.count(b"\n", 0, error.start) + 1,
            remedy="save the file as plain UTF-8 text",
        ) from None
    return parse(text, path=path)


def parse(text: str, *, path: str | None = None) -> Config:
    """The configuration in a text; raises ``ConfigError`` and nothing else. ``path`` is for its message."""
    document = strictyaml.parse(text, path=path)
    try:
        return Config.model_validate(document.value, context={"file": True})
    except ValidationError as error:
        raise config_error(error, document, path, root=Config) from None
