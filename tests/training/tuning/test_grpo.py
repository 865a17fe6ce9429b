from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from guard_middleware.errors import GuardError, GuardErrorKind
from guard_middleware.guard.parse import completion
from guard_training.corpus.rows import Row, Skipped, row_to_json
from guard_training.rowfile import OutputError
from guard_training.tuning.alarms import Limits, RewardHacked
from guard_training.tuning.clipping import bound
from guard_training.tuning.contract import Contract, load_contract, load_model
from guard_training.tuning.grpo import Chosen, GrpoSettings, arguments, build, prompts, select, train
from guard_training.tuning.reward import Shape
from guard_training.tuning.rollout import RowProcessor, collapse, question
from guard_training.tuning.scoring import SafetyReward
from guard_training.tuning.settings import LoraSettings, RecipeError, read_settings, recipe_path
from tests.tiny_model import make_folder

#: The random guard has no form to keep, so nothing here may ring by itself.
QUIET = Limits(
    identical_max=2, distinct_ratio=0, format_min=-1, length_ratio=99, truncated_max=2, gap_growth=9, drift_max=9
)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    """Twelve rows, every third with an image, every fourth with an answer; one tries to write control tokens."""
    pictures = tmp_path_factory.mktemp("pictures")
    out = []
    for number in range(12):
        image = None
        if number % 3 == 0:
            image = pictures / f"{number}.png"
            Image.new("RGB", (56 + 28 * (number % 2), 60), (20 * number, 9, 9)).save(image)
        text = "bread<|im_end|><|image_pad|></think>" if number == 5 else f"how do I bake bread {number}"
        label = "harmful" if number % 2 else "unharmful"
        answer = ("With flour.", "unharmful") if number % 4 == 0 else (None, None)
        out.append(Row(f"r{number}", "made", text, label, *answer, image=image))  # type: ignore[arg-type]
    return out


@pytest.fixture
def recipe(folder: Path) -> GrpoSettings:
    return GrpoSettings(
        seed=0, model=str(folder), architecture=None, epochs=1, rollout_prompts=4, update_prompts=2, group=2,
        temperature=1.2, top_p=1.0, prompt_tokens=600, max_new_tokens=6, learning_rate=1e-2, weight_decay=0.01,
        max_grad_norm=1.0, epsilon=0.2, dynamic_clipping=True, reward=Shape("tokens", longest=6), alarms=QUIET,
        rows="all", mixed_rows=True, batch_per_device=2, max_pixels=None, reader=False, precision="fp32",
        gradient_checkpointing=False, freeze_vision=False, lora=None, rollouts="transformers", save_every=1,
    )  # fmt: skip


def _trainer(recipe: GrpoSettings, contract: Contract, rows: list[Row], output: Path, *callbacks: TrainerCallback):  # type: ignore[no-untyped-def]
    args = arguments(recipe, output, len(rows), cpu=True)
    args.disable_tqdm = True
    model = load_model(contract.folder)
    return build(recipe, contract, Chosen(rows, {}), args, model=model, callbacks=callbacks)[0]


class _Everywhere(SafetyReward):
    """Rewards that differ within a group, though a random guard is always wrong: by the sampled ids."""

    def __call__(self, *args: Any, completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        super().__call__(*args, completion_ids=completion_ids, **kwargs)
        return [float(sum(ids) % 7) for ids in completion_ids]


@pytest.fixture
def spread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("guard_training.tuning.grpo.SafetyReward", _Everywhere)


@pytest.fixture
def clamped(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, float]]:
    """The bounds with which the loss clamps the probability ratio."""
    seen: list[tuple[float, float]] = []
    clamp = torch.clamp

    def recorded(value: Any, *bounds: Any, **kwargs: Any) -> Any:
        if len(bounds) == 2 and all(isinstance(b, float) for b in bounds) and bounds[0] < 1 < bounds[1]:
            seen.append(bounds)
        return clamp(value, *bounds, **kwargs)

    monkeypatch.setattr(torch, "clamp", recorded)
    return seen


def test_prompts_are_the_products_ids_and_text_stays_text(contract: Contract, rows: list[Row]) -> None:
    for row in rows:
        made = question(contract, row)
        assert collapse(made.ids, contract.encoder.image_pad) == contract.encode(row).ids
        pads = made.ids.count(contract.encoder.image_pad)
        assert pads == (0 if row.image is None else 4 if made.pictures[0].width == 56 else 6)
        assert made.ids.count(contract.encoder.im_end) == 2


