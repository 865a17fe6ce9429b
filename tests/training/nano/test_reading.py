from __future__ import annotations

import io
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from guard_middleware.guard.parse import completion
from guard_middleware.guard.prompt import PromptEncoder
from guard_middleware.types import Label
from guard_middleware.worker.engine import Generation
from guard_middleware.worker.weights import ModelFacts
from guard_training.corpus.rows import Row
from guard_training.nano.curriculum import (
    CURRICULUM,
    Progressed,
    TowerError,
    TowerSettings,
    draw_batch,
    load_tower,
    train_tower,
)
from guard_training.nano.glyphs import ALPHABET, KINDS, SLOTS, TOKEN, Texts, bank_texts, blank, decode, draw, write
from guard_training.nano.reading import (
    ReadingTower,
    TowerReader,
    TowerShape,
    edits,
    measure,
    pad,
    processor,
    reading_loss,
    rows_of,
    similarity,
    to_batch,
)
from guard_training.nano.render import HELD_OUT_FONTS, TRAIN_FONTS, _files, _font
from guard_training.nano.tokenizer import train_tokenizer
from guard_training.nano.unread import Timed, chosen, compare

TINY = TowerShape(hidden=64, intermediate=96, layers=2, out=64)
TEXTS = Texts(("the cat sat on the mat", "bread and butter"), ("the", "cat", "sat", "mat", "bread"))
FONTS = [file for package in TRAIN_FONTS[:-1] for file in (_files(package)[0], _files(package)[-1])]


def settings_of(**changed: object) -> TowerSettings:
    base = TowerSettings(steps=4, patches=64, warmup=2, save_every=1, measure_every=4, measured=1, shape=TINY)
    return replace(base, **changed)


# labels


