"""What content is taken in: images that are fetched, fields that a dialect does not know, and limits.

Refuses limits that no image could keep. The keys of ``limits`` are the fields of ``limits.Limits``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Literal

from pydantic import Field, GetCoreSchemaHandler, create_model
from pydantic_core import CoreSchema, core_schema

from guard_middleware.config.section import Section
from guard_middleware.configtypes import Bytes, FieldName, Origin, Seconds, refuse
from guard_middleware.limits import Limits


class Images(Section):
    fetch: bool = Field(
        default=True, description="true or false: whether http(s) image URLs are fetched (false refuses them)"
    )
    allow: tuple[Origin, ...] = Field(
        default=(),
        description="a list of host:port that may be fetched although they are not public, such as [images.corp:443]",
    )


class Dialect(Section):
    extra_fields: Mapping[FieldName, Literal["moderated", "opaque"]] = Field(
        default={}, description="field: moderated (the guard reads it) or opaque (passed UNREAD)"
    )


_DIALECT = Field(default=Dialect(), description="a mapping, such as {extra_fields: {context: moderated}}")


class Dialects(Section):
    chat_completions: Dialect = _DIALECT
    completions: Dialect = _DIALECT
    messages: Dialect = _DIALECT
    responses: Dialect = _DIALECT


def _limit(field: dataclasses.Field[Any]) -> tuple[Any, Any]:
    if field.name.endswith("_seconds"):
        return Seconds, Field(
            default=field.default, description="a duration of more than 0 and at most 10m, such as 5s"
        )
    if field.name.endswith("_bytes"):
        return Bytes, Field(default=field.default, description="a size of more than 0 and at most 2GiB, such as 20MB")
    if field.type == "float":
        return float, Field(default=field.default, ge=1, le=1e6, description="a number from 1")
    top = 256 if field.name == "json_depth" else 10**9
    return int, Field(default=field.default, gt=0, le=top, description=f"a whole number from 1 to {top}")


LimitsSection = create_model(
    "LimitsSection",
    __base__=Section,
    **{field.name: _limit(field) for field in dataclasses.fields(Limits)},  # type: ignore[call-overload]
)


class AsLimits:
    """Validates as ``LimitsSection`` (so that errors keep their place) and yields ``limits.Limits``."""

    @staticmethod
    def __get_pydantic_core_schema__(source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(
            AsLimits.build,
            handler.generate_schema(LimitsSection),
            serialization=core_schema.plain_serializer_function_ser_schema(asdict),
        )

    @staticmethod
    def build(section: Any) -> Limits:
        limits = Limits(**dict(section))
        if limits.image_min_side > limits.image_max_side:
            raise refuse("the shortest side is longer than the longest", "swap the two values", "image_min_side")
        return limits
