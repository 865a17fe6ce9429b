"""Samples of real weights (nano's), and what vLLM is asked for."""

from __future__ import annotations

import dataclasses
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from guard_middleware.worker.engine import Generation, GuardPrompt
from guard_middleware.worker.engine_transformers import TransformersEngine
from guard_middleware.worker.weights import NANO, load
from guard_training.corpus.rows import Row
from guard_training.tuning.contract import Contract, load_contract, pictures
from guard_training.tuning.sampling import (
    DrawnNucleus,
    Prompt,
    Sampling,
    SamplingError,
    TransformersSampler,
    VllmSampler,
    row_seed,
)

TEXTS = ["how do I bake bread", "tell me how to pick a lock and rob a house", "hello there"]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def guard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """nano without the form that the worker holds it to, as training sees it."""
    folder = tmp_path_factory.mktemp("guards") / "guard"
    folder.mkdir()
    for file in NANO.iterdir():
        if file.is_file() and file.name != "guard.json":
            (folder / file.name).symlink_to(file)
    facts = json.loads((NANO / "guard.json").read_text())
    (folder / "guard.json").write_text(json.dumps({k: v for k, v in facts.items() if k not in ("form", "name")}))
    return folder


@pytest.fixture(scope="module")
def contract(guard: Path) -> Contract:
    return load_contract(str(guard))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    path = tmp_path_factory.mktemp("pictures") / "drawn.png"
    Image.effect_noise((90, 60), 80).convert("RGB").save(path)
    plain = [Row(str(n), "made", text, "harmful") for n, text in enumerate(TEXTS)]
    return [*plain, Row("p", "made", "", "harmful", image=path), Row("t", "made", TEXTS[0], "harmful", image=path)]


def prompts(contract: Contract, rows: list[Row], seed: int = 0) -> list[Prompt]:
    return [Prompt(contract.encode(row).ids, tuple(pictures(row)), row_seed(seed, row.id)) for row in rows]


@pytest.mark.parametrize(
    ("temperature", "top_p", "expected"),
    [
        (1.0, 1.0, (0.5, 0.3, 0.15, 0.05)),
        (1.0, 0.75, (0.625, 0.375, 0, 0)),
        (0.5, 1.0, (0.6849, 0.2466, 0.0616, 0.0068)),
    ],
)
def test_tokens_come_with_the_odds_of_the_nucleus(
    temperature: float, top_p: float, expected: tuple[float, ...]
) -> None:
    draws = ((torch.arange(2000) + 0.5) / 2000)[:, None]
    logits = torch.tensor([0.3, 0.05, 0.5, 0.15]).log()
    choose = DrawnNucleus(draws, start=7, temperature=temperature, top_p=top_p)
    scores = choose(torch.zeros(2000, 7, dtype=torch.long), logits.repeat(2000, 1))
    assert (scores > -torch.inf).sum() == 2000
    shares = torch.bincount(scores.argmax(-1), minlength=4) / 2000
    assert shares[[2, 0, 3, 1]].tolist() == pytest.approx(expected, abs=1e-3)


def test_the_largest_draw_stays_in_the_nucleus() -> None:
    choose = DrawnNucleus(torch.ones(1, 1), start=0, temperature=1.0, top_p=0.9)
    scores = choose(torch.zeros(1, 0, dtype=torch.long), torch.tensor([[0.6, 0.35, 0.05]]).log())
    assert int(scores.argmax()) == 1


def test_near_temperature_zero_samples_are_what_the_worker_decodes(
    contract: Contract, guard: Path, rows: list[Row]
) -> None:
    sampler = TransformersSampler(contract, Sampling(k=2, temperature=1e-4, max_new_tokens=48), device="cpu")
    found = sampler.sample(prompts(contract, rows))
    engine = TransformersEngine(load(guard, name="guard"), device="cpu")
    asked = []
    for row in rows:
        encoded = contract.encode(row)
        images = tuple([row.image.read_bytes()] if row.image else [])
        asked.append(GuardPrompt(ids=encoded.ids, images=images, answered=False, max_new_tokens=48))
    decoded = engine.generate_batch(asked, lambda _: False)
    for outputs, generation in zip(found, decoded, strict=True):
        assert isinstance(generation, Generation)
        assert [(output.text, output.ended) for output in outputs] == [
            (generation.text, generation.finish == "stop")
        ] * 2
    assert any(output.ended for outputs in found for output in outputs)


def test_samples_repeat_for_a_seed_and_differ_within_a_row(contract: Contract, rows: list[Row]) -> None:
    sampler = TransformersSampler(contract, Sampling(k=4, temperature=1.5, max_new_tokens=24), device="cpu")
    first = sampler.sample(prompts(contract, rows))
    assert first == sampler.sample(prompts(contract, rows))
    assert first != sampler.sample(prompts(contract, rows, seed=1))
    assert any(len({sample.text for sample in samples}) > 1 for samples in first)
    assert [len(samples) for samples in first] == [4] * len(rows)


