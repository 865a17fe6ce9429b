"""The whole making of nano from the data: rows, pictures, lexicon, tokenizer, cases, training, export.

Everything is drawn from the recipe's seed, so that a run stopped at any point and started again with the same
command goes on from its last checkpoint with the same cases. Layout of the output folder: ``model/`` (what a worker
serves), ``images/`` and ``drawn.jsonl`` (what was drawn and what the reader found), ``held_out/`` (typographic test
set with fonts and texts that training never saw), ``checkpoints-N/``.
"""

# ruff: noqa: S311 - the draws must repeat for a seed, not resist guessing
from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from datasets import Dataset
from rich.progress import Progress
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2_5_VLForConditionalGeneration

from guard_middleware.guard.prompt import SYSTEM, PromptEncoder, render
from guard_middleware.types import Label
from guard_training.corpus.leakage import find_leaks
from guard_training.corpus.rows import Row, Skipped, held_out, passages, read_good_rows, read_rows, unique_prompts
from guard_training.nano.bank import default_bank, pair_of, read_bank
from guard_training.nano.calibrate import margins, shift_decision, shift_for
from guard_training.nano.cpu import keep_memory
from guard_training.nano.drawn import DrawnText, Read
from guard_training.nano.encoder import Embeddings
from guard_training.nano.export import export, shape, write_held_out
from guard_training.nano.lexicon import Lexicon, balance, fit_log_odds, word_lexicon
from guard_training.nano.mixture import (
    Case,
    cut,
    dialogue_case,
    distilled_case,
    draw,
    pair_case,
    picture_case,
    text_case,
)
from guard_training.nano.model import build_model, image_processor, start_attention, start_embeddings
from guard_training.nano.pictures import typographic
from guard_training.nano.pool import Pool, kept_texts, make_pool, make_stretches, word_vectors
from guard_training.nano.recipe import Recipe, stages
from guard_training.nano.render import TRAIN_FONTS
from guard_training.nano.teacher import DECIDED, DECISIONS, LABELS, PHRASES, Kind, external, label, teach
from guard_training.nano.tokenizer import train_tokenizer
from guard_training.nano.trainer import (
    Collator,
    Example,
    GuardSFTTrainer,
    Meanings,
    StopAfter,
    Vocabulary,
    encode_example,
    in_batches,
    to_dataset,
    training_arguments,
)
from guard_training.nano.variants import make_thesaurus, variant
from guard_training.nano.wordnet import FOLDER, definitions, lemmas
from guard_training.rowfile import begin, digest
from guard_training.tuning.run import last_checkpoint

#: what ``kind_shares`` may name
KINDS = ("text", "distilled", "pair", "dialogue", "picture")


@dataclass(frozen=True, slots=True)
class Rows:
    """Training rows by what they are good for, and what is held out."""

    prompts: list[Row]
    pairs: list[Row]
    pictures: list[Row]
    held_out: list[Row]

    @property
    def harmful(self) -> list[bool]:
        """Of each prompt."""
        return [row.request == "harmful" for row in self.prompts]

    def weights(self, shares: Mapping[str, float]) -> list[float]:
        """Of each prompt in the fits to the labels, see ``lexicon.balance``."""
        return balance([row.source for row in self.prompts], self.harmful, shares)


def load_rows(data: Path, recipe: Recipe, against: Sequence[Path] = (), skipped: Skipped | None = None) -> Rows:
    """Rows of the recipe's files and of the bank, passages added; without those that a file of ``against`` holds.

    Bad lines go to ``skipped``; without it the first one raises ``CorpusError``.
    """
    read = read_rows if skipped is None else partial(read_good_rows, skipped=skipped)
    labelled = [row for name in recipe.files for row in read(data / name)]
    rows = unique_prompts([*labelled, *read_bank(default_bank())])
    held = {path.name: [row for row in read(path) if not row.image] for path in against}
    leaked = {leak.id for leak in find_leaks([row for row in rows if not row.image], held)} if held else set()
    rows = [row for row in rows if row.source not in recipe.exclude and row.id not in leaked]

    def left_out(row: Row) -> bool:
        if row.source.startswith("bank_"):
            return held_out(pair_of(row.id), recipe.held_out_bank)
        return held_out(row.id, recipe.held_out)

    kept = [row for row in rows if not left_out(row)]
    rest = [row for row in rows if left_out(row)]
    rng = random.Random(recipe.seed)
    kept += passages(kept, rng)
    rest += passages(rest, rng)
    return Rows(
        prompts=[row for row in kept if row.request and row.prompt and not row.image],
        pairs=[row for row in kept if row.response and row.response_label],
        pictures=[row for row in kept if row.image],
        held_out=rest,
    )


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
    made.save_pretrained(folder)
    return made


