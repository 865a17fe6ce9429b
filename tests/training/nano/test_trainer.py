from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import pytest
import torch
from PIL import Image

from guard_middleware.guard.parse import parse
from guard_middleware.guard.prompt import PromptEncoder, render
from guard_middleware.types import Blob, Conversation, Label, Message, Text
from guard_middleware.worker.weights import load
from guard_training.corpus.rows import Row
from guard_training.nano.calibrate import shift_decision
from guard_training.nano.cases import _mixed
from guard_training.nano.export import export
from guard_training.nano.lexicon import Lexicon
from guard_training.nano.mixture import (
    Case,
    answered_case,
    dialogue_case,
    distilled_case,
    joined_case,
    pair_case,
    picture_case,
    snippet,
    text_case,
)
from guard_training.nano.model import build_model, image_processor, start_embeddings
from guard_training.nano.recipe import Recipe, default_recipe, read_recipe
from guard_training.nano.teacher import ANSWERED, DECISIONS, PHRASES, Judged, Kind, decided, joined, teach
from guard_training.nano.teacher import label as brief_form
from guard_training.nano.tokenizer import train_tokenizer
from guard_training.nano.trainer import (
    Collator,
    Example,
    GuardSFTTrainer,
    Meanings,
    Vocabulary,
    encode_example,
    in_batches,
    to_dataset,
    training_arguments,
)
from guard_training.tuning.run import StopAfter

WORDS = ["how do I pick a lock", "how do I bake bread", "what is the weather", "tell me about locks", "None of it"]
LEXICON = Lexicon({"lock": 1.0, "bread": -1.0}, {"lock": 1.0, "bread": 1.0})


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    small = {"hidden": 64, "intermediate": 64, "layers": 2, "heads": 1, "vision_hidden": 32, "vision_layers": 1}
    return dataclasses.replace(read_recipe(default_recipe()), **small, image_tokens=4, batch=2, warmup=0)


@pytest.fixture(scope="module")
def tokenizer():  # type: ignore[no-untyped-def]
    return train_tokenizer(WORDS * 20, PHRASES, vocab_size=600)


def _shape(recipe: Recipe):  # type: ignore[no-untyped-def]
    from guard_training.nano.export import shape

    return shape(recipe)


def _examples(tokenizer, recipe: Recipe, folder: Path) -> list[Example]:  # type: ignore[no-untyped-def]
    encoder = PromptEncoder(tokenizer)
    weights = {Kind(kind): weight for kind, weight in recipe.token_weights.items()}
    out = []
    for number in range(16):
        label = "harmful" if number % 2 else "unharmful"
        text = WORDS[number % 2]
        picture = None
        parts: tuple = (Text(text),)
        if number % 4 == 0:
            picture = folder / f"{number}.png"
            Image.new("RGB", (56, 60), (number, 9, 9)).save(picture)
            parts = (Blob("image/png", picture.read_bytes()), Text(text))
        transcript = render(Conversation((Message("user", parts),)))
        stretches = teach(Judged(text, "the request", label), LEXICON)  # type: ignore[arg-type]
        out.append(encode_example(transcript, stretches, weights, encoder, tokenizer, picture))
    return out


def _trainer(  # type: ignore[no-untyped-def]
    tokenizer,
    recipe: Recipe,
    folder: Path,
    examples: list[Example],
    draws: int = 8,
    meanings: Meanings | None = None,
) -> GuardSFTTrainer:
    encoder = PromptEncoder(tokenizer)
    args = training_arguments(
        folder / "checkpoints", batch=2, steps=6, learning_rate=1e-3, weight_decay=0.0, warmup=0, save_every=3, seed=1
    )
    args.logging_steps, args.disable_tqdm = 1, True
    return GuardSFTTrainer(
        model=build_model(tokenizer, _shape(recipe), seed=1),
        args=args,
        train_dataset=to_dataset(examples),
        processing_class=tokenizer,
        data_collator=Collator(image_processor(_shape(recipe)), encoder.image_pad, tokenizer.pad_token_id),
        vocabulary=Vocabulary(
            encoder.opening,
            encoder.image_pad,
            [tuple(tokenizer.convert_tokens_to_ids(list(DECISIONS)))],
            tokenizer.convert_tokens_to_ids(list(PHRASES)),
            draws,
        ),
        meanings=meanings,
    )


MEANINGS = Meanings(torch.nn.functional.normalize(torch.eye(6)[:4] + 0.1, dim=1).half(), 0.5)


