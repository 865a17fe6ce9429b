"""What the guard decided, in LiteLLM's own logging record: verdict and reasoning, never in the client's answer."""

from __future__ import annotations

import importlib
import logging
import sys
import time
from typing import Any

from litellm.types.guardrails import GuardrailEventHooks

from guard_integrations.litellm.turn import Turn
from guard_middleware.config import Config
from guard_middleware.evidence import Redactor
from guard_middleware.types import Action, Basis, GuardCall, Record

logger = logging.getLogger(__name__)

PROVIDER = "guard_middleware"


#: what LiteLLM imports for each entry, to emit a span
_SPANS = "litellm.integrations.otel.logger"


def _settle_spans() -> None:
    """Has LiteLLM look for its spans' module once, not once for each entry: a failing import costs milliseconds."""
    try:
        importlib.import_module(_SPANS)
    except ImportError:
        sys.modules[_SPANS] = None  # type: ignore[assignment]


class Report:
    """Adds one entry for each decision. Reasoning follows ``audit.include_reasoning`` and ``audit.redact``."""

    def __init__(self, guardrail: Any, config: Config) -> None:
        _settle_spans()
        self._guardrail = guardrail
        self._reasoning = config.audit.include_reasoning
        self._redact = Redactor([(rule.pattern, rule.replacement) for rule in config.audit.redact])

    def add(self, turn: Turn, data: dict[str, Any]) -> None:
        """Once for each turn. Never raises: a log that is lost changes no outcome."""
        record = turn.record
        if record is None or turn.reported:
            return
        turn.reported = True
        try:
            if not record.calls:
                status = _status(record.outcome, None)
                self._entry(data, _refusal(record), status, GuardrailEventHooks.pre_call, 0.0, {})
            for call in record.calls:
                self._decision(record, call, data)
        except Exception:
            logger.exception("the decision %s is not in LiteLLM's log", record.id)

    def _decision(self, record: Record, call: GuardCall, data: dict[str, Any]) -> None:
        decision, verdict = call.decision, call.decision.verdict
        said: dict[str, Any] = {
            "decision_id": decision.id,
            "source": decision.source,
            "action": str(decision.action),
            "would": str(decision.would),
            "basis": str(decision.basis),
            "error": decision.error,
            "policy": decision.policy,
            "policy_digest": decision.policy_digest,
            "tenant": record.tenant,
        }
        detail: dict[str, Any] = {
            "guardrail_id": decision.id,
            "policy_template": decision.policy,
            "detection_method": "reasoning guard model",
            "guardrail_action": str(decision.action),
        }
        if verdict is not None:
            score = verdict.score(decision.source)
            said |= {
                "label": verdict.label(decision.source),
                "score": score,
                "categories": list(verdict.categories),
                "model": verdict.model,
                "revision": verdict.revision,
            }
            if self._reasoning:
                said["reasoning"] = self._redact(verdict.reasoning)
            detail |= {"confidence_score": score, "violation_categories": list(verdict.categories)}
        hook = GuardrailEventHooks.pre_call if decision.source == "input" else GuardrailEventHooks.post_call
        self._entry(data, said, _status(record.outcome, call), hook, call.seconds, detail)

    def _entry(
        self, data: dict[str, Any], said: Any, status: str, hook: Any, seconds: float, detail: dict[str, Any]
    ) -> None:
        now = time.time()
        self._guardrail.add_standard_logging_guardrail_information_to_request_data(
            guardrail_json_response={name: value for name, value in said.items() if value is not None},
            request_data=data,
            guardrail_status=status,
            start_time=now - seconds,
            end_time=now,
            duration=seconds,
            guardrail_provider=PROVIDER,
            event_type=hook,
            tracing_detail=detail,
        )


def _refusal(record: Record) -> dict[str, Any]:
    return {"decision_id": record.id, "action": "reject", "error": record.error, "policy": record.policy}


def _status(outcome: str, call: GuardCall | None) -> str:
    """LiteLLM's word: a refusal is an intervention, a missing verdict a failure, never a success."""
    if call is None:
        return "guardrail_intervened" if outcome == "rejected" else "not_run"
    if call.decision.basis is Basis.ERROR:
        return "guardrail_failed_to_respond"
    return "guardrail_intervened" if call.decision.action is Action.BLOCK else "success"