def make_texts(
    rows: Rows,
    glosses: Sequence[str],
    words: Mapping[str, Sequence[str]],
    recipe: Recipe,
    folder: Path,
    kept: Embeddings,
    progress: Progress,
) -> dict[str, list[str]]:
    """The texts that are only distilled, by group; a run that goes on keeps those in ``folder``."""
    texts = [row.prompt for row in rows.prompts]

    def stretches() -> list[str]:
        answers = [row.response for row in rows.pairs if row.response]
        return make_stretches([*texts, *answers], recipe.stretches, recipe.stretch_words, recipe.seed)

    def variants() -> list[str]:
        rng = random.Random(recipe.seed)
        drawn = draw_prompts(_by_label(rows), recipe, recipe.variants, rng)
        thesaurus = make_thesaurus(texts, words, kept, progress)
        return [variant(cut(row.prompt, recipe.variant_words, rng), thesaurus, rng) for row in drawn]

    return {
        "stretches": kept_texts(folder / "stretches.json", stretches),
        "variants": kept_texts(folder / "variants.json", variants),
        "definitions": list(glosses[: recipe.definitions]),
    }


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


def make_cases(rows: Rows, typographic_rows: Sequence[Row], drawn: DrawnText, pool: Pool, recipe: Recipe) -> list[Case]:
    """The stream of cases, in order of drawing."""
    rng = random.Random(recipe.seed)
    by_label = _by_label(rows)
    others: Mapping[Label, Sequence[str]] = {label: [row.prompt for row in kept] for label, kept in by_label.items()}
    wanted = {kind: int(recipe.cases * recipe.kind_shares.get(kind, 0.0)) for kind in KINDS}

    words = recipe.prompt_words
    cases = [text_case(row, others, words, rng) for row in draw_prompts(by_label, recipe, wanted["text"], rng)]
    cases += [dialogue_case(row, others, words, rng) for row in draw_prompts(by_label, recipe, wanted["dialogue"], rng)]
    cases += [
        pair_case(_mixed(row, by_label, rng), words, rng) for row in _pairs(rows.pairs, recipe, wanted["pair"], rng)
    ]
    numbers = {id(row): number for number, row in enumerate(rows.prompts)}
    for group, share in recipe.pool_shares.items():
        count = int(wanted["distilled"] * share)
        drawn_numbers = (
            [numbers[id(row)] for row in draw_prompts(by_label, recipe, count, rng)]
            if group == "prompts"
            else [pool.draw(group, rng) for _ in range(count)]
        )
        cases += [distilled_case(pool.texts[n], float(pool.chances[n]), n) for n in drawn_numbers]
    pictures = [*typographic_rows, *rows.pictures]
    shares = {"typographic": 6.0}
    for row in draw(pictures, shares, recipe.power, wanted["picture"], rng):
        assert row.image is not None
        cases.append(picture_case(row, drawn(row.image.read_bytes()), others, rng))
    return [replace(case, brief=rng.random() < recipe.brief_share) for case in cases]


def draw_prompts(by_label: Mapping[Label, Sequence[Row]], recipe: Recipe, count: int, rng: random.Random) -> list[Row]:
    """Rows of both labels in the recipe's shares, the harmful ones first."""
    harmful = int(count * recipe.harmful_share)
    return draw(by_label["harmful"], recipe.source_shares, recipe.power, harmful, rng) + draw(
        by_label["unharmful"], recipe.source_shares, recipe.power, count - harmful, rng
    )


def _by_label(rows: Rows) -> dict[Label, list[Row]]:
    by_label: dict[Label, list[Row]] = {"harmful": [], "unharmful": []}
    for row in rows.prompts:
        if row.request:
            by_label[row.request].append(row)
    return by_label


