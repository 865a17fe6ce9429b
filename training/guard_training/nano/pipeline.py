"""The whole making of nano from the data: rows, pictures, lexicon, tokenizer, cases, training, export.

Everything is drawn from the recipe's seed, so that a run stopped at any point and started again with the same
command goes on from its last checkpoint with the same cases. Layout of the output folder: ``model/`` (what a worker
serves), ``images/`` and ``drawn.jsonl`` (what was drawn and what the reader found), ``held_out/`` (typographic test
set with fonts and texts that training never saw), ``checkpoints-N/``.
"""

# ruff: noqa: S311 - the draws must repeat for a seed, not resist guessing
from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path

import torch
from datasets import Dataset
from rich.progress import Progress
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2_5_VLForConditionalGeneration

from guard_middleware.guard.prompt import SYSTEM, PromptEncoder, render
from guard_training.corpus.rows import Row, Skipped
from guard_training.evaluation.against import evaluation_files
from guard_training.nano.answers import make_answers, make_pairs
from guard_training.nano.bank import default_bank
from guard_training.nano.calibrate import margins, shift_decision, shift_for
from guard_training.nano.cases import encode_cases, make_cases
from guard_training.nano.cpu import keep_memory
from guard_training.nano.drawn import DrawnText, Read
from guard_training.nano.encoder import Embeddings
from guard_training.nano.export import export, shape, write_held_out
from guard_training.nano.lexicon import Lexicon, fit_log_odds, word_lexicon
from guard_training.nano.mixture import cut, distilled_case
from guard_training.nano.model import build_model, image_processor, start_attention, start_embeddings
from guard_training.nano.pictures import typographic
from guard_training.nano.pool import make_pool, make_stretches, word_vectors
from guard_training.nano.recipe import Recipe, stages
from guard_training.nano.render import TRAIN_FONTS
from guard_training.nano.rows import Rows, draw_pairs, draw_prompts, load_rows
from guard_training.nano.teacher import ANSWERED, DECISIONS, LABELS, PHRASES, Kind, decided, teach
from guard_training.nano.tokenizer import train_tokenizer
from guard_training.nano.trainer import (
    Collator,
    GuardSFTTrainer,
    Meanings,
    Vocabulary,
    encode_example,
    in_batches,
    to_dataset,
    training_arguments,
)
from guard_training.nano.variants import Thesaurus, make_thesaurus, variant
from guard_training.nano.wordnet import FOLDER, definitions, lemmas
from guard_training.rowfile import begin, digest, kept_json
from guard_training.tuning.run import StopAfter, last_checkpoint


def make_lexicon(rows: Rows, recipe: Recipe) -> Lexicon:
    """The words of harmful and of unharmful prompts."""
    return word_lexicon(
        [row.prompt[:1500] for row in rows.prompts],
        rows.harmful,
        rows.weights(recipe.source_shares),
        least=2,
        steps=recipe.odds_steps,
        penalty=recipe.odds_penalty,
    )


