"""What is no picture, or none that the guard can see, is refused in every place where pictures are looked at."""

from __future__ import annotations

import io

import pytest

pytest.importorskip("transformers")

from PIL import Image

from guard_middleware.errors import GuardError, GuardErrorKind
from guard_middleware.worker.pictures import decoded, picture_tokens
from guard_middleware.worker.weights import ModelFacts

FACTS = ModelFacts("m", "r")


def png(size=(90, 60)):
    out = io.BytesIO()
    Image.new("RGB", size, "teal").save(out, "PNG")
    return out.getvalue()


def test_a_picture_has_a_price_and_pixels():
    assert picture_tokens(png((56, 56)), 28, FACTS) == 4
    assert (decoded(png()).size, decoded(png()).mode) == ((90, 60), "RGB")


@pytest.mark.parametrize("look", [decoded, lambda image: picture_tokens(image, 28, FACTS)], ids=["pixels", "price"])
@pytest.mark.parametrize("case", ["bytes", "bomb"])
def test_what_cannot_be_decoded_is_a_media_error(look, case, monkeypatch):
    image = b"no picture" if case == "bytes" else png()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100 if case == "bomb" else None)
    with pytest.raises(GuardError) as caught:
        look(image)
    assert caught.value.kind is GuardErrorKind.MEDIA


def test_half_a_picture_has_a_price_and_no_pixels():
    half = png()[:80]
    assert picture_tokens(half, 28, FACTS) > 0
    with pytest.raises(GuardError, match="media"):
        decoded(half)


def test_a_shape_that_the_model_cannot_see_is_a_media_error():
    with pytest.raises(GuardError, match="media"):
        picture_tokens(png((5000, 2)), 28, FACTS)
