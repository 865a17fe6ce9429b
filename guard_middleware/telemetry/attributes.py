"""Names and values that spans and metrics share: constants, the decision of a whole request, text made safe to emit.

No text is refused: ``clean`` cuts it, and neither ``clean`` nor ``utf8`` leaves what an exporter cannot encode.
"""

from __future__ import annotations

from opentelemetry.trace import Span, Status, StatusCode
from opentelemetry.util.types import AttributeValue

from guard_middleware.errors import REJECT_STATUS, RejectKind
from guard_middleware.types import Action, Basis, Record

#: The draft of the guardrail conventions that these names follow.
CONVENTION = "apply_guardrail@2026-09"
COMPONENT = "GuardMiddleware"
PROVIDER = "guard_middleware"
#: The key of ``Record.timings`` that holds the seconds from the upstream's first byte to the release.
HOLD_BACK = "hold_back"

Attributes = dict[str, AttributeValue]

_SEVERITY = {Action.ALLOW: 0, Action.ANNOTATE: 1, Action.BLOCK: 2}
_TEXT_LIMIT = 256
_LIMITS = frozenset(kind.value for kind in RejectKind if REJECT_STATUS[kind] == 413)


def overall_decision(record: Record) -> tuple[Action, Basis] | None:
    """The decision of the whole request: the most severe of its calls; a refusal is a block on limit or coverage.

    None where nothing was decided: no call and no refusal.
    """
    if record.calls:
        worst = max(record.calls, key=lambda call: _SEVERITY[call.decision.action]).decision
        return worst.action, worst.basis
    if record.outcome == "rejected":
        return Action.BLOCK, Basis.LIMIT if record.error in _LIMITS else Basis.COVERAGE
    return None


def fail(span: Span, kind: str) -> None:
    """Marks a span as failed."""
    kind = clean(kind)
    span.set_attribute("error.type", kind)
    span.set_status(Status(StatusCode.ERROR, kind))


def clean(text: str) -> str:
    """At most 256 characters of it, as ``utf8``."""
    return utf8(text[:_TEXT_LIMIT])


def utf8(text: str) -> str:
    """All of it, with ``?`` for what UTF-8 cannot say."""
    # One lone surrogate would make the exporter drop the whole batch.
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")
