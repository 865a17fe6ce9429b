"""The estimate, and images as they are sent."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import pytest
from PIL import Image

from guard_training.corpus.rows import CorpusError, Row
from guard_training.synthesis.cost import Estimate, Price, estimate, prompt_tokens
from guard_training.synthesis.prompt import SYSTEM, data_url, sent_size


def picture(path: Path, size: tuple[int, int]) -> Path:
    Image.new("RGB", size, "red").save(path)
    return path


def test_a_longer_text_costs_a_token_for_four_characters_more() -> None:
    short = prompt_tokens(Row("a", "made", "x" * 40, "harmful"), side=1024, image_tokens=None)
    long = prompt_tokens(Row("a", "made", "x" * 4040, "harmful"), side=1024, image_tokens=None)
    assert long - short == 1000
    assert len(SYSTEM) / 4 < short < len(SYSTEM) / 4 + 120


@pytest.mark.parametrize(
    ("size", "tokens", "flat"), [((280, 56), 20, None), ((2800, 280), 148, None), ((280, 56), 77, 77)]
)
def test_an_image_costs_what_is_sent_of_it(
    tmp_path: Path, size: tuple[int, int], tokens: int, flat: int | None
) -> None:
    row = Row("a", "made", "x", "harmful", image=picture(tmp_path / "i.png", size))
    plain = prompt_tokens(Row("a", "made", "x", "harmful"), side=1024, image_tokens=None)
    assert prompt_tokens(row, side=1024, image_tokens=flat) - plain == tokens


def test_the_estimate_adds_up() -> None:
    rows = [(Row("a", "made", "x", "harmful"), 100), (Row("b", "made", "x", "harmful", image=Path("i")), 250)]
    assert estimate(rows, 300) == Estimate(rows=2, images=1, prompt_tokens=350, completion_tokens=600)


def test_the_cost_is_known_only_with_both_prices() -> None:
    assert Price(2.5, 10).of(1_000_000, 500_000) == 7.5
    assert Price(2.5, None).of(1, 1) is None


def test_a_small_image_goes_as_it_is_and_a_large_one_smaller(tmp_path: Path) -> None:
    small, large = picture(tmp_path / "s.png", (90, 40)), picture(tmp_path / "l.png", (900, 400))
    assert data_url(small, 100) == f"data:image/png;base64,{base64.b64encode(small.read_bytes()).decode()}"
    kind, _, data = data_url(large, 100).partition(";base64,")
    assert kind == "data:image/jpeg"
    with Image.open(io.BytesIO(base64.b64decode(data))) as sent:
        assert sent.size == sent_size(large, 100) == (100, 44)


def test_a_format_that_teachers_do_not_take_is_made_one_that_they_do(tmp_path: Path) -> None:
    path = tmp_path / "i.bmp"
    Image.new("RGB", (20, 20)).save(path)
    assert data_url(path, 100).startswith("data:image/jpeg;")


def test_what_is_no_image_or_far_too_large_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "t.png").write_text("text")
    with pytest.raises(CorpusError, match=r"t.png is no readable image"):
        sent_size(tmp_path / "t.png", 100)
    whole = tmp_path / "n.png"
    Image.effect_noise((200, 200), 90).save(whole)
    (tmp_path / "cut.png").write_bytes(whole.read_bytes()[:3000])
    with pytest.raises(CorpusError, match=r"cut.png cannot be decoded"):
        data_url(tmp_path / "cut.png", 100)
    monkeypatch.setattr("guard_training.corpus.conversation.MAX_PIXELS", 100)
    with pytest.raises(CorpusError, match="scale it down"):
        sent_size(whole, 100)