def make_tokenizer(rows: Rows, definitions: Sequence[str], recipe: Recipe, folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of the texts; a run that goes on keeps the one in ``folder``."""
    if folder.is_dir():
        return AutoTokenizer.from_pretrained(folder)
    texts = [row.prompt[:4000] for row in rows.prompts] + [(row.response or "")[:1500] for row in rows.pairs]
    made = train_tokenizer([*texts, *definitions, *[SYSTEM] * 50], PHRASES, vocab_size=recipe.vocabulary)
    # whole or not at all: a folder that is there is taken for finished
    draft = folder.with_name(f".{folder.name}.{os.getpid()}")
    made.save_pretrained(draft)
    draft.rename(folder)
    return made


def make_texts(
    rows: Rows, glosses: Sequence[str], thesaurus: Callable[[], Thesaurus], recipe: Recipe, folder: Path
) -> dict[str, list[str]]:
    """The texts that are only distilled, by group; a run that goes on keeps those in ``folder``."""
    texts = [row.prompt for row in rows.prompts]

    def stretches() -> list[str]:
        answers = [row.response for row in rows.pairs if row.response]
        return make_stretches([*texts, *answers], recipe.stretches, recipe.stretch_words, recipe.seed)

    def variants() -> list[str]:
        rng = random.Random(recipe.seed)
        drawn = draw_prompts(rows, recipe, recipe.variants, rng)
        return [variant(cut(row.prompt, recipe.variant_words, rng), thesaurus(), rng) for row in drawn]

    return {
        "stretches": kept_json(folder / "stretches.json", stretches),
        "variants": kept_json(folder / "variants.json", variants),
        "definitions": list(glosses[: recipe.definitions]),
    }


def make_answer_pairs(rows: Rows, thesaurus: Thesaurus, recipe: Recipe) -> list[tuple[str, str]]:
    """Pairs made of the labelled ones, see ``answers``."""
    drawn = draw_pairs(rows, recipe, recipe.answers, random.Random(recipe.seed))
    return make_pairs(drawn, [row.prompt for row in rows.prompts], thesaurus, recipe)


def make_model(
    rows: Rows, tokenizer: PreTrainedTokenizerFast, words: Tensor, recipe: Recipe
) -> Qwen2_5_VLForConditionalGeneration:
    """The model, started from the encoder's vectors of its ``words`` and from their odds of harm."""
    model = build_model(tokenizer, shape(recipe), seed=recipe.seed)
    encoder = PromptEncoder(tokenizer)
    ids = [encoder.plain(row.prompt[:1500]) for row in rows.prompts]
    odds, rarity, _ = fit_log_odds(
        ids,
        rows.harmful,
        rows.weights(recipe.source_shares),
        len(tokenizer),
        steps=recipe.odds_steps,
        penalty=recipe.odds_penalty,
    )
    start_embeddings(model, words, odds * rarity, rank=recipe.embedding_rank, odds_dims=recipe.odds_dims)
    start_attention(model)
    return model


def train_nano(
    data: Path,
    output: Path,
    recipe: Recipe,
    read: Read,
    *,
    rationales: Mapping[str, str],
    skipped: Skipped,
    wordnet: Path = FOLDER,
    against: Sequence[Path] = (),
    stop_after: int | None = None,
) -> Path:
    """Makes the guard and returns its folder; continues a run that was stopped. Bad lines go to ``skipped``.

    ``stop_after`` ends after so many steps of the first stage (to look at a run early). Raises ``OutputError`` where
    the folder holds a run of another recipe or of other data.
    """
    glosses = definitions(wordnet)
    settings = {
        "recipe": asdict(recipe),
        "files": {
            str(path): digest(path) for path in [*(data / name for name in recipe.files), *evaluation_files(against)]
        },
        "bank": {path.name: digest(path) for path in sorted(default_bank().glob("*.yaml"))},
        "rationales": _sum(f"{id}\n{text}" for id, text in sorted(rationales.items())),
        "definitions": _sum(glosses),
    }
    begin(output / "nano", settings)
    with Progress() as progress:
        rows = load_rows(data, recipe, skipped, against)
        lexicon = make_lexicon(rows, recipe)
        tokenizer = make_tokenizer(rows, glosses, recipe, output / "tokenizer")
        kept = Embeddings(output / "embeddings")
        words = word_vectors(tokenizer, kept, progress)
        thesaurus = cache(lambda: make_thesaurus([row.prompt for row in rows.prompts], lemmas(wordnet), kept, progress))
        pool = make_pool(
            [row.prompt for row in rows.prompts],
            rows.harmful,
            rows.weights(recipe.source_shares),
            make_texts(rows, glosses, thesaurus, recipe, output),
            lexicon,
            penalty=recipe.head_penalty,
            sharpness=recipe.head_sharpness,
            lexicon_share=recipe.lexicon_share,
            label_share=recipe.label_share,
            kept=kept,
            progress=progress,
        )
        pairs = kept_json(output / "answers.json", lambda: make_answer_pairs(rows, thesaurus(), recipe))
        made = [(prompt, answer) for prompt, answer in pairs]
        answers = make_answers(rows.pairs, made, recipe.source_shares, recipe, kept, progress)
        pictures = typographic(
            rows.prompts, count=recipe.images, fonts=TRAIN_FONTS, folder=output / "images", seed=recipe.seed
        )
        write_held_out(rows.held_out, output / "held_out", recipe)
        drawn = DrawnText(output / "drawn.jsonl", read)
        paths = [row.image for row in (*pictures, *rows.pictures) if row.image]
        task = progress.add_task("reading images", total=len(paths))
        for path in paths:
            drawn(path.read_bytes())
            progress.advance(task)
        staged = []
        for stage in stages(recipe):
            cases = make_cases(rows, pictures, drawn, pool, answers, stage)
            encoded = encode_cases(cases, drawn, lexicon, tokenizer, stage, rationales, progress)
            staged.append(to_dataset(in_batches(encoded, stage.batch, stage.seed)))
    model = make_model(rows, tokenizer, words, recipe)
    keep_memory()
    table, learnt = torch.cat((pool.vectors, answers.vectors)), None
    for number, (stage, examples) in enumerate(zip(stages(recipe), staged, strict=True), 1):
        meanings = Meanings(table, stage.embedding_weight, learnt)
        trainer = _train(model, tokenizer, examples, stage, meanings, output / f"checkpoints-{number}", stop_after)
        model, learnt = trainer.model, trainer.maps
        if stop_after:
            break
    _calibrate(
        trainer,
        [row for row in rows.held_out if row.request and row.prompt and not row.image],
        lexicon,
        tokenizer,
        recipe,
    )
    return export(trainer.model, tokenizer, output / "model", recipe)


def _sum(texts: Iterable[str]) -> str:
    return hashlib.sha256("\0".join(texts).encode(errors="replace")).hexdigest()


def _calibrate(
    trainer: GuardSFTTrainer,
    rows: Sequence[Row],
    lexicon: Lexicon,
    tokenizer: PreTrainedTokenizerFast,
    recipe: Recipe,
) -> None:
    """Moves the operating point to the recipe's share of false positives on the bank's held-out benign prompts."""
    harmful, unharmful = _decisions(tokenizer)[0]
    encoder = PromptEncoder(tokenizer)
    weights = dict.fromkeys(Kind, 1.0)
    judged = [row for row in rows if row.source.startswith("bank_")]
    examples = [
        encode_example(
            render(case.conversation, []),
            decided(teach(case.judged, lexicon)),
            weights,
            encoder,
            tokenizer,
            closed=False,
        )
        for case in (distilled_case(row.prompt, 0.0, 0) for row in judged)
    ]
    found = margins(trainer, examples, harmful=harmful, unharmful=unharmful)
    sides = {label: found[[row.request == label for row in judged]] for label in ("harmful", "unharmful")}
    shift = shift_for(sides["unharmful"], recipe.false_positives)
    caught = sides["harmful"] + shift > 0
    print(f"operating point: shift {shift:.2f}, {int(caught.sum())} of {len(caught)} held-out harmful prompts caught")
    if shift:
        shift_decision(trainer, harmful=harmful, unharmful=unharmful, shift=shift)


def _decisions(tokenizer: PreTrainedTokenizerFast) -> list[tuple[int, int]]:
    """The ids that decide, harmful first: phrases of reasoning (request, then answer), and labels without reasoning."""
    harmful, unharmful = tokenizer.convert_tokens_to_ids(list(DECISIONS))
    unsafe, safe, declines = tokenizer.convert_tokens_to_ids(list(ANSWERED))
    labels = [tokenizer.encode(text, add_special_tokens=False)[0] for text in LABELS]
    return [(harmful, unharmful), (unsafe, safe), (unsafe, declines), (labels[0], labels[1])]


def _train(
    model: Qwen2_5_VLForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    examples: Dataset,
    recipe: Recipe,
    meanings: Meanings,
    checkpoints: Path,
    stop_after: int | None,
) -> GuardSFTTrainer:
    """One stage; goes on from the newest of its checkpoints."""
    encoder = PromptEncoder(tokenizer)
    trainer = GuardSFTTrainer(
        model=model,
        args=training_arguments(
            checkpoints,
            batch=recipe.batch,
            steps=len(examples) // recipe.batch,
            learning_rate=recipe.learning_rate,
            weight_decay=recipe.weight_decay,
            warmup=recipe.warmup,
            save_every=recipe.save_every,
            seed=recipe.seed,
        ),
        train_dataset=examples,
        processing_class=tokenizer,
        data_collator=Collator(image_processor(shape(recipe)), encoder.image_pad, tokenizer.pad_token_id),
        vocabulary=Vocabulary(
            encoder.opening, encoder.image_pad, _decisions(tokenizer), tokenizer.convert_tokens_to_ids(list(PHRASES))
        ),
        meanings=meanings,
    )
    if stop_after:
        trainer.add_callback(StopAfter(stop_after))
    found = last_checkpoint(checkpoints)
    trainer.train(resume_from_checkpoint=str(found) if found else None)
    return trainer
