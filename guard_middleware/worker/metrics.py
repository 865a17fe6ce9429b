"""The worker's own figures in the Prometheus text format (version 0.0.4): counters and two histograms."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from guard_middleware.errors import GuardError
from guard_middleware.types import Verdict

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0, 60.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Histogram:
    """Cumulative buckets, as Prometheus wants them."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds, self._counts, self._sum = bounds, [0] * (len(bounds) + 1), 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def lines(self, name: str, help: str) -> Iterable[str]:
        yield f"# HELP {name} {help}"
        yield f"# TYPE {name} histogram"
        total = 0
        for bound, count in zip((*map(str, self._bounds), "+Inf"), self._counts, strict=True):
            total += count
            yield f'{name}_bucket{{le="{bound}"}} {total}'
        yield f"{name}_sum {self._sum}"
        yield f"{name}_count {total}"


class Metrics:
    """Written and read on the event loop only."""

    def __init__(self) -> None:
        self._verdicts: Counter[tuple[str, str]] = Counter()
        self._modes: Counter[tuple[str, bool]] = Counter()
        self._errors: Counter[str] = Counter()
        self._tokens: Counter[str] = Counter()
        self._cancelled = 0
        self._latency, self._batch = Histogram(_SECONDS), Histogram(_SIZES)

    def outcome(self, outcome: Verdict | GuardError, seconds: float) -> None:
        self._latency.observe(seconds)
        if isinstance(outcome, GuardError):
            self._errors[outcome.kind.value] += 1
            return
        self._verdicts[outcome.request, outcome.response or "none"] += 1
        self._modes[outcome.judging.mode, outcome.thought] += 1
        self._tokens["prompt"] += outcome.usage.prompt
        self._tokens["completion"] += outcome.usage.completion
        self._tokens["reasoning"] += outcome.usage.reasoning

    def cancelled(self) -> None:
        """A question whose caller went away."""
        self._cancelled += 1

    def batch(self, size: int, seconds: float) -> None:
        self._batch.observe(size)

    def exposition(self, gauges: Mapping[str, float]) -> str:
        """Everything as text; ``gauges`` are name -> value as of now."""
        lines: list[str] = []
        for name, value in gauges.items():
            lines += [f"# TYPE guard_worker_{name} gauge", f"guard_worker_{name} {value}"]
        lines += ["# HELP guard_worker_verdicts_total Verdicts by label.", "# TYPE guard_worker_verdicts_total counter"]
        for (request, response), count in sorted(self._verdicts.items()):
            lines.append(f'guard_worker_verdicts_total{{request="{request}",response="{response}"}} {count}')
        lines += [
            "# HELP guard_worker_judged_total Verdicts by mode, and whether the guard reasoned.",
            "# TYPE guard_worker_judged_total counter",
        ]
        for (mode, thought), count in sorted(self._modes.items()):
            lines.append(f'guard_worker_judged_total{{mode="{mode}",thought="{str(thought).lower()}"}} {count}')
        lines += ["# HELP guard_worker_errors_total Guard errors by kind.", "# TYPE guard_worker_errors_total counter"]
        lines += [f'guard_worker_errors_total{{kind="{kind}"}} {n}' for kind, n in sorted(self._errors.items())]
        lines += ["# HELP guard_worker_tokens_total Tokens of verdicts.", "# TYPE guard_worker_tokens_total counter"]
        lines += [f'guard_worker_tokens_total{{type="{kind}"}} {n}' for kind, n in sorted(self._tokens.items())]
        lines += [
            "# HELP guard_worker_cancelled_total Questions whose caller went away.",
            "# TYPE guard_worker_cancelled_total counter",
            f"guard_worker_cancelled_total {self._cancelled}",
        ]
        lines += self._latency.lines("guard_worker_seconds", "Seconds from question to answer.")
        lines += self._batch.lines("guard_worker_batch_size", "Prompts per engine batch.")
        return "\n".join(lines) + "\n"
