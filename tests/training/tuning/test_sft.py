from __future__ import annotations

import io
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback, TrainerControl, TrainerState

from guard_middleware.errors import GuardError, GuardErrorKind
from guard_middleware.guard.parse import parse
from guard_middleware.worker.weights import load
from guard_training.corpus.rows import Row, Skipped
from guard_training.rowfile import OutputError
from guard_training.tuning import run, sft
from guard_training.tuning.contract import Contract, load_contract, load_model
from guard_training.tuning.settings import LoraSettings, RecipeError, SftSettings
from guard_training.tuning.sft import IGNORED, Collator, GuardSFTTrainer, encode_rows, to_dataset, train
from tests.tiny_model import make_folder

ADAPTERS = LoraSettings(4, 8, 0.0, ["q_proj", "v_proj", "gate_proj"])


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    """Twelve rows, every third with an image, every fourth with an answer."""
    pictures = tmp_path_factory.mktemp("pictures")
    out = []
    for number in range(12):
        image = None
        if number % 3 == 0:
            image = pictures / f"{number}.png"
            Image.new("RGB", (56 + 28 * (number % 2), 60), (20 * number, 9, 9)).save(image)
        label = "harmful" if number % 2 else "unharmful"
        answer = ("With flour.", "unharmful") if number % 4 == 0 else (None, None)
        text = "how do I bake bread" + " and more" * number
        out.append(Row(f"r{number}", "made", text, label, *answer, image=image, rationale=f"It is {label}."))  # type: ignore[arg-type]
    return out


@pytest.fixture
def recipe(folder: Path) -> SftSettings:
    return SftSettings(
        seed=3, model=str(folder), architecture=None, epochs=2.0, learning_rate=1e-2, scheduler="cosine",
        warmup_steps=0, weight_decay=0.0, max_grad_norm=1.0, global_batch=4, batch_per_device=2, cutoff=800,
        max_pixels=None, reader=False, precision="fp32", gradient_checkpointing=False, freeze_vision=True,
        freeze_projector=True, lora=None, save_every=2, keep_checkpoints=2, log_every=1,
    )  # fmt: skip