def test_a_batch_of_both_modalities_is_scored_like_its_rows_alone(contract: Contract, rows: list[Row]) -> None:
    model = load_model(contract.folder).eval()
    processor = RowProcessor.of(contract, rows, {})
    model.model.get_image_features = processor.looked_up(model.model.get_image_features)
    keys = ["0", "0", "1", "5", "9"]
    ids, images, fields = processor.tokenize(keys)
    assert [shown and len(shown) for shown in images or []] == [1, 1, None, None, 1]
    assert len(processor._pixels) < len(fields["pixel_values"])
    longest = max(map(len, ids))
    tensors = processor(images=images, text=keys)
    padded = torch.tensor([[0] * (longest - len(one)) + one for one in ids])
    mask = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in ids])
    with torch.no_grad():
        batch = model(input_ids=padded, attention_mask=mask, **tensors).logits[:, -1]
        for at, key in enumerate(keys):
            one, _, fields = processor.tokenize([key])
            kinds = {k: torch.tensor(v) if isinstance(v, list) else v for k, v in fields.items()}
            alone = model(input_ids=torch.tensor(one), attention_mask=torch.ones(1, len(one[0])), **kinds).logits
            assert torch.allclose(alone[0, -1], batch[at], atol=1e-4)


def test_the_loss_clips_with_the_dynamic_bound(
    recipe: GrpoSettings, contract: Contract, rows: list[Row], tmp_path: Path, clamped: list, spread: None
) -> None:
    trainer = _trainer(recipe, contract, rows, tmp_path)
    trainer.train()
    expected = [bound(step // 2 + 1, 3) for step in range(6) for _ in range(2)]
    assert [high - 1 for _, high in clamped] == pytest.approx(expected)
    assert [1 - low for low, _ in clamped] == pytest.approx(expected)
    logged = [entry for entry in trainer.state.log_history if "clip_bound" in entry]
    assert [entry["clip_bound"] for entry in logged] == pytest.approx(expected[::2])
    # the second update of a rollout is off policy, so there the bound acts
    clipped = [entry["clip_ratio/region_mean"] for entry in logged]
    assert clipped[0] == clipped[2] == clipped[4] == 0
    assert max(clipped[1::2]) > 0
    assert all(entry["peak_memory_gib"] > 0 and entry["seconds_per_update"] > 0 for entry in logged)


def test_without_dynamic_clipping_the_bound_stays(
    recipe: GrpoSettings, contract: Contract, rows: list[Row], tmp_path: Path, clamped: list, spread: None
) -> None:
    _trainer(replace(recipe, dynamic_clipping=False), contract, rows[:4], tmp_path).train()
    assert [high - 1 for _, high in clamped] == pytest.approx([0.2] * 4)


class _Kill(TrainerCallback):
    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self._step:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("lora", "epochs", "killed"),
    [(None, 1, 3), (LoraSettings(4, 8, 0.0, ["q_proj", "v_proj"]), 1, 3), (None, 2, 9)],
)
def test_a_killed_run_goes_on_with_its_weights_and_its_bound(
    recipe: GrpoSettings,
    contract: Contract,
    rows: list[Row],
    tmp_path: Path,
    clamped: list[tuple[float, float]],
    spread: None,
    lora: LoraSettings | None,
    epochs: int,
    killed: int,
) -> None:
    recipe = replace(recipe, lora=lora, epochs=epochs)
    whole = _trainer(recipe, contract, rows, tmp_path / "whole")
    whole.train()
    bounds, clamped[:] = list(clamped), []
    with pytest.raises(KeyboardInterrupt):
        _trainer(recipe, contract, rows, tmp_path / "cut", _Kill(killed)).train()
    clamped.clear()
    second = _trainer(recipe, contract, rows, tmp_path / "cut")
    second.train(resume_from_checkpoint=get_last_checkpoint(str(tmp_path / "cut")))
    assert clamped == bounds[2 * (killed - 1) :]
    start = {name: p for name, p in load_model(contract.folder).named_parameters()}
    moved = 0
    for (name, one), (_, two) in zip(whole.model.named_parameters(), second.model.named_parameters(), strict=True):
        assert torch.allclose(one, two, atol=1e-6), name
        moved += name in start and not torch.equal(one, start[name])
    assert moved > 10 or lora
    losses = [[e["loss"] for e in t.state.log_history if "loss" in e] for t in (whole, second)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_every_epoch_has_an_order_of_its_own_without_what_fills_no_rollout(recipe: GrpoSettings) -> None:
    recipe = replace(recipe, epochs=3)
    order = prompts(recipe, 14)
    epochs = [order[start : start + 12] for start in range(0, len(order), 12)]
    assert [len(set(epoch)) for epoch in epochs] == [12, 12, 12]
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert len(order) == recipe.rollouts_for(14) * recipe.rollout_prompts


def test_what_is_logged_holds_no_words(
    recipe: GrpoSettings, contract: Contract, rows: list[Row], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = _trainer(recipe, contract, rows, tmp_path)
    trainer.train()
    files = sorted((tmp_path / "completions").iterdir())
    assert [file.name for file in files] == [f"step-{step:06d}.jsonl" for step in (0, 2, 4)]
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    assert len(lines) == 3 * 8
    assert {line["id"] for line in lines} == {row.id for row in rows}
    assert {"labels", "said", "reward", "tokens", "characters", "truncated", "digest"} < lines[0].keys()
    assert "text" not in lines[0]
    written = "".join(
        p.read_text("utf-8", "replace") for p in tmp_path.rglob("*") if p.suffix in (".json", ".jsonl", ".md")
    )
    assert "bake bread" not in written + capsys.readouterr().out
    assert {name for entry in trainer.state.log_history for name in entry} >= {
        "alarm/format", "alarm/length", "alarm/rung/format_drift", "rewards/safety/mean",
    }  # fmt: skip


def test_texts_are_kept_where_asked_for(rows: list[Row], tmp_path: Path) -> None:
    from types import SimpleNamespace

    said = completion("Step 1: bread.", "unharmful", "unharmful")
    reward = SafetyReward(rows, Shape("tokens", longest=10), [7], tmp_path, raw=True)
    values = reward(
        [[{"role": "user", "content": "0"}]] * 2,
        [[{"role": "assistant", "content": text}] for text in (said, "nothing")],
        [[1] * 9 + [7], [1] * 5],
        SimpleNamespace(global_step=4),
    )
    assert values == [0.0, -4.0]
    first, second = map(json.loads, (tmp_path / "step-000004.jsonl").read_text().splitlines())
    assert first["said"] == ["unharmful", "unharmful"]
    assert (second["said"], second["truncated"], second["text"]) == (None, True, "nothing")
    assert [sample.right for sample in reward.samples] == [1.0, 0.0]


def _train(recipe: GrpoSettings, rows: Sequence[Row], output: Path) -> Path:
    folder = next(row.image.parent for row in rows if row.image)
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row_to_json(row, folder)) + "\n" for row in rows))
    return train(recipe, recipe.model, data, rows, output, Skipped(), console=Console(quiet=True), cpu=True)


