"""What is kept of a decision: telemetry, the decision log, and what is redacted from both.

Refuses patterns and replacements that cannot be used; the key of the digests is named by environment variable.
"""

from __future__ import annotations

import re
from typing import Self

from pydantic import Field, model_validator

from guard_middleware.config.section import Section
from guard_middleware.configtypes import Env, Pattern, refuse


class Telemetry(Section):
    capture_content: bool = Field(
        default=False, description="true or false: whether spans carry prompts and answers in clear"
    )
    service_name: str = Field(
        default="guard-gateway", min_length=1, max_length=128, description="the OpenTelemetry service.name"
    )


class Redaction(Section):
    pattern: Pattern = Field(description="a Python regular expression, quoted with ''")
    replacement: str = Field(default="[redacted]", description="what replaces a match, such as '[email]'")

    @model_validator(mode="after")
    def _template(self) -> Self:
        try:
            re.compile(self.pattern).sub(self.replacement, "")
        except (re.error, IndexError) as error:
            raise refuse(
                f"a replacement that cannot be used ({error})", "double each backslash", "replacement"
            ) from None
        return self


class Audit(Section):
    """``include_reasoning`` and ``redact`` hold for spans and records alike."""

    path: str | None = Field(
        default=None, min_length=1, description="the decision log's file; left out, no log is written"
    )
    include_reasoning: bool = Field(
        default=True, description="true or false: whether spans and records carry the guard's reasoning"
    )
    capture_content: bool = Field(
        default=False, description="true or false: whether records carry prompts and answers in clear"
    )
    redact: tuple[Redaction, ...] = Field(
        default=(), description="a list, such as [{pattern: '[0-9]{16}', replacement: '[card]'}]"
    )
    hmac_key_env: Env = Field(
        default="GUARD_MIDDLEWARE_HMAC_KEY",
        description="NAME of the environment variable that holds the key of content digests",
    )