def _distilled(examples: list[Example]) -> list[Example]:
    """Every other row with an encoder's odds and meaning, cut after the decision."""
    cut = [
        dataclasses.replace(
            e,
            completion=e.completion[: e.decided + 1],
            weights=e.weights[: e.decided + 1],
            chance=0.9 if n % 4 else 0.1,
            meaning=n % 4,
        )
        for n, e in enumerate(examples)
    ]
    return [one if n % 2 else other for n, (one, other) in enumerate(zip(examples, cut, strict=True))]


def _losses(trainer: GuardSFTTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_every_phrase_is_one_token_that_untrusted_text_cannot_make(tokenizer) -> None:  # type: ignore[no-untyped-def]
    encoder = PromptEncoder(tokenizer)
    for phrase in PHRASES:
        assert len(tokenizer.encode(phrase, add_special_tokens=False)) == 1
        assert tokenizer.convert_tokens_to_ids(phrase) not in encoder.plain(phrase)
    for label in (" harmful", " unharmful"):
        assert len(encoder.plain(label)) == 1


def test_what_is_trained_is_what_is_parsed(tokenizer, recipe: Recipe, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    for example in _examples(tokenizer, recipe, tmp_path):
        text = tokenizer.decode(example.completion, skip_special_tokens=True)
        assert parse(text, answered=False).request in ("harmful", "unharmful")
        assert len(example.weights) == len(example.completion)
        assert example.completion[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_the_shared_opening_changes_nothing_but_the_cost(tokenizer, recipe: Recipe, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    trainer = _trainer(tokenizer, recipe, tmp_path, _examples(tokenizer, recipe, tmp_path), draws=0)
    batch = trainer.data_collator([trainer.train_dataset[n] for n in range(4)])
    model = trainer.model
    loss = trainer.compute_loss(model, dict(batch))
    logits = model(
        input_ids=batch["input_ids"],
        attention_mask=torch.ones_like(batch["input_ids"]),
        mm_token_type_ids=(batch["input_ids"] == trainer._vocabulary.image_pad).int(),
        pixel_values=batch["pixel_values"],
        image_grid_thw=batch["image_grid_thw"],
    ).logits[:, :-1]
    labels, weights = batch["labels"][:, 1:], batch["loss_weights"][:, 1:]
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=-100)
    assert loss.item() == pytest.approx(((losses * weights).sum() / weights.sum()).item(), rel=1e-4)
    loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "visual" not in name)


def test_a_resumed_run_gives_the_same_losses(tokenizer, recipe: Recipe, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    examples = _distilled(_examples(tokenizer, recipe, tmp_path))

    def trainer(folder: str) -> GuardSFTTrainer:
        return _trainer(tokenizer, recipe, tmp_path / folder, examples, meanings=MEANINGS)

    whole = trainer("whole")
    whole.train()
    first = trainer("cut")
    first.add_callback(StopAfter(3))
    first.train()
    second = trainer("cut")
    second.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoints" / "checkpoint-3"))
    assert len(_losses(whole)) == 6
    assert _losses(second) == pytest.approx(_losses(whole), rel=1e-5)


def test_the_exported_folder_is_one_that_the_worker_takes(tokenizer, recipe: Recipe, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    model = build_model(tokenizer, _shape(recipe), seed=1)
    words = torch.rand(len(tokenizer), 12, generator=torch.Generator().manual_seed(1))
    start_embeddings(model, words, torch.linspace(-1, 1, len(tokenizer)), rank=4, odds_dims=2)
    weights = load(export(model, tokenizer, tmp_path / "model", recipe), name="x")
    assert weights.facts.name == recipe.name
    assert weights.facts.reader is True
    assert weights.facts.max_pixels == 4 * 28 * 28


def test_batches_hold_rows_of_like_length_in_a_fixed_order() -> None:
    examples = [Example([0] * n, [1], [1.0]) for n in random.Random(0).choices(range(5, 90), k=65)]
    ordered = in_batches(examples, 8, seed=2)
    assert len(ordered) == 64
    assert ordered == in_batches(examples, 8, seed=2)
    spread = [
        max(map(len, b)) - min(map(len, b)) for b in ([e.prompt for e in ordered[i : i + 8]] for i in range(0, 64, 8))
    ]
    assert sum(spread) / len(spread) < 20


def test_cases_say_what_they_hold(tmp_path: Path) -> None:
    rng = random.Random(5)
    others = {"harmful": ["steal a car"], "unharmful": ["bake some bread"]}
    Image.new("RGB", (30, 30)).save(tmp_path / "a.png")
    row = Row("a", "s", "how do I pick a lock", "harmful", "No.", "unharmful", image=tmp_path / "a.png")
    made: list[Case] = []
    for _ in range(30):
        made += [text_case(row, others, 40, rng), dialogue_case(row, others, 40, rng), pair_case(row, 40, rng)]  # type: ignore[arg-type]
        made.append(picture_case(row, "drawn words", others, rng))  # type: ignore[arg-type]
    for case in made:
        assert case.judged.request == "harmful"
        assert joined(teach(case.judged, LEXICON))
        assert render(case.conversation, ["drawn words"] * len(case.conversation.blobs())).text()
        assert (case.judged.answer is None) == (case.conversation.answer is None)


def test_a_case_has_its_rows_id_only_where_it_says_just_what_the_row_says(tmp_path: Path) -> None:
    rng = random.Random(5)
    others = {"harmful": ["steal a car"], "unharmful": ["bake some bread"]}
    Image.new("RGB", (30, 30)).save(tmp_path / "a.png")
    row = Row("a", "s", "how do I pick a lock", "unharmful", "No.", "unharmful", image=tmp_path / "a.png")
    by_label = {label: [Row("b", "s", said[0], label)] for label, said in others.items()}  # type: ignore[arg-type]
    kept: dict[str, int] = {}
    for _ in range(300):
        for name, case in {
            "text": text_case(row, others, 40, rng),  # type: ignore[arg-type]
            "cut": text_case(row, others, 4, rng),  # type: ignore[arg-type]
            "pair": pair_case(_mixed(row, by_label, rng), 40, rng),  # type: ignore[arg-type]
            "dialogue": dialogue_case(row, others, 40, rng),  # type: ignore[arg-type]
            "picture": picture_case(row, "", others, rng),  # type: ignore[arg-type]
            "drawn": picture_case(row, "drawn words", others, rng),  # type: ignore[arg-type]
        }.items():
            said = [
                part.text for message in case.conversation.messages for part in message.parts if hasattr(part, "text")
            ]
            same = (said, case.judged.request) == ([row.prompt], row.request)
            assert (case.id == "a") == (same and name != "dialogue"), name
            kept[name] = kept.get(name, 0) + bool(case.id)
    assert 50 < kept["text"] < 250
    assert 200 < kept["pair"] < 300
    assert (kept["cut"], kept["dialogue"], kept["picture"], kept["drawn"]) == (0, 0, 300, 0)


def test_joining_makes_harmful_if_either_is() -> None:
    rng = random.Random(1)
    row = Row("a", "s", "how do I bake bread today", "unharmful")
    others = {"harmful": ["steal a car"], "unharmful": ["water the plants"]}
    for _ in range(300):
        judged = text_case(row, others, 60, rng).judged  # type: ignore[arg-type]
        assert (judged.request == "harmful") == ("steal a car" in judged.words.lower())


def test_the_operating_point_moves_by_what_was_asked(tokenizer, recipe: Recipe, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    trainer = _trainer(tokenizer, recipe, tmp_path, _examples(tokenizer, recipe, tmp_path))
    rows = [trainer.train_dataset[n] for n in range(16)]
    risky, ordinary = (tokenizer.convert_tokens_to_ids(phrase) for phrase in ("risky words in ", "ordinary words in "))

    def margins() -> torch.Tensor:
        batch = trainer.data_collator(rows)
        with torch.no_grad():
            hidden = trainer.hidden(trainer.model, batch)[:, :-1]
            logits = trainer.model.lm_head(hidden)
        at = torch.isin(batch["labels"][:, -hidden.shape[1] :], torch.tensor([risky, ordinary]))
        return (logits[..., risky] - logits[..., ordinary])[at]

    before = margins()
    spread = shift_decision(trainer, harmful=risky, unharmful=ordinary, shift=-2.0)
    assert spread < 0.2
    assert (margins() - before).mean().item() == pytest.approx(-2.0, abs=0.3)


def test_a_soft_label_draws_the_decision_towards_its_odds(tokenizer, recipe: Recipe, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    examples = [dataclasses.replace(e, chance=0.8) for e in _examples(tokenizer, recipe, tmp_path)[1:3]]
    trainer = _trainer(tokenizer, recipe, tmp_path, examples, draws=0)
    batch = trainer.data_collator([trainer.train_dataset[n] for n in range(2)])
    harmful, unharmful = tokenizer.convert_tokens_to_ids(list(DECISIONS))
    optimizer = torch.optim.Adam(trainer.model.parameters(), 3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        trainer.compute_loss(trainer.model, dict(batch)).backward()
        optimizer.step()
    with torch.no_grad():
        hidden = trainer.hidden(trainer.model, batch)[:, :-1]
        at = torch.isin(batch["labels"][:, -hidden.shape[1] :], torch.tensor([harmful, unharmful]))
        chances = trainer.model.lm_head(hidden[at])[:, [harmful, unharmful]].softmax(1)[:, 0]
    assert chances.tolist() == pytest.approx([0.8, 0.8], abs=0.1)


def test_a_meaning_pulls_the_mapped_state_to_it(tokenizer, recipe: Recipe, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    examples = [e for e in _distilled(_examples(tokenizer, recipe, tmp_path)) if e.meaning is not None]
    trainer = _trainer(tokenizer, recipe, tmp_path, examples * 2, draws=0, meanings=MEANINGS)
    trainer.train()
    seen = trainer._metrics["train"]["embedding_distance"] or [
        entry["embedding_distance"] for entry in trainer.state.log_history if "embedding_distance" in entry
    ]
    assert seen[-1] < seen[0]


def test_a_later_stage_goes_on_with_the_map_of_the_one_before(tokenizer, recipe: Recipe, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    examples = [e for e in _distilled(_examples(tokenizer, recipe, tmp_path)) if e.meaning is not None] * 2
    first = _trainer(tokenizer, recipe, tmp_path / "first", examples, meanings=MEANINGS)
    first.train()
    meanings = dataclasses.replace(MEANINGS, maps=first.maps)
    second = _trainer(tokenizer, recipe, tmp_path / "second", examples, meanings=meanings)
    assert second.maps is first.maps
    before = {name: value.clone() for name, value in second.maps.state_dict().items()}
    second.train()
    assert not torch.equal(second.maps.state_dict()["0.1.weight"], before["0.1.weight"])  # it learns on


def test_a_stretch_is_words_of_the_texts() -> None:
    rng = random.Random(3)
    for _ in range(50):
        assert set(snippet(["how do I pick", "bake some bread"], 3, rng).replace(".", " ").split()) <= set(
            "how do I pick bake some bread".split()
        )


def test_a_distilled_case_ends_at_the_decision() -> None:
    case = distilled_case("how do I bake bread", 0.2, 7)
    assert (case.judged.request, case.chance, case.meaning) == ("unharmful", 0.2, 7)
    assert [stretch.kind for stretch in decided(teach(case.judged, LEXICON))] == [Kind.TEMPLATE, Kind.REQUEST]


def test_an_answered_case_ends_at_the_decision_about_the_answer_and_leaves_the_request_alone() -> None:
    case = answered_case("how do I bake bread", "with flour", 0.8, 3)
    kinds = [stretch.kind for stretch in decided(teach(case.judged, LEXICON))]
    assert kinds[-1] is Kind.RESPONSE
    assert Kind.REQUEST not in kinds
    brief = decided(brief_form(case.judged))
    assert [(stretch.text, stretch.kind) for stretch in brief[-1:]] == [(" harmful", Kind.RESPONSE)]


def test_an_answers_chance_and_meaning_count_where_the_answer_is_decided(
    tokenizer,
    recipe: Recipe,
    tmp_path: Path,  # type: ignore[no-untyped-def]
) -> None:
    weights = {Kind(kind): weight for kind, weight in recipe.token_weights.items()}
    both = []
    for number in (1, 2):
        case = answered_case("how do I bake bread", "what lock", 0.7, number)
        stretches = decided(teach(case.judged, LEXICON))
        transcript, encoder = render(case.conversation), PromptEncoder(tokenizer)
        both.append(
            encode_example(
                transcript,
                stretches,
                weights,
                encoder,
                tokenizer,
                chance=case.chance,
                meaning=case.meaning,
                closed=False,
            )
        )
    row = to_dataset(both)[0]
    (at,) = [n for n, chance in enumerate(row["chances"]) if chance >= 0]
    assert tokenizer.decode(row["input_ids"][at]) in ANSWERED
    trainer = _trainer(tokenizer, recipe, tmp_path, both, draws=0, meanings=MEANINGS)
    trainer.train()
    assert any("answer_embedding_distance" in entry for entry in trainer.state.log_history)
    assert not any("embedding_distance" in entry for entry in trainer.state.log_history)


@pytest.mark.parametrize(
    ("label", "chances", "expected"),
    [("unharmful", [0.05, 0.1], 0.1), ("unharmful", [0.05, 0.6], 0.15), ("harmful", [0.9, 0.1], 0.9),
     ("harmful", [0.2, 0.1], 0.7)],
)  # fmt: skip
def test_the_worst_of_joined_texts_gives_the_chance_as_far_as_their_label_allows(
    label: Label, chances: list[float], expected: float
) -> None:
    case = joined_case(["one two three four", "five six"], chances, label, random.Random(1))
    (message,) = case.conversation.messages
    (text,) = message.parts
    assert isinstance(text, Text)
    assert sorted(text.text.replace("---", "").split()) == sorted("one two three four five six".split())
    assert (case.chance, case.meaning, case.judged.request) == (expected, None, label)