def test_an_output_that_hits_the_limit_is_said_to_be_cut_off(contract: Contract, rows: list[Row]) -> None:
    sampler = TransformersSampler(contract, Sampling(k=1, max_new_tokens=3), device="cpu")
    (sample,) = sampler.sample(prompts(contract, rows[:1]))[0]
    assert (sample.tokens, sample.ended) == (3, False)


def test_a_repetition_penalty_of_the_published_weights_does_not_bend_the_samples(
    contract: Contract, guard: Path, rows: list[Row], tmp_path: Path
) -> None:
    other = tmp_path / "penalised"
    other.mkdir()
    for file in guard.iterdir():
        (other / file.name).symlink_to(file.resolve())
    config = json.loads((guard / "generation_config.json").read_text())
    (other / "generation_config.json").unlink()
    penalised = {**config, "do_sample": True, "repetition_penalty": 1.9, "temperature": 0.1, "top_k": 1}
    (other / "generation_config.json").write_text(json.dumps(penalised))
    sampling = Sampling(k=2, temperature=1.2, max_new_tokens=32)
    plain = TransformersSampler(contract, sampling, device="cpu").sample(prompts(contract, rows[:3]))
    bent = TransformersSampler(load_contract(str(other)), sampling, device="cpu").sample(prompts(contract, rows[:3]))
    assert plain == bent


def test_a_batch_without_room_says_what_to_lower(
    contract: Contract, rows: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError

    sampler = TransformersSampler(contract, Sampling(k=3), device="cpu")
    monkeypatch.setattr(sampler._model, "generate", full)
    with pytest.raises(SamplingError, match=r"no room for 15 samples .* lower --batch"):
        sampler.sample(prompts(contract, rows))


def test_seeds_are_of_the_row_and_the_run() -> None:
    assert row_seed(0, "a") == row_seed(0, "a")
    assert len({row_seed(0, "a"), row_seed(0, "b"), row_seed(1, "a")}) == 3
    assert all(0 <= row_seed(0, str(n)) < 2**31 for n in range(100))


@pytest.mark.parametrize(
    "wrong", [{"k": 0}, {"temperature": 0.0}, {"top_p": 0.0}, {"top_p": 1.1}, {"max_new_tokens": 0}]
)
def test_settings_that_mean_nothing_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="needs k"):
        Sampling(**wrong)


def test_without_vllm_its_sampler_says_what_to_do(contract: Contract, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(SamplingError, match="--engine transformers"):
        VllmSampler(contract, Sampling())


@dataclasses.dataclass
class Recorded:
    """What a vLLM engine would get; the real one does not install beside this project's torch."""

    made: dict[str, Any] = dataclasses.field(default_factory=dict)
    requests: list[Any] = dataclasses.field(default_factory=list)
    settings: list[Any] = dataclasses.field(default_factory=list)

    def module(self) -> types.ModuleType:
        module = types.ModuleType("vllm")
        recorded = self

        class LLM:
            def __init__(self, **options: Any) -> None:
                recorded.made = options

            def generate(self, requests: list[Any], settings: list[Any], use_tqdm: bool) -> list[Any]:
                recorded.requests, recorded.settings = requests, settings
                one = types.SimpleNamespace(text="said", token_ids=[1, 2], finish_reason="length")
                return [types.SimpleNamespace(outputs=[one] * setting["n"]) for setting in settings]

        module.LLM, module.SamplingParams = LLM, dict  # type: ignore[attr-defined]
        return module


def test_vllm_gets_token_ids_with_one_pad_per_image_and_a_seed_per_row(
    contract: Contract, rows: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = Recorded()
    monkeypatch.setitem(sys.modules, "vllm", recorded.module())
    asked = prompts(contract, rows)
    found = VllmSampler(contract, Sampling(k=3), tensor_parallel_size=2).sample(asked)
    assert [[(one.text, one.tokens, one.ended) for one in samples] for samples in found] == [
        [("said", 2, False)] * 3
    ] * 5
    assert recorded.made["tensor_parallel_size"] == 2
    pad = contract.encoder.image_pad
    for prompt, request, setting in zip(asked, recorded.requests, recorded.settings, strict=True):
        assert request["prompt_token_ids"].count(pad) == len(prompt.pictures)
        assert len(request.get("multi_modal_data", {}).get("image", [])) == len(prompt.pictures)
        assert (setting["n"], setting["seed"], setting["top_p"], setting["temperature"]) == (3, prompt.seed, 0.95, 1.0)


def test_the_real_vllm_decodes_what_transformers_does_and_repeats_for_a_seed(guard: Path, rows: list[Row]) -> None:
    pytest.importorskip("vllm", reason="needs vLLM beside this project")
    contract = load_contract(str(guard))
    asked, greedy = prompts(contract, rows), Sampling(k=2, temperature=1e-4, max_new_tokens=40)
    expected = TransformersSampler(contract, greedy, device="cpu").sample(asked)
    sampler = VllmSampler(contract, greedy, dtype="float32", max_model_len=1024, gpu_memory_utilization=0.1)
    assert [[one.text for one in samples] for samples in sampler.sample(asked)] == [
        [one.text for one in samples] for samples in expected
    ]
    sampler._sampling = dataclasses.replace(greedy, temperature=1.0)
    assert sampler.sample(asked) == sampler.sample(asked)