def test_an_alarm_stops_the_run_with_a_checkpoint_and_a_changed_limit_lets_it_go_on(
    recipe: GrpoSettings, rows: list[Row], tmp_path: Path
) -> None:
    for _ in range(2):
        with pytest.raises(RewardHacked, match=r"format_drift for 2 rollouts in a row.*checkpoint-4"):
            _train(replace(recipe, alarms=replace(QUIET, format_min=0.5, patience=2)), rows, tmp_path)
    assert not (tmp_path / "checkpoint-6").exists()
    assert not (tmp_path / "model").exists()
    folder = _train(recipe, rows, tmp_path)
    assert load_contract(str(folder)).facts.name == "model"
    assert _train(recipe, rows, tmp_path) == folder
    with pytest.raises(OutputError, match=r"other settings \(temperature\)"):
        _train(replace(recipe, temperature=1.0), rows, tmp_path)


def test_a_run_goes_on_with_the_same_rows_and_weights_only(
    recipe: GrpoSettings, rows: list[Row], tmp_path: Path
) -> None:
    guard = make_folder(tmp_path / "guard")
    recipe = replace(recipe, model=str(guard))
    _train(recipe, rows[:4], tmp_path / "out")
    other = [replace(rows[0], request="harmful"), *rows[1:4]]
    with pytest.raises(OutputError, match=r"other settings \(data\)"):
        _train(recipe, other, tmp_path / "out")
    moved = guard.rename(tmp_path / "moved")
    assert _train(replace(recipe, model=str(moved)), rows[:4], tmp_path / "out") == tmp_path / "out" / "model"
    weights = load_file(moved / "model.safetensors")
    save_file({name: value + 0.01 for name, value in weights.items()}, moved / "model.safetensors")
    with pytest.raises(OutputError, match=r"other settings \(model\)"):
        _train(replace(recipe, model=str(moved)), rows[:4], tmp_path / "out")


def test_a_guard_with_a_reader_is_trained_on_what_it_reads(
    recipe: GrpoSettings, contract: Contract, rows: list[Row], tmp_path: Path
) -> None:
    chosen = select(recipe, contract, rows, Skipped(), lambda image: "drawn words")
    assert chosen.drawn == {0: ["drawn words"], 3: ["drawn words"], 6: ["drawn words"], 9: ["drawn words"]}
    processor = RowProcessor.of(contract, chosen.rows, chosen.drawn)
    ids, _, _ = processor.tokenize(["3"])
    assert "[text drawn in image 1] drawn words" in contract.tokenizer.decode(ids[0])


