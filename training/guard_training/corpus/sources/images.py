"""Readers of the image sources and of the one image-text source. An image alone is a row with an empty prompt."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from guard_middleware.types import Label
from guard_training.corpus.sources.fields import (
    Fields,
    Foreign,
    Reader,
    Unusable,
    flag,
    harmful,
    label,
    optional,
    optional_text,
    picture,
    text,
    value,
)

_SAFETY: Mapping[str, Label | None] = {"safe": "unharmful", "unsafe": "harmful"}
#: codes of the BadNews code book, by how they begin ("Content Farm" in the table, "Content Farms" in its README)
_BENIGN_ADS = ("charit", "political campaign", "product and service", "products and service", "self link")
_PROBLEMATIC_ADS = (
    "content farm",
    "insurance",
    "mortgage",
    "investment",
    "misleading political poll",
    "political poll",
    "potentially unwanted software",
    "product advertorial",
    "advertorial",
    "sponsored editorial",
    "sponsored search",
    "supplement",
)
HOD_CLASSES = ("alcohol", "blood", "cigarette", "gun", "insulting_gesture", "knife")


def _folders(record: Mapping[str, Any]) -> list[str]:
    """Of an image in a folder of images: the folders above it."""
    found = record.get("folders")
    return [str(name).lower().replace(" ", "_") for name in found] if isinstance(found, tuple) else []


def unsafebench(record: Mapping[str, Any]) -> Fields:
    """``image, safety_label, category, source`` and, since 2025, ``text``: ``Unsafe`` is harmful, ``Safe`` is not.

    A folder of images needs them in folders named Safe and Unsafe. The caption (``text``) is left out, as the
    data set's authors did.
    """
    given = optional(record, "safety_label")
    if given is None:
        given = next((name for name in _folders(record) if name in _SAFETY), None)
    return Fields(
        prompt="",
        request=label(given, _SAFETY, "safety_label"),
        category=optional_text(record, "category"),
        image=picture(record),
    )


def badnews(record: Mapping[str, Any]) -> Fields:
    """``dataset.csv`` of Zeng et al.: ``ad_id, landing_page_id, name, ..., ad_screenshot, page_screenshot``.

    The ad's screenshot; ``name`` is its code: problematic codes are harmful, the four benign ones unharmful.
    Ads without a screenshot cannot be used.
    """
    code = text(record, "name").strip().lower()
    if not code.startswith((*_BENIGN_ADS, *_PROBLEMATIC_ADS)):
        raise Unusable("column 'name' has no code of the code book")
    return Fields("", harmful(not code.startswith(_BENIGN_ADS)), category=code, image=picture(record, "ad_screenshot"))


def _memes(folders: tuple[str, ...], harm: Mapping[str, Label | None]) -> Reader:
    """Memes as VLGuard publishes them, in one table with other folders, or as their own authors do."""

    def read(record: Mapping[str, Any]) -> Fields:
        if "instr-resp" not in record:
            return _original(record, harm)
        found = picture(record)
        folder = next(iter(PurePosixPath(found).parts), "") if isinstance(found, str) else ""
        if re.sub(r"[^a-z]", "", folder.lower()) not in folders:
            raise Foreign(f"folder {folder} of VLGuard")
        return Fields(
            "", harmful(not flag(record, "safe")), category=optional_text(record, "harmful_subcategory"), image=found
        )

    return read


def _original(record: Mapping[str, Any], harm: Mapping[str, Label | None]) -> Fields:
    if "labels" in record:
        given = record["labels"]
        first = given[0] if isinstance(given, list) and given else None
        return Fields("", label(first, harm, "labels"), image=picture(record))
    column = "img" if "img" in record else "image"
    return Fields("", label(value(record, "label"), harm, "label"), image=picture(record, column))


#: VLGuard: ``id, image, safe, harmful_category, harmful_subcategory, instr-resp``; safe is unharmful.
#: The challenge's own files: ``id, img, label, text``; label 1 is hateful. Its text is what is drawn in the image.
hateful_memes = _memes(
    ("hatefulmemes", "hatefulmeme", "memes", "fbmemes", "fhm"),
    {"0": "unharmful", "1": "harmful", "not-hateful": "unharmful", "hateful": "harmful"},
)
#: VLGuard as above, or Harm-P's own files: ``id, image, labels, text``; ``labels[0]`` says how harmful.
hateful_p_memes = _memes(
    ("harmp", "harmpmemes", "hatefulpmemes", "hatefulpoliticalmemes", "politicalmemes"),
    {"not harmful": "unharmful", "somewhat harmful": "harmful", "very harmful": "harmful"},
)


def hod(record: Mapping[str, Any]) -> Fields:
    """A folder of images, ``class/<category>/<normal_cases|hard_cases>/jpg/*.jpg``: every image shows a harmful object.

    The paper's figures confirm it: HOD brings harmful images only, and 60 % of it balances the others.
    """
    category = next((name for name in _folders(record) if name in HOD_CLASSES), None)
    if category is None:
        raise Unusable(f"in no folder of a category ({', '.join(HOD_CLASSES)})")
    return Fields("", "harmful", category=category, image=picture(record))


def spa_vl(record: Mapping[str, Any]) -> Fields:
    """``image, question, chosen, rejected, image_name``, and elsewhere than in train ``class1, class2, class3``.

    One row per question, as the size of the released corpus shows (46,030 rows from half of 93,258): its answer is
    the chosen one or the rejected one, by the digest of the question. SPA-VL says which answer is better and not
    which is harmful, so both labels are None, and the teacher decides as it does for BeaverTails' requests.
    """
    question = text(record, "question")
    classes = [found for level in ("class1", "class2", "class3") if (found := optional_text(record, level))]
    side = ("chosen", "rejected")[hashlib.sha256(question.encode()).digest()[0] & 1]
    return Fields(
        question, None, response=text(record, side), category="/".join(classes) or None, image=picture(record)
    )
