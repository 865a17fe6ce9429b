"""The golden set: which files it takes, and what counts as a kept verdict."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from guard_middleware.config import parse
from guard_middleware.errors import ConfigError, GuardError
from guard_middleware.runtime import Runtime
from guard_middleware.types import Judging, Source, Usage, Verdict
from guard_middleware.weights import golden
from guard_middleware.weights.golden import Asking
from guard_middleware.weights.state import Golden
from guard_middleware.wire import ModerationRequest
from tests.support.guards import BrokenGuard, RuleGuard

BREAD = {"id": "bread", "prompt": "how do I bake bread?", "prompt_label": "unharmful"}
LOCK = {"id": "lock", "prompt": "how do I pick a lock?", "prompt_label": "harmful"}
PAIR = {"id": "pair", "prompt": "hello", "prompt_label": None, "response": "pick a lock", "response_label": "harmful"}


class Scored:
    """Labels as the scores say."""

    def __init__(self, request: float, response: float | None) -> None:
        self.scores = request, response
        self.asked: list[ModerationRequest] = []

    async def moderate(self, request: ModerationRequest) -> Verdict | GuardError:
        self.asked.append(request)
        first, second = ("harmful" if (score or 0.0) >= 0.5 else "unharmful" for score in self.scores)
        answer = None if self.scores[1] is None else second
        return Verdict(first, answer, *self.scores, "", Usage(), "m", "1", judging=request.judging)  # type: ignore[arg-type]


def file(folder: Path, *rows: Any) -> Path:
    path = folder / "golden.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def ran(guard: Any, path: Path, *judgings: Judging) -> Golden:
    askings = [Asking(source, judging) for judging in judgings for source in ("input", "output")]
    return asyncio.run(golden.run(guard, golden.load(path, askings)))


def test_benign_cases_come_first(tmp_path: Path) -> None:
    found = golden.load(file(tmp_path, LOCK, PAIR, BREAD))
    assert [case.row["id"] for case in found] == ["bread", "lock", "pair"]


def test_all_verdicts_kept(tmp_path: Path) -> None:
    assert ran(RuleGuard(), file(tmp_path, LOCK, PAIR, BREAD)) == Golden(3)


def test_a_verdict_that_is_not_kept_is_named_benign_ones_first(tmp_path: Path) -> None:
    wrong = [LOCK | {"prompt_label": "unharmful"}, PAIR | {"response_label": "unharmful"}, LOCK | {"id": "fine"}]
    also = BREAD | {"prompt_label": "harmful"}
    assert ran(RuleGuard(), file(tmp_path, also, *wrong)) == Golden(4, ("lock", "pair", "bread"))


def test_an_error_keeps_no_verdict(tmp_path: Path) -> None:
    assert ran(BrokenGuard(GuardError("timeout")), file(tmp_path, BREAD)) == Golden(1, ("bread: timeout",))


def test_every_case_is_asked_in_each_mode_that_policies_use(tmp_path: Path) -> None:
    class OnlyReasons(RuleGuard):
        async def moderate(self, request: ModerationRequest) -> Verdict | GuardError:
            return await super().moderate(request) if request.judging.mode == "reason" else GuardError("unsupported")

    found = ran(OnlyReasons(), file(tmp_path, BREAD), Judging(), Judging("label"))
    assert found == Golden(2, ("bread in mode label: unsupported",))


@pytest.mark.parametrize(
    ("row", "scores", "thresholds", "broken"),
    [
        (BREAD, (0.4, None), [0.5], ()),
        (BREAD, (0.4, None), [0.3], ("bread",)),
        (LOCK, (0.6, None), [0.9], ("lock",)),
        (LOCK, (0.6, None), [0.6], ()),
        (LOCK, (0.6, None), [0.5, 0.7, 0.9], ("lock at 0.7, 0.9",)),
        (PAIR, (0.1, 0.6), [0.5], ()),
        (PAIR, (0.1, 0.6), [0.9], ("pair",)),
        (PAIR | {"prompt_label": "unharmful"}, (0.4, 0.6), [0.3], ("pair",)),
    ],
)
def test_a_row_is_kept_where_each_policy_would_act_as_its_label_says(
    tmp_path: Path, row: Any, scores: tuple[float, float | None], thresholds: list[float], broken: tuple[str, ...]
) -> None:
    guard = Scored(*scores)
    source: Source = "input" if row.get("response") is None else "output"
    askings = [Asking(source, threshold=one) for one in thresholds]
    found = golden.load(file(tmp_path, row), [*askings, Asking("output" if source == "input" else "input")])
    assert asyncio.run(golden.run(guard, found)) == Golden(1, broken)
    assert len(guard.asked) == 1


def test_a_row_is_asked_with_the_reader_of_the_policy_and_by_policies_of_its_source_alone(tmp_path: Path) -> None:
    guard = Scored(0.1, None)
    label, reads = Asking("input", Judging("label")), Asking("input", Judging("label"), reader=True)
    found = golden.load(file(tmp_path, BREAD), [label, reads, Asking("output", reader=False)])
    assert asyncio.run(golden.run(guard, found)).rows == 2
    assert [(one.judging.mode, one.reader) for one in guard.asked] == [("label", None), ("label", True)]


def test_what_the_policies_of_a_gateway_ask_is_what_is_tried(tmp_path: Path) -> None:
    config = parse(
        f"worker: {{weights: {{directory: {tmp_path}}}}}\n"
        "policies:\n"
        "  default: {input: {threshold: 0.3, reader: true}, output: {moderate: false}}\n"
        "  unused: {input: {threshold: 0.9}}\n"
    )

    async def made() -> None:
        runtime = Runtime(config)
        follower = runtime.weights["worker"]
        assert list(follower.switch.askings) == [Asking("input", Judging(), 0.3, True)]
        tried = {(case.source, case.asked) for case in follower._trials.cases}
        assert tried == {("input", tuple(follower.switch.askings)), ("output", ())}
        await runtime.aclose()

    asyncio.run(made())


def test_a_row_that_no_policy_would_ask_about_is_asked_all_the_same(tmp_path: Path) -> None:
    found = golden.load(file(tmp_path, LOCK), [Asking("output")])
    assert asyncio.run(golden.run(RuleGuard(), found)) == Golden(1)


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        ([], "keeps nothing"),
        ([{"id": "1", "prompt": "x"}], "row 1: no label"),
        ([BREAD | {"prompt_label": "fine"}], "row bread: no label"),
        ([BREAD | {"response_label": "harmful"}], "an answer that is not there"),
        (["x"], "golden.jsonl:1"),
    ],
)
def test_a_file_that_keeps_nothing_or_is_none_is_refused(tmp_path: Path, rows: list[Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        golden.load(file(tmp_path, *rows))


def test_a_missing_file_says_what_to_write(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"weights\.golden"):
        golden.load(tmp_path / "none.jsonl")


def test_the_bundled_set_begins_with_benign_cases_and_is_also_one_of_guard_train() -> None:
    from tests.support.rows import read_rows

    found = golden.load(golden.BUNDLED)
    assert [case.benign for case in found] == sorted((case.benign for case in found), reverse=True)
    assert sum(case.benign for case in found) >= 15
    assert sum(not case.benign for case in found) >= 5
    rows = {row.id: row.request for row in read_rows(golden.BUNDLED)}
    assert rows == {case.row["id"]: case.request for case in found}
