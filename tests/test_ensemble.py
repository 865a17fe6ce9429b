"""Several guards, one verdict: the rules' truth tables, who is asked and cancelled, and two real workers."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, Literal

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from guard_middleware.caches import Caches
from guard_middleware.config import Config, Ensemble, SourcePolicy, parse
from guard_middleware.ensemble import EnsembleGuard, combine
from guard_middleware.errors import ConfigError, GuardError, GuardErrorKind
from guard_middleware.policy import PolicySet, decide, risk
from guard_middleware.policy_explain import explain
from guard_middleware.telemetry import Telemetry
from guard_middleware.types import NOT_NEEDED, Action, Conversation, Decision, Opinion, Source, Usage, Verdict
from guard_middleware.wire import ModerationRequest
from tests.support.gateway import Gateway, Process, Upstream, chat, scripted_worker
from tests.support.pieces import model, question, record, run, user
from tests.support.records import call
from tests.support.records import record as some_record

Outcome = Verdict | GuardError
HELLO = question(Conversation((user("hello"),)))


def says(score: float, name: str = "m", **more: Any) -> Verdict:
    label: Literal["harmful", "unharmful"] = "harmful" if score >= 0.5 else "unharmful"
    base = Verdict(label, None, score, None, f"Step 1: {name}.", Usage(10, 5, 3), name, "r1")
    return replace(base, **more)


def rules(rule: str, threshold: float = 0.5, of: str = "a b", **more: Any) -> SourcePolicy:
    confident = (0.1, 0.9) if rule == "first_confident" else None
    return SourcePolicy(
        threshold=threshold,
        ensemble=Ensemble(rule=rule, of=tuple(of.split()), confident=confident),  # type: ignore[arg-type]
        **more,
    )


def combined(policy: SourcePolicy, said: Mapping[str, Outcome], source: Source = "input") -> Outcome | None:
    assert policy.ensemble is not None
    return combine(policy.ensemble, policy.threshold, source, said)


def decided(policy: SourcePolicy, source: Source, outcome: Outcome) -> Decision:
    config = Config().policies["default"].model_copy(update={source: policy})
    settings = Config().model_copy(update={"policies": {"default": config}})
    return decide(PolicySet(settings).resolve(path="/"), source, outcome, decision_id="d")


def word(outcome: Outcome | None) -> str:
    if outcome is None:
        return "open"
    if isinstance(outcome, GuardError):
        return outcome.kind.value
    return outcome.request


SAID: Mapping[str, Outcome | None] = {
    "yes": says(0.95),
    "no": says(0.05),
    "maybe": says(0.6),
    "hardly": says(0.4),
    "late": GuardError("timeout", retry_after=2.0),
    "down": GuardError("unavailable", retry_after=1.0),
    "long": GuardError("too_long"),
    "-": None,
}

TABLE = [
    # a, b: any, all, first_confident
    ("yes yes", "harmful harmful harmful"),
    ("yes no", "harmful unharmful harmful"),
    ("no yes", "harmful unharmful unharmful"),
    ("no no", "unharmful unharmful unharmful"),
    ("maybe no", "harmful unharmful unharmful"),
    ("maybe yes", "harmful harmful harmful"),
    ("hardly yes", "harmful unharmful harmful"),
    ("hardly hardly", "unharmful unharmful unharmful"),
    ("maybe hardly", "harmful unharmful unharmful"),
    ("yes late", "harmful harmful harmful"),
    ("late yes", "harmful harmful harmful"),
    ("no late", "timeout timeout unharmful"),
    ("late no", "timeout timeout unharmful"),
    ("hardly late", "timeout timeout timeout"),
    ("maybe late", "harmful harmful harmful"),
    ("down late", "timeout timeout timeout"),
    ("late down", "unavailable unavailable unavailable"),
    ("long late", "too_long too_long too_long"),
    ("late long", "too_long too_long too_long"),
    ("late maybe", "harmful harmful harmful"),
    ("maybe long", "harmful harmful harmful"),
    ("long no", "too_long too_long too_long"),
    ("long yes", "harmful harmful too_long"),
    ("- -", "open open open"),
    ("yes -", "harmful open harmful"),
    ("- yes", "harmful open open"),
    ("no -", "open open unharmful"),
    ("- no", "open open open"),
    ("maybe -", "harmful open open"),
    ("hardly -", "open open open"),
    ("late -", "open open open"),
    ("long -", "open open too_long"),
    ("- late", "open open open"),
]


@pytest.mark.parametrize(("given", "expected"), TABLE, ids=[row for row, _ in TABLE])
def test_what_a_rule_makes_of_two_guards(given: str, expected: str) -> None:
    said = {name: SAID[word] for name, word in zip("ab", given.split(), strict=True)}
    known = {name: outcome for name, outcome in said.items() if outcome is not None}
    found = [word(combined(rules(rule), known)) for rule in ("any", "all", "first_confident")]
    assert " ".join(found) == expected


@pytest.mark.parametrize("rule", ["any", "all", "first_confident"])
def test_harm_that_was_found_does_not_pass_where_a_later_error_would(rule: str) -> None:
    policy = rules(rule, on_error="allow_unscreened")
    outcome = combined(policy, {"a": says(0.6), "b": GuardError("timeout")})
    assert outcome is not None
    assert decided(policy, "input", outcome).action is Action.BLOCK


def test_a_label_without_a_score_is_not_confident() -> None:
    bare = replace(says(0.95), response="unharmful", response_score=None)
    assert word(combined(rules("first_confident"), {"a": bare}, "output")) == "open"


def test_a_guard_that_finds_harm_below_the_threshold_does_not_outvote_an_error() -> None:
    said = {"a": says(0.6), "b": GuardError("timeout")}
    assert word(combined(rules("any", threshold=0.5), said)) == "harmful"
    assert word(combined(rules("any", threshold=0.8), said)) == "timeout"


def test_a_score_under_a_half_is_harmful_where_the_threshold_says_so() -> None:
    outcome = combined(rules("any", threshold=0.3), {"a": says(0.35), "b": GuardError("timeout")})
    assert isinstance(outcome, Verdict)
    assert outcome.request_score == 0.35


@pytest.mark.parametrize("rule", ["any", "all", "first_confident"])
@pytest.mark.parametrize(
    "broken",
    [
        says(0.05, request_score=float("nan")),
        says(0.05, request_score=1.5),
        says(0.05, request="fine"),
    ],
    ids=["no number", "no probability", "no label"],
)
def test_a_verdict_that_judges_nothing_is_an_error_of_its_guard(rule: str, broken: Verdict) -> None:
    assert word(combined(rules(rule, of="a"), {"a": broken})) == "unparseable"


@pytest.mark.parametrize("rule", ["any", "all", "first_confident"])
def test_a_verdict_on_the_request_alone_is_none_on_the_answer(rule: str) -> None:
    assert word(combined(rules(rule, of="a"), {"a": says(0.05)}, "output")) == "unparseable"


def test_one_verdict_names_those_who_gave_it() -> None:
    a = says(0.2, "nano", categories=("x", "y"), timings=(("queue", 1.0), ("generate", 2.0)), drawn_text=("hi",))
    b = says(0.7, "big", categories=("y", "z"), timings=(("generate", 5.0),), left_out=(("images", 2),), thought=False)
    side, turn = combined(rules("any"), {"a": a, "b": b}), combined(rules("first_confident"), {"a": a, "b": b})
    assert isinstance(side, Verdict)
    assert isinstance(turn, Verdict)
    assert side.model == "any(a: nano, b: big)"
    assert turn.model == "first_confident(a: nano, b: big)"
    assert side.revision == "a: r1, b: r1"
    assert side.reasoning == "[a]\nStep 1: nano.\n\n[b]\nStep 1: big."
    assert side.usage == Usage(20, 10, 6)
    assert side.categories == ("x", "y", "z")
    assert side.drawn_text == ("hi",)
    assert side.left_out == (("images", 2),)
    assert side.thought
    assert dict(side.timings) == {"queue": 1.0, "generate": 5.0}
    assert dict(turn.timings) == {"queue": 1.0, "generate": 7.0}
    assert (turn.request, turn.request_score) == ("harmful", 0.7)


def test_the_wait_that_errors_ask_for_is_the_longest() -> None:
    outcome = combined(rules("all"), {"a": GuardError("timeout", retry_after=3.0), "b": GuardError("overloaded")})
    assert isinstance(outcome, GuardError)
    assert outcome.retry_after == 3.0


TEXT_UNREAD, IMAGE_UNREAD = says(0.05, ignored=("text",)), says(0.05, ignored=("image",))
UNREAD = [
    # a, b: what a policy makes of it under any, all, first_confident
    (TEXT_UNREAD, SAID["no"], "allow allow allow"),
    (TEXT_UNREAD, SAID["yes"], "harmful harmful harmful"),
    (SAID["no"], TEXT_UNREAD, "allow allow allow"),
    (SAID["hardly"], TEXT_UNREAD, "allow allow media"),
    (TEXT_UNREAD, TEXT_UNREAD, "media media media"),
    (TEXT_UNREAD, IMAGE_UNREAD, "allow allow media"),
    (says(0.95, ignored=("text",)), SAID["no"], "harmful allow harmful"),
    (says(0.95, ignored=("text",)), IMAGE_UNREAD, "harmful harmful harmful"),
    (says(0.6, ignored=("text",)), IMAGE_UNREAD, "harmful harmful media"),
]


@pytest.mark.parametrize(("first", "second", "expected"), UNREAD)
def test_no_harm_in_what_a_guard_was_told_to_ignore_is_no_verdict_on_it(
    first: Verdict, second: Verdict, expected: str
) -> None:
    found = []
    for rule in ("any", "all", "first_confident"):
        outcome = combined(rules(rule), {"a": first, "b": second})
        assert outcome is not None
        decision = decided(rules(rule), "input", outcome)
        found.append("allow" if decision.action is Action.ALLOW else decision.error or "harmful")
    assert found == expected.split()


def test_alone_a_guard_that_was_told_to_ignore_something_can_only_block() -> None:
    alone = SourcePolicy(on_error="allow_unscreened")
    unread, harm = (decided(alone, "input", says(score, ignored=("text",))) for score in (0.05, 0.95))
    assert (unread.action, unread.error, harm.action, harm.error) == (Action.BLOCK, "media", Action.BLOCK, None)


# -- for every set of verdicts --

SCORES = st.floats(0, 1)
LABELS = st.sampled_from(["harmful", "unharmful"])
VERDICTS = st.builds(
    lambda label, score, answer: replace(
        says(0.0), request=label, request_score=score, response=label, response_score=answer
    ),
    LABELS,
    SCORES,
    SCORES,
)
IGNORING = VERDICTS.map(lambda one: replace(one, ignored=("text",)))
ERRORS = st.sampled_from(list(GuardErrorKind)).map(GuardError)
SOURCES: st.SearchStrategy[Source] = st.sampled_from(["input", "output"])
THRESHOLDS = st.floats(0.01, 0.99)
NAMES = "abcd"


def policy_of(rule: str, threshold: float, count: int) -> SourcePolicy:
    confident = (threshold / 2, (1 + threshold) / 2) if rule == "first_confident" else None
    ensemble = Ensemble(rule=rule, of=tuple(NAMES[:count]), confident=confident)  # type: ignore[arg-type]
    return SourcePolicy(threshold=threshold, ensemble=ensemble)


@given(st.lists(VERDICTS, min_size=1, max_size=4), THRESHOLDS, SOURCES)
def test_an_ensemble_blocks_exactly_where_the_rule_over_its_guards_would(
    verdicts: list[Verdict], threshold: float, source: Source
) -> None:
    blocked = [(risk(v, source) or 0.0) >= threshold for v in verdicts]
    for rule, expected in (("any", any(blocked)), ("all", all(blocked))):
        policy = policy_of(rule, threshold, len(verdicts))
        outcome = combined(policy, dict(zip(NAMES, verdicts, strict=False)), source)
        assert isinstance(outcome, Verdict)
        assert ((risk(outcome, source) or 0.0) >= threshold) == expected


@given(
    st.sampled_from(["any", "all", "first_confident"]),
    st.lists(VERDICTS | IGNORING | ERRORS, min_size=1, max_size=4),
    st.data(),
    THRESHOLDS,
    SOURCES,
)
def test_an_early_outcome_is_the_final_one_and_the_final_one_always_comes(
    rule: str, outcomes: list[Outcome], data: st.DataObject, threshold: float, source: Source
) -> None:
    policy = policy_of(rule, threshold, len(outcomes))
    said = dict(zip(NAMES, outcomes, strict=False))
    order = data.draw(st.permutations(list(said)))
    final = combined(policy, said, source)
    assert final is not None
    for count in range(len(order)):
        early = combined(policy, {name: said[name] for name in order[:count]}, source)
        if early is not None:
            assert decided(policy, source, early).action == decided(policy, source, final).action


@given(st.sampled_from(["any", "all", "first_confident"]), st.lists(ERRORS, min_size=1, max_size=4), THRESHOLDS)
def test_errors_alone_are_never_a_verdict(rule: str, errors: list[GuardError], threshold: float) -> None:
    outcome = combined(policy_of(rule, threshold, len(errors)), dict(zip(NAMES, errors, strict=False)))
    assert isinstance(outcome, GuardError)
    assert outcome.kind in {error.kind for error in errors}


@given(st.lists(VERDICTS, max_size=3), ERRORS, st.integers(0, 3), THRESHOLDS, SOURCES)
def test_an_error_under_any_and_all_never_passes(
    verdicts: list[Verdict], error: GuardError, at: int, threshold: float, source: Source
) -> None:
    outcomes: list[Outcome] = [*verdicts[:at], error, *verdicts[at:]]
    for rule in ("any", "all"):
        policy = policy_of(rule, threshold, len(outcomes))
        outcome = combined(policy, dict(zip(NAMES, outcomes, strict=False)), source)
        assert outcome is not None
        assert decided(policy, source, outcome).action is Action.BLOCK


# -- who is asked, and for how long --


class Member:
    """Answers after ``seconds``; ``asked`` keeps the deadlines."""

    def __init__(self, outcome: Outcome, seconds: float = 0.0) -> None:
        self.outcome, self.seconds = outcome, seconds
        self.asked: list[float] = []
        self.cancelled = 0

    async def moderate(self, request: ModerationRequest) -> Outcome:
        self.asked.append(request.deadline)
        try:
            async with asyncio.timeout(request.deadline):
                await asyncio.sleep(self.seconds)
        except TimeoutError:
            return GuardError("timeout")
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return self.outcome


async def ask(policy: SourcePolicy, request: ModerationRequest = HELLO, **members: Member) -> tuple[Outcome, float]:
    loop = asyncio.get_running_loop()
    began = loop.time()
    outcome = await EnsembleGuard(policy, members).moderate(request)
    return outcome, loop.time() - began


def told(outcome: Outcome) -> list[tuple[str, str]]:
    return [(o.guard, o.verdict.request if o.verdict else str(o.error)) for o in outcome.opinions]


def test_any_asks_side_by_side_and_cancels_who_is_not_needed() -> None:
    async def work() -> None:
        a, b = Member(says(0.05), 30.0), Member(says(0.95), 0.05)
        outcome, seconds = await ask(rules("any"), a=a, b=b)
        assert word(outcome) == "harmful"
        assert told(outcome) == [("a", NOT_NEEDED), ("b", "harmful")]
        assert (a.cancelled, seconds < 2.0) == (1, True)

    run(work())


def test_all_waits_for_everybody_side_by_side() -> None:
    async def work() -> None:
        a, b = Member(says(0.05), 0.2), Member(says(0.95), 0.2)
        outcome, seconds = await ask(rules("all"), a=a, b=b)
        assert word(outcome) == "unharmful"
        assert told(outcome) == [("a", "unharmful"), ("b", "harmful")]
        assert seconds < 0.38

    run(work())


def test_the_first_that_is_confident_spares_the_next() -> None:
    async def work() -> None:
        a, b = Member(says(0.05)), Member(says(0.95))
        outcome, _ = await ask(rules("first_confident"), a=a, b=b)
        assert told(outcome) == [("a", "unharmful")]
        assert not b.asked

    run(work())


def test_one_that_hangs_leaves_the_next_its_share_of_the_time() -> None:
    async def work() -> None:
        a, b = Member(says(0.05), 30.0), Member(says(0.95), 0.05)
        outcome, seconds = await ask(rules("first_confident"), replace(HELLO, deadline=0.6), a=a, b=b)
        assert told(outcome) == [("a", "timeout"), ("b", "harmful")]
        assert a.asked == [pytest.approx(0.3, abs=0.05)]
        assert b.asked == [pytest.approx(0.3, abs=0.1)]
        assert seconds < 0.6
        second = outcome.opinions[1]
        assert second.began == pytest.approx(0.3, abs=0.1)
        assert second.seconds == pytest.approx(0.05, abs=0.1)

    run(work())


@pytest.mark.parametrize("rule", ["any", "all", "first_confident"])
def test_no_verdict_by_the_deadline_is_an_error_and_not_later(rule: str) -> None:
    async def work() -> None:
        members = {"a": Member(says(0.3), 30.0), "b": Member(says(0.3), 30.0)}
        outcome, seconds = await ask(rules(rule), replace(HELLO, deadline=0.3), **members)
        assert word(outcome) == "timeout"
        assert told(outcome) == [("a", "timeout"), ("b", "timeout")]
        assert seconds < 0.6

    run(work())


@pytest.mark.parametrize("rule", ["any", "all", "first_confident"])
def test_who_goes_away_cancels_every_guard(rule: str) -> None:
    async def work() -> None:
        members = [Member(says(0.3), 30.0), Member(says(0.3), 30.0)]
        guard = EnsembleGuard(rules(rule), dict(zip("ab", members, strict=True)))
        task = asyncio.create_task(guard.moderate(HELLO))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert [one.cancelled for one in members if one.asked] == [1] * (1 if rule == "first_confident" else 2)

    run(work())


def test_a_defect_of_one_guard_is_raised_and_the_others_end() -> None:
    class Defect(Member):
        async def moderate(self, request: ModerationRequest) -> Outcome:
            raise RuntimeError("a defect")

    async def work() -> None:
        other = Member(says(0.05), 30.0)
        with pytest.raises(RuntimeError):
            await ask(rules("all"), a=Defect(says(0.0)), b=other)
        assert other.cancelled == 1

    run(work())


# -- what is known of one guard answers for no other --


def caches(guards: Mapping[str, Member]) -> Caches:
    text = """
    guards: {big: {url: http://127.0.0.1:1}}
    policies: {default: {input: {ensemble: {rule: any, of: [worker, big]}}}}
    """
    return Caches(parse(text), guards, Telemetry(), environ={})


def test_guards_of_one_name_and_revision_keep_their_verdicts_apart() -> None:
    async def work() -> None:
        small, big = Member(says(0.05, "same")), Member(says(0.95, "same"))
        both = caches({"worker": small, "big": big})
        for _ in range(3):
            assert word(await both.guards["worker"].moderate(HELLO)) == "unharmful"
            assert word(await both.guards["big"].moderate(HELLO)) == "harmful"
        assert (len(small.asked), len(big.asked)) == (1, 1)
        await both.aclose()

    run(work())


def test_an_ensemble_asks_only_the_guards_that_have_not_judged_this_yet() -> None:
    async def work() -> None:
        small, big = Member(says(0.05)), Member(says(0.05))
        both = caches({"worker": small, "big": big})
        await both.guards["worker"].moderate(HELLO)
        policy = rules("any", of="worker big")
        outcome = await EnsembleGuard(policy, both.guards).moderate(HELLO)
        again = await EnsembleGuard(policy, both.guards).moderate(HELLO)
        assert isinstance(outcome, Verdict)
        assert isinstance(again, Verdict)
        assert [o.verdict.cached for o in outcome.opinions if o.verdict] == [True, False]
        assert (outcome.cached, again.cached) == (False, True)
        assert (again.usage, len(small.asked), len(big.asked)) == (Usage(), 1, 1)
        await both.aclose()

    run(work())


def test_an_answer_is_left_out_later_only_for_guards_that_judged_it() -> None:
    async def work() -> None:
        members = {"worker": Member(says(0.05)), "big": Member(says(0.05))}
        both = caches(members)
        asked = Conversation((user("hello"),))
        told = model("It is a fine day for bread. " * 100)
        answered = replace(asked, answer=told)
        clean = says(0.05, response="unharmful", response_score=0.05)
        for name, one in members.items():
            await both.guards[name].moderate(question(asked))
            one.outcome = clean
            await both.guards[name].moderate(question(answered, "output"))
            one.outcome = says(0.05)
        by_one = (Opinion("worker", clean, None, 0.0, 0.1), Opinion("big", None, "timeout", 0.0, 0.1))
        whole = record(asked, [told], [("input", None, says(0.05)), ("output", 0, clean)])
        calls = tuple(replace(c, opinions=by_one) if c.source == "output" else c for c in whole.calls)
        both.settled(replace(whole, calls=calls))
        await asyncio.sleep(0)
        later = question(replace(asked, messages=(*asked.messages, told, user("and then?"))))
        left = {name: dict((await both.guards[name].moderate(later)).left_out) for name in members}  # type: ignore[union-attr]
        assert left["worker"].get("characters", 0) > 500
        assert left["big"] == {}
        await both.aclose()

    run(work())


# -- what is told of it --


def spans_of(outcome: Outcome) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The attributes of the question's span and of each guard's below it, in order."""
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    telemetry = Telemetry(provider, MeterProvider())
    asked = telemetry.request("POST", "/v1/chat/completions", ()).guard_call("input", None)
    settings = Config()
    policy = PolicySet(settings).resolve(path="/")
    asked.end(outcome, decide(policy, "input", outcome, decision_id="d"))
    *members, question = exporter.get_finished_spans()
    assert {one.parent.span_id for one in members if one.parent} == {question.context.span_id}
    values = [{**(one.attributes or {}), "name": one.name, "status": one.status.status_code.name} for one in members]
    return dict(question.attributes or {}), values


def test_a_span_has_one_below_it_for_each_guard() -> None:
    async def work() -> None:
        a, b = Member(says(0.05, "nano")), Member(says(0.95, "big"), 0.05)
        question, members = spans_of((await ask(rules("all"), a=a, b=b))[0])
        assert question["gen_ai.guardrail.result.value"] == "unharmful"
        found = [(one["name"], one["guard_middleware.guard"], one["gen_ai.evaluation.score.label"]) for one in members]
        assert found == [("chat nano", "a", "unharmful"), ("chat big", "b", "harmful")]

    run(work())


def test_a_span_tells_an_error_of_a_guard_from_one_that_was_not_needed() -> None:
    async def work() -> None:
        a, b, c = Member(GuardError("timeout")), Member(says(0.95), 0.05), Member(says(0.95), 30.0)
        question, members = spans_of((await ask(rules("any", of="a b c"), a=a, b=b, c=c))[0])
        assert question["gen_ai.guardrail.result.value"] == "harmful"
        assert [(one["name"], one["status"]) for one in members] == [
            ("chat a", "ERROR"),
            ("chat m", "UNSET"),
            ("chat c", "UNSET"),
        ]
        assert (members[0]["error.type"], members[2]["guard_middleware.cancelled"]) == ("timeout", True)

    run(work())


def test_an_error_that_another_guard_outvoted_is_still_counted_by_the_name_of_its_guard() -> None:
    reader = InMemoryMetricReader()
    telemetry = Telemetry(TracerProvider(), MeterProvider([reader]))
    opinions = (
        Opinion("a", None, "timeout", 0.0, 1.0),
        Opinion("b", says(0.95), None, 0.0, 0.1),
        Opinion("c", None, NOT_NEEDED, 0.0, 0.1),
    )
    finished = some_record(calls=(replace(call("input", says(0.95)), opinions=opinions),))
    telemetry.request("POST", "/v1/chat/completions", ()).finish(finished)
    data = reader.get_metrics_data()
    assert data is not None
    metrics = [m for r in data.resource_metrics for scope in r.scope_metrics for m in scope.metrics]
    points = next(m.data.data_points for m in metrics if m.name == "guard_middleware.guard.errors")
    assert [dict(point.attributes or {}) for point in points] == [
        {"gen_ai.guardrail.source": "input", "error.type": "timeout", "guard_middleware.guard": "a"}
    ]


# -- configuration --

TWO = "guards: {big: {url: http://127.0.0.1:1}}\n"


def one_policy(ensemble: str, before: str = TWO, more: str = "") -> str:
    return f"{before}policies: {{default: {{input: {{ensemble: {ensemble}{more}}}}}}}\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (one_policy("{rule: some, of: [big]}"), "not one of the choices"),
        (one_policy("{rule: any}"), "`of` is missing"),
        (one_policy("{rule: any, of: []}"), "of: not valid"),
        (one_policy("{rule: any, of: [big, big]}"), "named twice"),
        (one_policy("{rule: any, of: [big, bigg]}"), "`bigg` is not defined -- did you mean `big`"),
        (one_policy("{rule: any, of: [worker]}"), "no policy asks the guard `big`"),
        (one_policy("{rule: any, of: [big], confident: [0.1, 0.9]}"), "`confident` has no effect"),
        (one_policy("{rule: first_confident, of: [worker, big]}"), "write confident:"),
        (one_policy("{rule: first_confident, of: [worker, big], confident: [0.9, 0.1]}"), "no range"),
        (one_policy("{rule: first_confident, of: [worker, big], confident: [0.6, 0.9]}"), "on one side"),
        (one_policy("{rule: first_confident, of: [big], confident: [0.1, 0.4]}", more=", threshold: 0.3"), None),
        (
            one_policy("{rule: any, of: [worker]}", before="guards: {worker: {url: http://127.0.0.1:1}}\n"),
            "name of the",
        ),
        ("guards: {big: {url: x}}\n", "not an http"),
    ],
)
def test_an_ensemble_that_cannot_work_is_refused_with_the_remedy(text: str, message: str | None) -> None:
    if message is None:
        parse(text)
        return
    with pytest.raises(ConfigError, match=message):
        parse(text)