class Cut(TrainerCallback):
    """Dies like a killed process after a step, without a checkpoint of it."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self._step:
            raise KeyboardInterrupt


def _train(
    recipe: SftSettings, rows: list[Row], output: Path, *callbacks: TrainerCallback, **options: Any
) -> tuple[Path | None, list[float], str]:
    """A run, the losses of its log, and what it printed."""
    seen: list[GuardSFTTrainer] = []
    text = io.StringIO()
    data = output.parent / "data.jsonl"
    data.write_text("made")
    build = sft.build

    def watched(*arguments: Any, **given: Any) -> GuardSFTTrainer:
        seen.append(build(*arguments, **given))
        for callback in callbacks:
            seen[0].add_callback(callback)
        return seen[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sft, "build", watched)
        made = train(recipe, data, rows, output, Skipped(), console=Console(file=text, width=200), cpu=True, **options)
    losses = [entry["loss"] for entry in seen[0].state.log_history if "loss" in entry] if seen else []
    return made, losses, text.getvalue()


def _batch(contract: Contract, rows: list[Row], **options: Any) -> dict[str, torch.Tensor]:
    dataset = to_dataset(encode_rows(contract, rows, 10_000, Skipped()))
    return Collator(contract, **options)([dataset[number] for number in range(len(dataset))])


def test_only_the_answer_is_learnt(contract: Contract, rows: list[Row]) -> None:
    batch = _batch(contract, rows)
    for row, ids, labels in zip(rows, batch["input_ids"], batch["labels"], strict=True):
        learnt = labels[labels != IGNORED]
        assert torch.equal(learnt, ids[labels != IGNORED])
        text = contract.tokenizer.decode(learnt)
        assert text.endswith("</result><|im_end|>")
        read = parse(text.removesuffix("<|im_end|>"), answered=row.response is not None)
        assert (read.request, read.response, read.reasoning) == (row.request, row.response_label, row.rationale)


def test_a_batch_holds_what_the_worker_would_send(contract: Contract, rows: list[Row]) -> None:
    batch = _batch(contract, rows)
    pads = batch["input_ids"] == contract.encoder.image_pad
    assert torch.equal(batch["mm_token_type_ids"], pads.int())
    assert int(pads.sum()) * 4 == len(batch["pixel_values"]) == int(batch["image_grid_thw"].prod(-1).sum())
    for row, ids, mask in zip(rows, batch["input_ids"], batch["attention_mask"], strict=True):
        prompt = contract.encode(row).ids
        kept = [
            id for at, id in enumerate(ids[mask == 1].tolist()) if id != contract.encoder.image_pad or ids[at - 1] != id
        ]
        assert kept[: len(prompt)] == prompt
        assert bool((ids[mask == 0] == contract.tokenizer.pad_token_id).all())


def _loss(contract: Contract, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    model = load_model(contract.folder).eval()
    with torch.no_grad():
        return model(**batch).loss


def test_an_image_behind_the_end_changes_no_loss(contract: Contract, rows: list[Row]) -> None:
    texts = [row for row in rows if row.image is None][:3]
    with_image, without = _batch(contract, texts, always_image=True), _batch(contract, texts)
    assert "pixel_values" not in without
    assert with_image["pixel_values"].shape[0] == 16
    assert (with_image["labels"] != IGNORED).sum() == (without["labels"] != IGNORED).sum()
    assert _loss(contract, with_image).item() == pytest.approx(_loss(contract, without).item(), rel=1e-5)
    pictured = _batch(contract, rows[:3], always_image=True)
    assert all(torch.equal(pictured[key], value) for key, value in _batch(contract, rows[:3]).items())


def test_a_text_batch_still_reaches_the_vision_tower(contract: Contract, rows: list[Row]) -> None:
    """What FSDP, ZeRO-3 and DDP wait for: every parameter takes part in every micro-batch."""
    model = load_model(contract.folder)
    model(**_batch(contract, rows[1:3], always_image=True)).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_rows_that_cannot_be_trained_on_are_left_out_and_counted(
    contract: Contract, recipe: SftSettings, rows: list[Row], tmp_path: Path
) -> None:
    (tmp_path / "bad.png").write_bytes(b"x")
    whole = io.BytesIO()
    Image.effect_noise((99, 99), 80).save(whole, "PNG")
    (tmp_path / "cut.png").write_bytes(whole.getvalue()[:2000])
    bad = [
        replace(rows[0], id="long", prompt="bread " * 2000),
        replace(rows[1], id="silent", rationale=None),
        replace(rows[1], id="unlabelled", request=None),
        replace(rows[1], id="tagged", rationale="</think>"),
        replace(rows[1], id="unreadable", image=tmp_path / "bad.png"),
        replace(rows[1], id="cut off", image=tmp_path / "cut.png"),
    ]
    skipped = Skipped()
    assert len(encode_rows(contract, [*bad, *rows], recipe.cutoff, skipped)) == len(rows)
    assert [reason.split(":")[0] for reason in skipped.reasons] == [
        "long",
        "silent",
        "unlabelled",
        "tagged",
        "unreadable",
        "cut off",
    ]
    assert "tokens, more than the cutoff of 800" in skipped.reasons[0]
    with pytest.raises(RecipeError, match="no row to train on"):
        _train(recipe, bad, tmp_path / "none")


def test_a_row_whose_image_the_reader_cannot_decode_is_left_out(
    contract: Contract, recipe: SftSettings, rows: list[Row]
) -> None:
    def read(data: bytes) -> str:
        raise GuardError(GuardErrorKind.MEDIA, "an image that cannot be decoded")

    skipped, pictured = Skipped(), next(row for row in rows if row.image)
    assert encode_rows(contract, [replace(pictured, where="a.jsonl:3")], recipe.cutoff, skipped, read) == []
    assert skipped.reasons == [f"a.jsonl:3: {pictured.id}: media: an image that cannot be decoded"]


def test_drawn_text_is_trained_where_the_guard_is_served_with_it(
    contract: Contract, recipe: SftSettings, rows: list[Row], tmp_path: Path
) -> None:
    example = encode_rows(contract, rows[:1], 10_000, Skipped(), lambda data: "OPEN DAILY")[0]
    assert "[text drawn in image 1] OPEN DAILY\n" in contract.tokenizer.decode(example.prompt)
    _train(replace(recipe, reader=True), rows, tmp_path / "run", read=lambda data: "OPEN DAILY", steps=1)
    assert (tmp_path / "run" / "drawn.jsonl").read_text().count("OPEN DAILY") == 4


@pytest.mark.parametrize("lora", [None, ADAPTERS])
def test_a_killed_run_gives_the_same_losses_when_it_goes_on(
    recipe: SftSettings, rows: list[Row], tmp_path: Path, lora: LoraSettings | None
) -> None:
    recipe = replace(recipe, lora=lora)
    whole, losses, _ = _train(recipe, rows, tmp_path / "whole")
    assert len(losses) == 6
    assert losses[-1] < losses[0] - (0.1 if lora else 0.5)
    with pytest.raises(KeyboardInterrupt):
        _train(recipe, rows, tmp_path / "cut", Cut(3))
    assert [path.name for path in (tmp_path / "cut" / "checkpoints").glob("checkpoint-*")] == ["checkpoint-2"]
    again, resumed, text = _train(recipe, rows, tmp_path / "cut")
    assert resumed == pytest.approx(losses, rel=1e-5)
    assert "4 steps" in text
    assert whole is not None
    assert again is not None
    left, right = load_model(whole).state_dict(), load_model(again).state_dict()
    assert all(torch.allclose(left[name], right[name], atol=1e-6) for name in left)


def test_stock_resume_is_still_broken(recipe: SftSettings, rows: list[Row], tmp_path: Path) -> None:
    """The defect that ``ResumingTrainer`` repairs; when this fails, transformers has mended it."""
    _, losses, _ = _train(recipe, rows, tmp_path / "run", steps=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(run.ResumingTrainer, "_load_from_checkpoint")
        _, resumed, _ = _train(recipe, rows, tmp_path / "run")
    assert resumed[4] > losses[3] + 0.3


def test_a_checkpoint_without_its_last_file_is_passed_over(tmp_path: Path) -> None:
    for step, state in ((2, "{}"), (10, "{}"), (20, '{"cut'), (30, None)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if state:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    (tmp_path / "checkpoint-best").mkdir()
    assert run.last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    assert run.last_checkpoint(tmp_path / "none") is None


def test_a_run_goes_on_step_by_step_and_ends_once(recipe: SftSettings, rows: list[Row], tmp_path: Path) -> None:
    assert _train(recipe, rows, tmp_path / "run", steps=1)[0] is None
    made, _, text = _train(recipe, rows, tmp_path / "run")
    assert made == tmp_path / "run" / "model"
    assert "12 rows" in text
    made, losses, text = _train(recipe, rows, tmp_path / "run")
    assert (made, losses) == (tmp_path / "run" / "model", [])
    assert "is finished" in text


def test_another_recipe_does_not_go_on_in_the_same_folder(recipe: SftSettings, rows: list[Row], tmp_path: Path) -> None:
    _train(recipe, rows, tmp_path / "run", steps=1)
    with pytest.raises(OutputError, match="learning_rate"):
        _train(replace(recipe, learning_rate=1e-3), rows, tmp_path / "run")


def test_other_weights_do_not_go_on_in_the_same_folder(recipe: SftSettings, rows: list[Row], tmp_path: Path) -> None:
    guard = make_folder(tmp_path / "guard")
    _train(replace(recipe, model=str(guard)), rows, tmp_path / "run", steps=1)
    moved = replace(recipe, model=str(guard.rename(tmp_path / "moved")))
    assert _train(moved, rows, tmp_path / "run", steps=2)[1]
    file = tmp_path / "moved" / "model.safetensors"
    save_file({name: value + 0.01 for name, value in load_file(file).items()}, file)
    with pytest.raises(OutputError, match=r"other settings \(model\)"):
        _train(moved, rows, tmp_path / "run")


@pytest.mark.parametrize(
    ("vision", "projector", "moved"),
    [(True, True, ("language",)), (False, True, ("language", "tower")), (True, False, ("language", "projector"))],
)
def test_what_is_frozen_stays_as_it_was(
    recipe: SftSettings, rows: list[Row], tmp_path: Path, vision: bool, projector: bool, moved: tuple[str, ...]
) -> None:
    recipe = replace(recipe, freeze_vision=vision, freeze_projector=projector, epochs=1.0)
    made, _, _ = _train(recipe, rows, tmp_path / "run")
    assert made is not None
    before, after = load_model(Path(recipe.model)).state_dict(), load_model(made).state_dict()
    changed = {_part(name) for name in before if not torch.equal(before[name], after[name])}
    assert changed == set(moved)


def _part(name: str) -> str:
    return "projector" if "merger" in name else "tower" if "visual" in name else "language"


def test_the_end_is_a_guard_that_a_worker_loads(recipe: SftSettings, rows: list[Row], tmp_path: Path) -> None:
    made, _, _ = _train(replace(recipe, epochs=1.0), rows, tmp_path / "run")
    assert made is not None
    contract = load_contract(recipe.model)
    facts = load(made, name="new").facts
    assert (facts.min_pixels, facts.max_pixels) == (contract.facts.min_pixels, contract.facts.max_pixels)
    assert load_contract(str(made)).encode(rows[0]) == contract.encode(rows[0])


def test_adapters_are_kept_and_merged(recipe: SftSettings, rows: list[Row], tmp_path: Path) -> None:
    made, _, _ = _train(replace(recipe, lora=ADAPTERS), rows, tmp_path / "run")
    assert made is not None
    assert (tmp_path / "run" / "adapter" / "adapter_config.json").is_file()
    before, after = load_model(Path(recipe.model)).state_dict(), load_model(made).state_dict()
    changed = {name for name in before if not torch.allclose(before[name], after[name])}
    assert changed
    assert all("language_model" in name and any(t in name for t in ADAPTERS.targets) for name in changed)


def test_recomputing_activations_changes_no_loss(recipe: SftSettings, rows: list[Row], tmp_path: Path) -> None:
    recipe = replace(recipe, epochs=1.0)
    plain = _train(recipe, rows, tmp_path / "plain")[1]
    again = _train(replace(recipe, gradient_checkpointing=True), rows, tmp_path / "again")[1]
    assert again == pytest.approx(plain, rel=1e-4)


def test_the_first_loss_is_the_mean_over_the_answers_tokens(
    contract: Contract, recipe: SftSettings, rows: list[Row], tmp_path: Path
) -> None:
    """Micro-batches of 1 and 4 rows give one loss: tokens are averaged over the step, not over micro-batches."""
    losses = [
        _train(replace(recipe, batch_per_device=size), rows, tmp_path / str(size), steps=1)[1][0] for size in (1, 4)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    whole = _train(replace(recipe, global_batch=12, batch_per_device=3), rows, tmp_path / "all", steps=1)[1][0]
    assert whole == pytest.approx(_loss(contract, _batch(contract, rows)).item(), rel=1e-4)


def test_curves_go_to_opentelemetry(monkeypatch: pytest.MonkeyPatch) -> None:
    reader = InMemoryMetricReader()
    callback = run.OtelCurves(MeterProvider([reader]), "sft")
    state = TrainerState(global_step=7, is_world_process_zero=True)
    callback.on_log(None, state, TrainerControl(), logs={"loss": 0.5, "eval/x": 2, "note": "text"})
    data = reader.get_metrics_data()
    assert data is not None
    metrics = data.resource_metrics[0].scope_metrics[0].metrics
    points = {metric.name: metric.data.data_points[0] for metric in metrics}
    assert {name: point.value for name, point in points.items()} == {  # type: ignore[union-attr]
        "guard_training.loss": 0.5,
        "guard_training.eval.x": 2,
        "guard_training.step": 7,
    }
    assert dict(points["guard_training.loss"].attributes or {}) == {"guard_training.stage": "sft"}
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    assert run.curves("sft") == []


def test_curves_go_to_tensorboard(recipe: SftSettings, rows: list[Row], tmp_path: Path) -> None:
    _train(recipe, rows, tmp_path / "run", steps=1)
    assert list((tmp_path / "run" / "checkpoints").rglob("events.out.tfevents*"))


def test_a_folder_copied_elsewhere_still_goes_on(recipe: SftSettings, rows: list[Row], tmp_path: Path) -> None:
    """Checkpoints name no path: a run can move to another disk or machine."""
    _, losses, _ = _train(recipe, rows, tmp_path / "run", steps=2)
    shutil.copytree(tmp_path / "run", tmp_path / "moved")
    assert _train(recipe, rows, tmp_path / "moved")[1][:2] == pytest.approx(losses)
