"""The texts in a JSON value."""

from __future__ import annotations

from typing import Any


def leaves(value: Any) -> list[str]:
    """Every string in ``value``, keys included."""
    if isinstance(value, dict):
        return [*value, *(leaf for item in value.values() for leaf in leaves(item))]
    if isinstance(value, list):
        return [leaf for item in value for leaf in leaves(item)]
    return [value] if isinstance(value, str) else []
