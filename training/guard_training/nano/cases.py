"""The stream of training cases of each kind that a recipe asks for, and their encoding."""

# ruff: noqa: S311 - the draws must repeat for a seed, not resist guessing
from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace

from rich.progress import Progress
from transformers import PreTrainedTokenizerFast

from guard_middleware.guard.prompt import PromptEncoder, render
from guard_middleware.types import Label
from guard_training.corpus.rows import Row
from guard_training.nano.answers import Answers
from guard_training.nano.drawn import DrawnText
from guard_training.nano.lexicon import Lexicon
from guard_training.nano.mixture import (
    Case,
    answered_case,
    cut,
    dialogue_case,
    distilled_case,
    draw,
    joined_case,
    pair_case,
    picture_case,
    text_case,
)
from guard_training.nano.pool import Pool
from guard_training.nano.recipe import Recipe
from guard_training.nano.rows import Rows, draw_pairs, draw_prompts
from guard_training.nano.teacher import Kind, decided, external, label, teach
from guard_training.nano.trainer import Example, encode_example

#: what ``kind_shares`` may name
KINDS = ("text", "distilled", "joined", "answered", "pair", "dialogue", "picture")
#: words of a joined text: up to what fills a window
_JOINED_WORDS = (40, 160)


def make_cases(
    rows: Rows, typographic_rows: Sequence[Row], drawn: DrawnText, pool: Pool, answers: Answers, recipe: Recipe
) -> list[Case]:
    """The stream of cases, in order of drawing. Meanings count through the pool's vectors, then the answers'."""
    rng = random.Random(recipe.seed)
    by_label = rows.by_label()
    others: Mapping[Label, Sequence[str]] = {label: [row.prompt for row in kept] for label, kept in by_label.items()}
    wanted = {kind: int(recipe.cases * recipe.kind_shares.get(kind, 0.0)) for kind in KINDS}

    words = recipe.prompt_words
    cases = [text_case(row, others, words, rng) for row in draw_prompts(rows, recipe, wanted["text"], rng)]
    cases += [dialogue_case(row, others, words, rng) for row in draw_prompts(rows, recipe, wanted["dialogue"], rng)]
    cases += [
        pair_case(_mixed(row, by_label, rng), words, rng) for row in draw_pairs(rows, recipe, wanted["pair"], rng)
    ]
    numbers = {id(row): number for number, row in enumerate(rows.prompts)}
    for group, share in recipe.pool_shares.items():
        count = int(wanted["distilled"] * share)
        drawn_numbers = (
            [numbers[id(row)] for row in draw_prompts(rows, recipe, count, rng)]
            if group == "prompts"
            else [pool.draw(group, rng) for _ in range(count)]
        )
        cases += [distilled_case(pool.texts[n], float(pool.chances[n]), n) for n in drawn_numbers]
    cases += _joined(by_label, numbers, pool, wanted["joined"], recipe, rng)
    places = {id(row): number for number, row in enumerate(rows.pairs)}
    chosen = [places[id(row)] for row in draw_pairs(rows, recipe, wanted["answered"] // 2, rng)]
    chosen += rng.choices(answers.made, k=wanted["answered"] - len(chosen))
    cases += [answered_case(*answers.pairs[n], float(answers.chances[n]), len(pool.texts) + n) for n in chosen]
    pictures = [*typographic_rows, *rows.pictures]
    shares = {"typographic": 6.0}
    for row in draw(pictures, shares, recipe.power, wanted["picture"], rng):
        assert row.image is not None
        cases.append(picture_case(row, drawn(row.image.read_bytes()), others, rng))
    return [replace(case, brief=rng.random() < recipe.brief_share) for case in cases]


def _joined(
    by_label: Mapping[Label, Sequence[Row]],
    numbers: Mapping[int, int],
    pool: Pool,
    count: int,
    recipe: Recipe,
    rng: random.Random,
) -> list[Case]:
    """Joined texts, harmful ones (with a harmful text among the others) in the recipe's share."""
    cases = []
    harmful = int(count * recipe.harmful_share)
    worst = draw(by_label["harmful"], recipe.source_shares, recipe.power, harmful, rng)
    others = iter(draw(by_label["unharmful"], recipe.source_shares, recipe.power, 9 * count, rng))
    for n in range(count):
        chosen = [worst[n]] if n < harmful else []
        words = rng.randint(*_JOINED_WORDS)
        each = rng.choice((20, 40, 80))
        while sum(min(each, len(row.prompt.split())) for row in chosen) < words and len(chosen) < 9:
            chosen.append(next(others))
        texts, chances = [], []
        for row in chosen:
            text = pool.texts[numbers[id(row)]]
            texts.append(cut(text, each, rng) if row.request == "unharmful" else text)
            chances.append(float(pool.chances[numbers[id(row)]]))
        cases.append(joined_case(texts, chances, "harmful" if n < harmful else "unharmful", rng))
    return cases


def _mixed(row: Row, by_label: Mapping[Label, Sequence[Row]], rng: random.Random) -> Row:
    """One pair in five gets another prompt, so that the answer's label is not read off the request."""
    if rng.random() > 0.2:
        return row
    other = rng.choice(by_label[rng.choice(("harmful", "unharmful"))])
    return replace(row, id="", prompt=other.prompt, request=other.request)


def encode_cases(
    cases: Sequence[Case],
    drawn: DrawnText,
    lexicon: Lexicon,
    tokenizer: PreTrainedTokenizerFast,
    recipe: Recipe,
    rationales: Mapping[str, str],
    progress: Progress,
) -> list[Example]:
    """Cases as ids; one longer than twice the window is left out."""
    encoder = PromptEncoder(tokenizer)
    weights = {Kind(kind): weight for kind, weight in recipe.token_weights.items()}
    task = progress.add_task("encoding cases", total=len(cases))
    examples = []
    for case in cases:
        found = [drawn(blob.data) for blob in case.conversation.blobs()]
        reasoning = rationales.get(case.id)
        if case.brief:
            stretches = label(case.judged)
        elif reasoning and case.judged.request:  # without that label the rationale has no verdict to end in
            stretches = external(reasoning, case.judged)
        else:
            stretches = teach(case.judged, lexicon)
        closed = case.chance is None
        example = encode_example(
            render(case.conversation, found),
            stretches if closed else decided(stretches),
            weights,
            encoder,
            tokenizer,
            case.picture,
            chance=case.chance,
            meaning=case.meaning,
            closed=closed,
        )
        if len(example.prompt) <= 2 * recipe.window_tokens:
            examples.append(example)
        progress.advance(task)
    return examples