def _pairs(pairs: Sequence[Row], recipe: Recipe, count: int, rng: random.Random) -> list[Row]:
    harmful = [row for row in pairs if row.response_label == "harmful"]
    unharmful = [row for row in pairs if row.response_label == "unharmful"]
    return draw(harmful, recipe.source_shares, recipe.power, count // 2, rng) + draw(
        unharmful, recipe.source_shares, recipe.power, count - count // 2, rng
    )


def _mixed(row: Row, by_label: Mapping[Label, Sequence[Row]], rng: random.Random) -> Row:
    """One pair in five gets another prompt, so that the answer's label is not read off the request."""
    if rng.random() > 0.2:
        return row
    other = rng.choice(by_label[rng.choice(("harmful", "unharmful"))])
    return Row(row.id, row.source, other.prompt, other.request, row.response, row.response_label, row.category)


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
        else:
            stretches = external(reasoning, case.judged) if reasoning else teach(case.judged, lexicon)
        closed = case.chance is None
        example = encode_example(
            render(case.conversation, found),
            stretches if closed else stretches[:DECIDED],
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
        "files": {str(path): digest(path) for path in [*(data / name for name in recipe.files), *against]},
        "bank": {path.name: digest(path) for path in sorted(default_bank().glob("*.yaml"))},
        "rationales": _sum(f"{id}\n{text}" for id, text in sorted(rationales.items())),
        "definitions": _sum(glosses),
    }
    begin(output / "nano", settings)
    with Progress() as progress:
        rows = load_rows(data, recipe, against, skipped)
        lexicon = make_lexicon(rows, recipe)
        tokenizer = make_tokenizer(rows, glosses, recipe, output / "tokenizer")
        kept = Embeddings(output / "embeddings")
        words = word_vectors(tokenizer, kept, progress)
        pool = make_pool(
            [row.prompt for row in rows.prompts],
            rows.harmful,
            rows.weights(recipe.source_shares),
            make_texts(rows, glosses, lemmas(wordnet), recipe, output, kept, progress),
            lexicon,
            penalty=recipe.head_penalty,
            sharpness=recipe.head_sharpness,
            lexicon_share=recipe.lexicon_share,
            kept=kept,
            progress=progress,
        )
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
            cases = make_cases(rows, pictures, drawn, pool, stage)
            encoded = encode_cases(cases, drawn, lexicon, tokenizer, stage, rationales, progress)
            staged.append(to_dataset(in_batches(encoded, stage.batch, stage.seed)))
    model = make_model(rows, tokenizer, words, recipe)
    keep_memory()
    learnt = None
    for number, (stage, examples) in enumerate(zip(stages(recipe), staged, strict=True), 1):
        meanings = Meanings(pool.vectors, stage.embedding_weight, learnt)
        trainer = _train(model, tokenizer, examples, stage, meanings, output / f"checkpoints-{number}", stop_after)
        model, learnt = trainer.model, trainer.map
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
    (harmful, unharmful), _ = _decisions(tokenizer)
    encoder = PromptEncoder(tokenizer)
    weights = dict.fromkeys(Kind, 1.0)
    judged = [row for row in rows if row.source.startswith("bank_")]
    examples = [
        encode_example(
            render(case.conversation, []),
            teach(case.judged, lexicon)[:DECIDED],
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
    caught = float((sides["harmful"] + shift > 0).float().mean())
    print(f"operating point: shift {shift:.2f}, {caught:.1%} of the held-out harmful prompts of the bank caught")
    if shift:
        shift_decision(trainer, harmful=harmful, unharmful=unharmful, shift=shift)


def _decisions(tokenizer: PreTrainedTokenizerFast) -> list[tuple[int, int]]:
    """The ids that decide, harmful first: of the reasoning's phrases, and of the labels without reasoning."""
    harmful, unharmful = tokenizer.convert_tokens_to_ids(list(DECISIONS))
    labels = [tokenizer.encode(text, add_special_tokens=False)[0] for text in LABELS]
    return [(harmful, unharmful), (labels[0], labels[1])]


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