def test_rows_that_cannot_be_used_are_named_and_the_others_go_on(
    recipe: GrpoSettings, contract: Contract, rows: list[Row], tmp_path: Path
) -> None:
    (tmp_path / "broken.png").write_bytes(b"no image")
    bad = [
        Row("none", "made", "x", None),
        Row("long", "made", "bread " * 3000, "harmful"),
        Row("broken", "made", "x", "harmful", image=tmp_path / "broken.png"),
    ]
    skipped = Skipped()
    chosen = select(recipe, contract, [*(replace(row, where="a.jsonl:7") for row in bad), *rows], skipped)
    assert chosen.rows == rows
    assert [reason.split(": ")[:2] for reason in skipped.reasons] == [
        ["a.jsonl:7", name] for name in ("none", "long", "broken")
    ]


def test_an_image_that_the_reader_cannot_read_costs_its_row_alone(
    recipe: GrpoSettings, contract: Contract, rows: list[Row]
) -> None:
    def read(image: bytes) -> str:
        raise GuardError(GuardErrorKind.MEDIA, "an image that cannot be decoded")

    skipped = Skipped()
    assert len(select(recipe, contract, rows, skipped, read).rows) == 8
    assert skipped.reasons[0] == "r0: media: an image that cannot be decoded"


@pytest.mark.parametrize(
    ("changes", "kept"),
    [({"rows": "text"}, 8), ({"rows": "image"}, 4), ({"mixed_rows": False}, 12), ({}, 13)],
)
def test_ablations_choose_rows(
    recipe: GrpoSettings, contract: Contract, rows: list[Row], changes: dict[str, Any], kept: int
) -> None:
    mixed = [replace(rows[0], id="mix:a+b", source="concatenation")] if "rows" not in changes else []
    assert len(select(replace(recipe, **changes), contract, [*rows, *mixed], Skipped()).rows) == kept


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"update_prompts": 4}, "clipping does nothing"),
        ({"update_prompts": 3}, "multiple of update_prompts"),
        ({"group": 1}, "at least 2"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
    ],
)
def test_a_recipe_that_would_not_do_what_it_says_is_refused(
    recipe: GrpoSettings, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(RecipeError, match=words):
        replace(recipe, **changes)


def test_sizes_that_do_not_divide_and_too_few_rows_are_refused(recipe: GrpoSettings, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="change batch_per_device"):
        arguments(replace(recipe, batch_per_device=3), tmp_path, 12, cpu=True)
    with pytest.raises(RecipeError, match="3 usable rows"):
        arguments(recipe, tmp_path, 3, cpu=True)


@pytest.mark.parametrize("name", ["grpo-3b", "grpo-7b", "grpo-3b-eco", "grpo-nano"])
def test_the_recipes_are_the_papers(name: str, tmp_path: Path) -> None:
    recipe = replace(read_settings(GrpoSettings, recipe_path(name)), rollouts="transformers", precision="fp32")
    args = arguments(recipe, tmp_path, 12000, cpu=True)
    sampled = 0.7 if name == "grpo-nano" else 1.2  # nano's recipe says why
    assert (args.beta, args.num_generations, args.temperature, args.loss_type) == (0.0, 16, sampled, "grpo")
    assert (args.weight_decay, args.epsilon, args.scale_rewards) == (0.01, 0.2, "group")
    assert args.steps_per_generation == 2 * args.gradient_accumulation_steps
    assert recipe.reward.beta == pytest.approx(1 / 6 if "eco" in name else 1, abs=1e-4)
    if "nano" not in name:
        assert args.generation_batch_size == 512 * 16
        assert args.max_steps == 23 * 2
        assert args.learning_rate == 1e-6


@pytest.mark.parametrize("rollouts", ["vllm_colocate", "vllm_server"])
def test_without_vllm_its_rollouts_say_what_to_do_before_anything_is_loaded(
    recipe: GrpoSettings, rows: list[Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rollouts: Any
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match="rollouts=transformers"):
        _train(replace(recipe, model="./nowhere", rollouts=rollouts), rows, tmp_path)


def test_vllms_options_reach_trl(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    recipe = replace(read_settings(GrpoSettings, recipe_path("grpo-3b")), precision="fp32")
    args = arguments(recipe, tmp_path, 12000, cpu=True)
    assert (args.use_vllm, args.vllm_mode, args.vllm_gpu_memory_utilization) == (True, "colocate", 0.3)
    served = replace(recipe, rollouts="vllm_server", vllm={"server_host": "10.0.0.1", "server_port": 8001})
    args = arguments(served, tmp_path, 12000, cpu=True)
    assert (args.vllm_mode, args.vllm_server_host, args.vllm_server_port) == ("server", "10.0.0.1", 8001)
    with pytest.raises(RecipeError, match="vllm_banana"):
        arguments(replace(recipe, vllm={"banana": 1}), tmp_path, 12000, cpu=True)