@pytest.mark.parametrize("font", [*FONTS, "pillow-default"])
@pytest.mark.parametrize(("row", "column"), [(0, 0), (1, 2), (3, 3)])
def test_a_glyph_is_labelled_in_the_token_that_holds_its_ink(font: str, row: int, column: int) -> None:
    sheet, face = blank(4 * TOKEN, 4 * TOKEN), _font(font, 20)
    left = (column + 0.5) * TOKEN - face.getlength("o") / 2
    write(sheet, "o", left, (row + 0.5) * TOKEN, face, 20, (0, 0, 0))
    rows, columns = np.nonzero(np.asarray(sheet.image.convert("L")) < 128)
    assert (rows.mean() // TOKEN, columns.mean() // TOKEN) == (row, column)
    ((labelled_row, slot),) = np.argwhere(sheet.labels > 0)
    assert (labelled_row, slot // SLOTS) == (row, column)
    assert abs((slot + 0.5) * TOKEN / SLOTS - columns.mean()) < TOKEN / SLOTS
    assert sheet.texts()[row] == "o"


@pytest.mark.parametrize("font", [*FONTS, "pillow-default"])
def test_narrow_and_double_letters_stay_apart(font: str) -> None:
    text = "ill |'i!! bookkeeper 11..ii"
    for size in (20, 28):
        sheet = blank(16 * TOKEN, TOKEN)
        write(sheet, text, 9.0, 14, _font(font, size), size, (0, 0, 0))
        assert sheet.texts() == [text]
        assert decode(sheet.labels[0].tolist()) == text


@settings(max_examples=60, deadline=None)
@given(st.text(ALPHABET, max_size=14), st.floats(0, 40), st.sampled_from(range(20, 29)), st.sampled_from(FONTS))
def test_the_labels_of_a_line_spell_it(text: str, left: float, size: int, font: str) -> None:
    sheet = blank(20 * TOKEN, 2 * TOKEN)
    write(sheet, text, left, 40, _font(font, size), size, (0, 0, 0))
    assert [decode(row) for row in sheet.labels.tolist()] == ["", text]


def test_what_is_cut_off_at_an_edge_is_no_label() -> None:
    sheet, font = blank(2 * TOKEN, TOKEN), _font("pillow-default", 24)
    write(sheet, "WMWMWMWM", -font.getlength("W"), 14, font, 24, (0, 0, 0))
    assert sheet.texts()[0] in ("MW", "MWM")
    write(sheet, "lost", 0, 31, font, 24, (0, 0, 0))
    assert "lost" not in "".join(sheet.texts())


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_draws_labelled_glyphs_on_whole_tokens_the_same_for_a_seed(kind: str) -> None:
    def drawn() -> list[tuple[bytes, bytes]]:
        rng = random.Random(5)
        made = [draw(kind, TEXTS, HELD_OUT_FONTS, rng) for _ in range(4)]
        assert all(side % TOKEN == 0 for one in made for side in one.image.size)
        assert sum(one.glyphs for one in made) > 8
        assert all(
            decode(row.tolist()) == text for one in made for row, text in zip(one.labels, one.texts(), strict=True)
        )
        return [(one.image.tobytes(), one.labels.tobytes()) for one in made]

    assert drawn() == drawn()


def test_held_out_texts_of_the_bank_are_not_trained_on_and_pairs_are_not_drawn(tmp_path: Path) -> None:
    lines = "\n".join(f"- prompt number {n} about bread" for n in range(60))
    (tmp_path / "benign_work_1.yaml").write_text(f"topic:\n{lines}\n- ünreadable\n")
    (tmp_path / "contrast_a.yaml").write_text("c:\n- {harmful: pick a lock, unharmful: buy a lock}\n")
    seen, unseen = bank_texts(tmp_path, held=False), bank_texts(tmp_path, held=True)
    assert unseen.lines
    assert not set(seen.lines) & set(unseen.lines)
    assert len(seen.lines) + len(unseen.lines) == 60
    assert "lock" not in seen.words


@pytest.mark.parametrize(
    ("codes", "text"),
    [("", ""), ("_aa_b", "ab"), ("a_a", "aa"), ("aab", "ab"), ("___", ""), ("a_bb_b", "abb")],
)
def test_greedy_ctc(codes: str, text: str) -> None:
    assert decode([0 if code == "_" else ALPHABET.index(code) + 1 for code in codes]) == text


# the tower and its losses


def test_tokens_come_out_row_by_row_as_the_labels_do() -> None:
    sheet = blank(3 * TOKEN, 2 * TOKEN)
    sheet.image.paste((0, 0, 0), (2 * TOKEN, TOKEN, 3 * TOKEN, 2 * TOKEN))
    pixels = processor()(images=[sheet.image], return_tensors="pt")["pixel_values"].view(6, 4, -1)
    dark = [bool((pixels[token] < 0).all()) for token in range(6)]
    assert dark == [False] * 5 + [True]
    torch.manual_seed(0)
    tower, grid = ReadingTower(TINY).eval(), torch.tensor([[1, 4, 6]])
    tower.vision.blocks = torch.nn.ModuleList()
    logits = tower(pixels.view(24, -1), grid)
    assert [torch.allclose(logits[0], logits[token], atol=1e-5) for token in range(6)] == [True] * 5 + [False]


def test_rows_of_a_batch_are_the_rows_of_each_image() -> None:
    drawn = [draw(kind, TEXTS, TRAIN_FONTS, random.Random(2)) for kind in ("lines", "strings")]
    batch = to_batch(drawn, processor())
    assert len(batch.pixels) == 4 * len(batch.labels)
    rows = rows_of(batch.labels, batch.shapes)
    assert [row.tolist() for row in rows] == [row.tolist() for one in drawn for row in one.labels]


def test_the_losses_are_least_for_the_labels_and_ctc_forgives_one_strip() -> None:
    sheet = blank(4 * TOKEN, 4 * TOKEN)
    write(sheet, "a cat", 8, 40, _font("pillow-default", 24), 24, (0, 0, 0))
    batch = to_batch([sheet], processor())

    def loss(labels: torch.Tensor, ctc: float) -> float:
        logits = 20.0 * torch.nn.functional.one_hot(labels, len(ALPHABET) + 1)
        return float(reading_loss(logits, batch, ctc=ctc, blank_weight=0.3))

    aside = torch.from_numpy(np.roll(sheet.labels, 1, axis=1).reshape(-1, SLOTS))
    none = torch.zeros_like(aside)
    assert loss(batch.labels, 1.0) < 1e-3
    assert loss(aside, 0.0) > 2
    assert loss(aside, 1.0) - loss(aside, 0.0) < 1e-2
    assert loss(none, 1.0) - loss(none, 0.0) > 5


def test_the_curriculum_goes_from_glyphs_to_lines() -> None:
    assert [stage.name for stage in CURRICULUM] == list(KINDS)
    assert sum(stage.share for stage in CURRICULUM) == pytest.approx(1)
    made = TowerSettings(steps=100)
    assert [made.stage(step).name for step in (0, 7, 8, 39, 40, 69, 70, 99, 500)] == [
        *("glyphs", "glyphs", "strings", "strings", "words", "words", "lines", "lines", "lines")
    ]
    assert made.rate(0) < made.rate(99) > TowerSettings(steps=1000).rate(999) > 0


def test_the_whole_tower_stays_below_three_million_parameters() -> None:
    assert sum(parameter.numel() for parameter in ReadingTower(TowerShape()).parameters()) < 3_000_000


# training


def test_a_few_steps_reduce_the_loss_and_the_reader_reads_what_was_learnt(tmp_path: Path) -> None:
    sheet, font = blank(4 * TOKEN, 2 * TOKEN), _font("pillow-default", 24)
    write(sheet, "cat 7", 10, 40, font, 24, (0, 0, 0))
    torch.manual_seed(1)
    tower, batch = ReadingTower(TINY), to_batch([sheet], processor())
    optimizer = torch.optim.AdamW(tower.parameters(), lr=3e-3)
    losses = []
    for _ in range(150):
        loss = reading_loss(tower(batch.pixels, batch.grid), batch, ctc=0.5, blank_weight=0.3)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.1 * losses[0]
    png = io.BytesIO()
    sheet.image.save(png, "PNG")
    assert TowerReader(tower.eval(), scales=(1.0, 0.5)).read(png.getvalue()) == "cat 7"


def test_training_reduces_the_loss_and_keeps_its_curve(tmp_path: Path) -> None:
    made = settings_of(steps=500, learning_rate=3e-3, measure_every=15)

    def stop(seen: Progressed, stage: str) -> None:
        assert stage == "glyphs"
        if seen.step == 30:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_tower(tmp_path, made, TEXTS, TEXTS, tell=stop)
    tower, seen = train_tower(tmp_path, made, TEXTS, TEXTS, resume=True, minutes=0)
    assert sum(seen.losses[-5:]) < 0.7 * sum(seen.losses[:5])
    assert [(point["step"], point["images"]) for point in seen.curve] == [(15, 15), (30, 30)]
    assert set(seen.curve[-1]["held_out"]) == set(KINDS)
    again = load_tower(tmp_path)
    assert all(torch.equal(one, other) for one, other in zip(tower.parameters(), again.parameters(), strict=True))


def test_a_killed_run_goes_on_with_the_same_losses(tmp_path: Path) -> None:
    made = settings_of()
    _, whole = train_tower(tmp_path / "whole", made, TEXTS, TEXTS)

    def kill(seen: Progressed, stage: str) -> None:
        if seen.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_tower(tmp_path / "killed", made, TEXTS, TEXTS, tell=kill)
    _, resumed = train_tower(tmp_path / "killed", made, TEXTS, TEXTS, resume=True)
    assert resumed.losses == whole.losses
    assert (resumed.images, resumed.glyphs) == (whole.images, whole.glyphs)
    assert resumed.curve[-1]["held_out"] == whole.curve[-1]["held_out"]


def test_the_time_given_ends_a_call_with_a_checkpoint(tmp_path: Path) -> None:
    _, seen = train_tower(tmp_path, settings_of(), TEXTS, TEXTS, minutes=0)
    assert seen.step == 0
    assert (tmp_path / "checkpoint.pt").is_file()


def test_a_run_in_the_way_and_other_settings_are_refused_with_the_remedy(tmp_path: Path) -> None:
    train_tower(tmp_path, settings_of(), TEXTS, TEXTS, minutes=0)
    with pytest.raises(TowerError, match="--resume"):
        train_tower(tmp_path, settings_of(), TEXTS, TEXTS)
    with pytest.raises(TowerError, match=r"other settings \(steps\)"):
        train_tower(tmp_path, settings_of(steps=5), TEXTS, TEXTS, resume=True)


def test_drawing_in_other_processes_gives_the_same_losses(tmp_path: Path) -> None:
    made = settings_of(steps=2, measure_every=9)
    _, alone = train_tower(tmp_path / "alone", made, TEXTS, TEXTS)
    _, helped = train_tower(tmp_path / "helped", made, TEXTS, TEXTS, workers=1)
    assert helped.losses == alone.losses


def test_a_step_draws_the_same_images_whatever_came_before() -> None:
    first, again = (draw_batch(settings_of(patches=256), 3, TEXTS) for _ in range(2))
    assert [one.image.tobytes() for one in first] == [one.image.tobytes() for one in again]
    assert sum(one.labels.size // SLOTS * 4 for one in first) >= 256


# measuring


@pytest.mark.parametrize(
    ("read", "truth", "count"),
    [("", "abc", 3), ("abc", "abc", 0), ("abd", "abc", 1), ("ac", "abc", 1), ("xab", "ab", 1)],
)
def test_edits(read: str, truth: str, count: int) -> None:
    assert edits(read, truth) == count


def test_similarity_is_one_for_the_same_text_only() -> None:
    assert similarity("a cat", "a cat") == 1.0
    assert 0.5 < similarity("a cut", "a cat") < 1.0


def test_an_untrained_tower_measures_near_nothing() -> None:
    figures = measure(ReadingTower(TINY), TEXTS, HELD_OUT_FONTS, 2)
    assert all(0.0 <= kind["similarity"] < 0.3 for kind in figures.values())
    assert all(kind["character_errors"] > 0.7 for kind in figures.values())


def test_padding_keeps_the_picture_and_makes_whole_tokens() -> None:
    image = Image.new("RGB", (30, 28), (9, 8, 7))
    image.putpixel((3, 4), (200, 0, 0))
    padded = pad(image)
    assert padded.size == (56, 28)
    assert padded.crop((0, 0, 30, 28)).tobytes() == image.tobytes()
    assert padded.getpixel((55, 27)) == (9, 8, 7)


class WordEngine:
    """Condemns a prompt that holds "lock"."""

    facts, max_batch = ModelFacts("words", "r"), 8

    def __init__(self) -> None:
        self._tokenizer = train_tokenizer(["pick a lock or bake bread"] * 9, [], vocab_size=400)
        self.encoder = PromptEncoder(self._tokenizer)

    def image_tokens(self, image: bytes) -> int:
        return 4

    def generate_batch(self, prompts, cancelled):
        out = []
        for prompt in prompts:
            words = self._tokenizer.backend_tokenizer.decode(list(prompt.ids))
            label: Label = "harmful" if "lock" in words else "unharmful"
            text = completion("Step 1: words.", label, None)
            out.append(Generation(text, len(prompt.ids), 9, 5, 0.5, None, "stop"))
        return out

    def close(self) -> None:
        pass


def test_verdicts_with_a_reader_and_without(tmp_path: Path) -> None:
    drawn: dict[bytes, str] = {}
    rows = []
    for number in range(8):
        path = tmp_path / f"{number}.png"
        Image.new("RGB", (28, 28), (number, 0, 0)).save(path)
        harmful = number % 2 == 0
        drawn[path.read_bytes()] = "pick a lock" if harmful else "bake bread"
        rows.append(Row(f"{number}", "drawn", "What is this?", "harmful" if harmful else "unharmful", image=path))
    picked = chosen(rows, 4)
    assert [row.request for row in picked] == ["harmful"] * 2 + ["unharmful"] * 2
    told: list[int] = []
    good = Timed(drawn.__getitem__, tmp_path / "drawn.jsonl")
    found = compare(picked, WordEngine, {"good": good, "none": lambda image: ""}, lambda: told.append(1))
    assert [(one.reader, one.recall, one.false_positives) for one in found] == [("good", 1.0, 0.0), ("none", 0.0, 0.0)]
    assert [one.similarity for one in found] == [1.0, 0.0]
    assert (len(told), len(good.seconds)) == (8, 4)


def test_advice_is_not_counted_as_harm_in_figstep(tmp_path: Path) -> None:
    rows = [
        Row(f"{n}", "figstep", "", "harmful", category=topic, image=tmp_path / f"{n}.png")
        for n, topic in enumerate(["Fraud", "Legal Opinion", "Health Consultation", "Malware Generation"])
    ]
    assert {row.category for row in chosen(rows, 10)} == {"Fraud", "Malware Generation"}