def test_only_guards_that_a_request_may_meet_are_started() -> None:
    assert list(Config().guards_in_use()) == ["worker"]
    alone = parse(TWO + "policies: {default: &p {input: &s {ensemble: {rule: any, of: [big]}}, output: *s}}\n")
    assert list(alone.guards_in_use()) == ["big"]
    idle = parse(one_policy("{rule: any, of: [worker, big]}").replace("default", "unused"))
    assert list(idle.guards_in_use()) == ["worker"]


def test_explain_says_who_judges() -> None:
    config = parse(one_policy("{rule: all, of: [worker, big]}"))
    text = explain(PolicySet(config).resolve(path="/"), config, path="/")
    assert "judged by worker, big: harmful where all of them find it harmful" in text
    assert "passes what one of worker, big does not find harmful" in text


# -- the gateway and two workers --

POLICIES = {
    "both": {"input": {"ensemble": {"rule": "any", "of": ["worker", "large"]}, "deadline": "1s"}},
    "cheap": {
        "input": {
            "ensemble": {"rule": "first_confident", "of": ["worker", "large"], "confident": [0.1, 0.9]},
            "deadline": "1s",
        }
    },
}


class Stage:
    def __init__(self, gateway: Gateway, small: Process, large: Process, upstream: Upstream) -> None:
        self.gateway, self.small, self.large, self.upstream = gateway, small, large, upstream

    def post(self, text: str, tenant: str) -> tuple[httpx.Response, list[tuple[str, str]]]:
        """The answer, and what each guard said of the request."""
        response = self.gateway.post(chat(text), headers={"x-tenant": tenant})
        first = self.gateway.record(response)["decisions"][0]
        said = [(o["guard"], o["error"] or o["verdict"]["request"]) for o in first["opinions"]]
        return response, said


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    folder = tmp_path_factory.mktemp("ensemble")
    a, b = folder / "a.sock", folder / "b.sock"
    config = {
        "guards": {"large": {"socket": str(b), "manage": False}},
        "policies": POLICIES,
        "tenants": {"header": "x-tenant", "match": [{"tenant": name, "policy": name} for name in POLICIES]},
    }
    with ExitStack() as stack:
        small = stack.enter_context(scripted_worker(a, "--model", "small"))
        large = stack.enter_context(scripted_worker(b, "--model", "large", "--phrase", "hot-wire a car"))
        upstream = stack.enter_context(Upstream())
        gateway = stack.enter_context(Gateway(folder, upstream.url, a, config))
        yield Stage(gateway, small, large, upstream)


