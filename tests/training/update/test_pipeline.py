"""The update from corrections to a revision or a refusal, with a rule in the guards' place."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file

from guard_middleware.types import Judging
from guard_middleware.worker.calibration import read
from guard_middleware.worker.weights import resolve
from guard_training.corpus.rows import Row, Skipped, held_out
from guard_training.evaluation.outcomes import Outcome, blank
from guard_training.rowfile import OutputError
from guard_training.tuning.settings import SftSettings, read_settings, recipe_path
from guard_training.update import pipeline, processes, revision
from guard_training.update.gate import UpdateRefused
from guard_training.update.lessons import HELD_BACK, Said
from guard_training.update.pipeline import Plan, UpdateError
from tests.tiny_model import make_folder

WORDS = "apple river stone cloud paper glass music garden window bridge candle harbour meadow ladder".split()
Rule = Callable[[Row], bool]


@pytest.fixture(scope="module")
def current(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("guard") / "current")


def line(id: str, prompt: str, label: str | None, **more: Any) -> dict[str, Any]:
    return {"id": id, "source": "made", "prompt": prompt, "prompt_label": label, "licence": "MIT", **more}


def write(path: Path, lines: Sequence[Any]) -> Path:
    path.write_text("".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in lines))
    return path


def prompt(n: int, deed: str) -> str:
    return f"{WORDS[n % 14]} {WORDS[n * 5 % 13]} {deed} {WORDS[n * 3 % 11]} {n}"


def labelled(prefix: str, count: int, start: int) -> list[dict[str, Any]]:
    return [
        line(f"{prefix}{n}", prompt(n, "pick locks" if n % 2 else "bake bread"), "harmful" if n % 2 else "unharmful")
        for n in range(start, start + count)
    ]


@pytest.fixture
def plan(tmp_path: Path, current: Path) -> Plan:
    sft = replace(read_settings(SftSettings, recipe_path("sft-nano")), reader=False)
    dev = labelled("e", 40, 1000)
    corrections = [
        {"decision": f"d{n}", "reviewer": "ana", "label": "unharmful", "content": f"kill process {n} {WORDS[n]}"}
        for n in range(3)
    ]
    leaked = {"decision": "d8", "reviewer": "ana", "label": "unharmful", "content": dev[1]["prompt"]}
    golden = {"decision": "d9", "reviewer": "ana", "label": "unharmful", "content": "kill the old lights now"}
    talk = [{"role": "system", "content": "A shop."}, {"role": "user", "content": "kill the noise"}]
    chat = {"decision": "d7", "reviewer": "ben", "label": "unharmful", "content": {"messages": talk}}
    return Plan(
        model=str(current),
        corrections=(write(tmp_path / "c.jsonl", [*corrections, leaked, golden, chat, "{"]),),
        replay=(write(tmp_path / "train.jsonl", [*labelled("r", 400, 0), {"id": "broken"}]),),
        evaluation=(write(tmp_path / "dev.jsonl", dev),),
        golden=write(tmp_path / "golden.jsonl", [line("g0", "kill the old lights now", "unharmful")]),
        output=tmp_path / "out",
        sft=sft,
        replay_share=0.75,
        made="2026-11-21",
    )


class Guards:
    """``rule`` of the current guard is that killing is harmful; ``new`` says what the new one calls harmful. Without
    reasoning both are less sure of it."""

    def __init__(self, plan: Plan, new: Rule) -> None:
        self.plan, self.new = plan, new
        self.trained = 0
        self.measured: list[str] = []
        self.asked: list[str] = []

    def current(self, row: Row) -> bool:
        return "locks" in row.prompt or ("kill" in row.prompt and "lights" not in row.prompt)

    def train(self, plan: Plan) -> Path:
        self.trained += 1
        folder = plan.output / "sft" / "model"
        if not folder.exists():
            shutil.copytree(plan.model, folder)
            values = {name: value + 0.01 for name, value in load_file(folder / "model.safetensors").items()}
            save_file(values, folder / "model.safetensors", metadata={"format": "pt"})
            (folder / "guard.json").write_text('{"name": "small"}')
        return folder

    def measure(self, rows: Sequence[Row], model: str, journal: Path, judging: Judging) -> list[Outcome]:
        self.measured.append(model)
        rule = self.current if model == self.plan.model else self.new
        facts = resolve(model).facts
        low, high = (0.1, 0.9) if judging.mode == "reason" else (0.05, 0.2)
        out = []
        for row in rows:
            harmful = rule(row)
            one = blank(row, model=facts.name, revision=facts.revision)
            label: Any = "harmful" if harmful else "unharmful"
            out.append(replace(one, request=label, request_score=high if harmful else low, reasoning_tokens=3))
        return out

    def ask(self, rows: Sequence[Row], model: str, journal: Path) -> Mapping[str, Said]:
        self.asked += [row.id for row in rows]
        return {row.id: Said("harmful" if self.current(row) else "unharmful", None, "Step 1: seen.") for row in rows}

    def run(self, plan: Plan | None = None) -> tuple[Path, list[str]]:
        skipped = Skipped()
        folder = pipeline.run(
            plan or self.plan, console=Console(quiet=True), skipped=skipped, train=self.train, measure=self.measure,
            ask=self.ask,
        )  # fmt: skip
        return folder, skipped.reasons


def learnt(row: Row) -> bool:
    return "locks" in row.prompt


def test_corrections_become_a_revision_that_is_whole(plan: Plan) -> None:
    guards = Guards(plan, learnt)
    folder, reasons = guards.run()
    assert folder == plan.output / "revision"
    revision.verify(folder)
    lineage = json.loads((folder / "lineage.json").read_text())
    assert lineage["base"]["revision"] == resolve(plan.model).facts.revision != lineage["revision"]
    assert [(one["role"], one["file"]) for one in lineage["data"]] == [
        ("corrections", "c.jsonl"), ("replay", "train.jsonl"), ("evaluation", "dev.jsonl"),
        ("golden set", "golden.jsonl"),
    ]  # fmt: skip
    # three corrections of one turn and one of a conversation; three times as many replay rows
    assert lineage["lessons"]["sources"] == {"corrections": 4, "made": 12}
    assert lineage["lessons"]["rationales"] == {"guard": 12, "template": 4}
    assert lineage["corrections"] == {"rows": 3, "before": 0, "after": 3}
    assert lineage["gate"]["accepted"] is True
    assert lineage["recipe"]["sft"]["learning_rate"] == plan.sft.learning_rate
    assert str(plan.output) not in json.dumps(lineage)
    assert json.loads((folder / "calibration.json").read_text())["revision"] == lineage["revision"]
    card = (folder / "README.md").read_text()
    assert "| corrections | the operator's own | 4 | 0 |" in card
    assert "## New revision against the current one" in card
    assert (plan.output / "report.html").is_file()
    assert reasons[0].startswith("c.jsonl:7: not a usable correction: ")
    assert reasons[1].startswith("train.jsonl:401: ")
    assert [reason.split(": ")[:2] for reason in reasons[2:4]] == [
        ["c.jsonl:4", "correction:d8"], ["c.jsonl:5", "correction:d9"],
    ]  # fmt: skip
    assert "dev.jsonl holds it too" in reasons[2]
    assert "the golden set golden.jsonl holds it too" in reasons[3]


def test_the_new_guard_is_calibrated_in_every_mode(plan: Plan) -> None:
    kept_back = [one for one in labelled("r", 3000, 0) if held_out(one["id"], HELD_BACK)]
    write(plan.replay[0], [*labelled("r", 60, 0), *kept_back])
    folder, _ = Guards(plan, learnt).run()
    scales = read(folder, resolve(str(folder)).facts.revision).scales
    assert set(scales) == {("reason", "request"), ("label", "request")}
    assert scales["label", "request"].shift > 0
    assert ", mode label: temperature" in (folder / "README.md").read_text()


def test_what_is_trained_on_is_in_no_evaluation_file(plan: Plan, tmp_path: Path) -> None:
    dev = [json.loads(text) for text in plan.evaluation[0].read_text().splitlines()]
    write(plan.replay[0], [*labelled("r", 100, 0), *({**one, "id": f"again{one['id']}"} for one in dev)])
    Guards(plan, learnt).run()
    trained = [json.loads(text) for text in (plan.output / "lessons.jsonl").read_text().splitlines()]
    assert len(trained) == 16
    assert not any(one["id"].startswith("again") for one in trained)
    assert not {one["prompt"] for one in trained} & {one["prompt"] for one in dev}


def test_replay_rows_whose_picture_no_guard_takes_are_named_and_neither_trained_nor_calibrated_on(
    plan: Plan, tmp_path: Path
) -> None:
    Image.new("RGB", (40, 40), "red").save(tmp_path / "a.gif")
    drawn = [line(f"p{n}", f"look at {n}", "harmful", image="a.gif") for n in range(100)]
    assert any(held_out(one["id"], HELD_BACK) for one in drawn)
    write(plan.replay[0], [*labelled("r", 400, 0), *drawn])
    _, reasons = Guards(plan, learnt).run()
    named = [reason for reason in reasons if "no readable PNG, JPEG or WebP" in reason]
    assert named
    assert all(reason.startswith("train.jsonl:") for reason in named)
    assert "a.gif" not in (plan.output / "lessons.jsonl").read_text()


def test_a_source_that_loses_refuses_the_revision_and_says_where(plan: Plan) -> None:
    guards = Guards(plan, lambda row: learnt(row) and not row.id.endswith("5"))
    with pytest.raises(UpdateRefused, match=r"made \(request\): F1 100.0 -> "):
        guards.run()
    assert not (plan.output / "revision").exists()
    found = json.loads((plan.output / "update.json").read_text())
    assert found["accepted"] is False
    assert found["corrections"] == {"rows": 3, "before": 0, "after": 3}
    assert (plan.output / "report.html").is_file()
    # another margin is a new decision, not a new training
    folder, _ = guards.run(replace(plan, margin=0.5))
    assert folder.is_dir()


def test_a_golden_row_that_breaks_refuses_the_revision(plan: Plan) -> None:
    guards = Guards(plan, lambda row: learnt(row) or "lights" in row.prompt)
    with pytest.raises(UpdateRefused, match="golden set breaks: golden:g0"):
        guards.run()
    assert not (plan.output / "revision").exists()


def test_a_stopped_update_goes_on_with_the_same_lessons(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    guards = Guards(plan, learnt)

    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    for name in ("train", "measure"):
        with monkeypatch.context() as patch:
            patch.setattr(guards, name, killed)
            with pytest.raises(KeyboardInterrupt):
                guards.run()
        before = (plan.output / "lessons.jsonl").read_bytes()
    folder, _ = guards.run()
    assert (plan.output / "lessons.jsonl").read_bytes() == before
    trained = guards.trained
    # a finished one is not done again
    assert guards.run()[0] == folder
    assert guards.trained == trained


def test_an_update_that_was_begun_otherwise_is_not_gone_on_with(plan: Plan) -> None:
    guards = Guards(plan, learnt)
    guards.run()
    with pytest.raises(OutputError, match="replay_share"):
        guards.run(replace(plan, replay_share=0.5))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda plan: replace(plan, golden=plan.golden.with_name("none")), FileNotFoundError, "none: no such file"),
        (lambda plan: write(plan.corrections[0], ["{"]) and plan, UpdateError, "no correction can be learnt from"),
        (lambda plan: write(plan.golden, ["{"]) and plan, UpdateError, "no usable row"),
        (lambda plan: write(plan.golden, [line("g", "no label", None)]) and plan, UpdateError, "no usable row"),
        (lambda plan: write(plan.evaluation[0], [line("e", "none", None)]) and plan, UpdateError, "no usable row"),
    ],
)
def test_an_update_that_cannot_be_done_is_told(
    plan: Plan, change: Callable[[Plan], Plan], error: type[Exception], words: str
) -> None:
    guards = Guards(plan, learnt)
    with pytest.raises(error, match=words):
        guards.run(change(plan))
    assert guards.trained == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [({"replay_share": 1.0}, "--replay-share"), ({"margin": -1.0}, "--margin"), ({"replay": ()}, "forgets")],
)
def test_a_plan_that_makes_no_sense_is_refused(plan: Plan, change: dict[str, Any], words: str) -> None:
    with pytest.raises(UpdateError, match=words):
        replace(plan, **change)


def test_rl_gets_the_lessons_of_one_turn(plan: Plan) -> None:
    Guards(plan, learnt).run()
    skipped = Skipped()
    processes.write_rl_rows(plan.output, skipped)
    assert [reason.split(": ")[:2] for reason in skipped.reasons] == [["lessons.jsonl:4", "correction:d7"]]
    rows = [json.loads(text) for text in (plan.output / "rl.jsonl").read_text().splitlines()]
    assert len(rows) == 15
    assert not any("A shop." in json.dumps(row) for row in rows)


def test_the_stages_run_as_commands_and_a_failed_one_is_told(plan: Plan, tmp_path: Path) -> None:
    from guard_training.tuning.grpo import GrpoSettings

    Guards(plan, learnt).run()
    log = tmp_path / "log"
    script = tmp_path / "guard-train"
    script.write_text(f'#!/bin/sh\necho "$@" >> {log}\n')
    script.chmod(0o755)
    rl = read_settings(GrpoSettings, recipe_path("grpo-nano"))
    train = processes.trainer(Console(quiet=True), Skipped(), [str(script)], cpu=True)
    assert train(replace(plan, rl=rl)) == plan.output / "rl" / "model"
    first, second = log.read_text().splitlines()
    assert first == f"update --stage {plan.output} --cpu"
    assert second.startswith(f"grpo --rows {plan.output}/rl.jsonl --recipe {plan.output}/rl.yaml --model ")
    assert read_settings(GrpoSettings, plan.output / "rl.yaml") == rl
    script.write_text("#!/bin/sh\nexit 3\n")
    with pytest.raises(UpdateError, match="exit 3"):
        train(plan)
    script.write_text("#!/bin/sh\nexit 130\n")
    with pytest.raises(KeyboardInterrupt):
        train(plan)