@pytest.mark.parametrize(
    ("tenant", "text", "status", "said"),
    [
        ("both", "bake bread", 200, "worker unharmful large unharmful"),
        ("both", "pick a lock", 400, "worker harmful large"),
        ("both", "hot-wire a car", 400, "worker * large harmful"),
        ("cheap", "bake bread", 200, "worker unharmful"),
        ("cheap", "pick a lock", 400, "worker harmful"),
        ("cheap", "hot-wire a car", 200, "worker unharmful"),
        ("cheap", "[unsure] hot-wire a car", 400, "worker unharmful large harmful"),
        ("cheap", "[unsure] bake bread", 200, "worker unharmful large unharmful"),
    ],
)
def test_two_workers_judge_as_the_rule_says_and_the_record_has_both(
    stage: Stage, tenant: str, text: str, status: int, said: str
) -> None:
    response, opinions = stage.post(text, tenant)
    assert response.status_code == status, response.text
    expected = said.split()
    found = [word for pair in opinions for word in pair][: len(expected)]
    assert [w if e != "*" else "*" for w, e in zip(found, expected, strict=True)] == expected


def test_a_worker_that_hangs_blocks_unless_another_finds_harm_or_is_sure(stage: Stage) -> None:
    stage.large.popen.send_signal(signal.SIGSTOP)
    try:
        response, opinions = stage.post("bake bread", "both")
        assert (response.status_code, opinions) == (503, [("worker", "unharmful"), ("large", "timeout")])
        assert not stage.upstream.of("nothing")
        response, opinions = stage.post("pick a lock", "both")
        assert (response.status_code, opinions[0]) == (400, ("worker", "harmful"))
        response, opinions = stage.post("bake bread", "cheap")
        assert (response.status_code, opinions) == (200, [("worker", "unharmful")])
        response, opinions = stage.post("[unsure] bake bread", "cheap")
        assert (response.status_code, opinions[1]) == (503, ("large", "timeout"))
    finally:
        stage.large.popen.send_signal(signal.SIGCONT)
