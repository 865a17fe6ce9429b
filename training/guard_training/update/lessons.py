"""What an update trains on: corrections, a replay share of older training rows, and a rationale for each.

Rationales, the first that there is: the reviewer's or the row's own; for a guard that fills in nano's form, nano's
deterministic teacher (its form leaves room for no other); the current guard's own, where its verdict agrees with the
labels; else a short one that quotes the content. The teacher's lexicon is fitted on all replay rows and corrections.

Never trained on: what an evaluation or golden file holds (word for word, nearly, or as an image), and replay rows
whose content was corrected.
"""

# ruff: noqa: S311 - the draws must repeat for a seed, not resist guessing
from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from guard_middleware.errors import GuardError
from guard_middleware.guard.parse import TAGS, parse
from guard_middleware.types import Label
from guard_training.corpus.leakage import Fingerprints, Leak, Track, find_leaks, words
from guard_training.corpus.rows import CorpusError, Row, Skipped, held_out, read_good_rows, row_to_json
from guard_training.nano.drawn import Read
from guard_training.nano.lexicon import Lexicon, balance, word_lexicon
from guard_training.nano.mixture import draw
from guard_training.nano.recipe import default_recipe, read_recipe
from guard_training.nano.teacher import PLACES, Judged, joined, teach
from guard_training.rowfile import bring_image, write_whole
from guard_training.update.corrections import Lesson, content_key, user_turns, whole

#: Replay rows, by the digest of their ids, that are kept back to calibrate on; `guard-train nano` keeps the same ones.
HELD_BACK = 0.03
#: Characters of the content that the short rationale quotes.
_QUOTED = 160

Origin = Literal["given", "teacher", "guard", "template"]


@dataclass(frozen=True, slots=True)
class Said:
    """What the current guard says of a row."""

    request: Label
    response: Label | None
    reasoning: str


#: Verdicts of the current guard by row id, where it gave one.
Ask = Callable[[Sequence[Row]], Mapping[str, Said]]


def without_leaks(
    rows: Sequence[Row],
    against: Mapping[str, Sequence[Row]],
    skipped: Skipped,
    *,
    fingerprints: Fingerprints | None = None,
    track: Track = lambda rows, _: rows,
) -> list[Row]:
    """The rows that no file of ``against`` holds; of several turns, each turn of a user counts. Others are reported."""
    views = [view for row in rows for view in _views(row)]
    leaks: dict[str, Leak] = {}
    for leak in find_leaks(views, against, fingerprints=fingerprints, track=track):
        leaks.setdefault(leak.id.rpartition("#")[0], leak)
    names = {row.id: row.name for row in rows}
    for id, leak in leaks.items():
        skipped(f"{names[id]}: {leak.where} holds it too ({leak.other}, {leak.kind})")
    return [row for row in rows if row.id not in leaks]


def _views(row: Row) -> list[Row]:
    turns = user_turns(row)
    views = [replace(row, id=f"{row.id}#", prompt=turns[-1])]
    # an image is compared by itself; the words of every turn are compared beside it
    rest = turns if row.image else turns[:-1]
    plain = Row("", row.source, "", row.request)
    return views + [replace(plain, id=f"{row.id}#{n}", prompt=text) for n, text in enumerate(rest) if text.strip()]


def replay(rows: Sequence[Row], corrected: Sequence[Row], count: int, seed: int) -> list[Row]:
    """``count`` older rows, half of each label where both are there, sources by the root of their size, none twice.

    Rows held back for calibration and rows of a corrected content are not among them.
    """
    usable = [row for row in rows if row.request and not held_out(row.id, HELD_BACK)]
    # the key of a content reads its image, so it is only asked of rows with the prompt of a correction
    known, prompts = {content_key(row) for row in corrected}, {words(row.prompt) for row in corrected}
    if known:
        usable = [row for row in usable if words(row.prompt) not in prompts or content_key(row) not in known]
    rng = random.Random(seed)
    sides = [side for label in ("harmful", "unharmful") if (side := [row for row in usable if row.request == label])]
    chosen: list[Row] = []
    for number, side in enumerate(sorted(sides, key=len)):
        wanted = min((count - len(chosen)) // (len(sides) - number), len(side))
        chosen += _distinct(side, wanted, rng)
    return chosen


def _distinct(rows: Sequence[Row], count: int, rng: random.Random) -> list[Row]:
    """``draw`` starts a source again when it is empty, so rows that came are taken out and the rest drawn anew."""
    left, chosen = list(rows), list[Row]()
    while len(chosen) < count:
        found = {id(row): row for row in draw(left, {}, 0.5, count - len(chosen), rng)}
        chosen += found.values()
        left = [row for row in left if id(row) not in found]
    return chosen


def held_back(rows: Sequence[Row], limit: int, seed: int) -> list[Row]:
    """Rows to calibrate on: never trained on, at most ``limit``, sources by the root of their size."""
    kept = [row for row in rows if (row.request or row.response_label) and held_out(row.id, HELD_BACK)]
    return _distinct(kept, min(limit, len(kept)), random.Random(seed))


def fit_lexicon(rows: Sequence[Row]) -> Lexicon:
    """The lexicon of nano's teacher, with the constants of nano's recipe."""
    recipe = read_recipe(default_recipe())
    known = [row for row in rows if row.request and row.prompt]
    harmful = [row.request == "harmful" for row in known]
    if len(set(harmful)) < 2:
        return Lexicon({}, {})
    return word_lexicon(
        [row.prompt[:1500] for row in known],
        harmful,
        balance([row.source for row in known], harmful, {}),
        least=2,
        steps=recipe.odds_steps,
        penalty=recipe.odds_penalty,
    )


def with_rationales(
    rows: Sequence[Row], skipped: Skipped, *, ask: Ask, lexicon: Lexicon | None, read: Read | None
) -> tuple[list[Row], Counter[Origin]]:
    """The rows with a rationale each, and where these are from. ``lexicon`` for a guard with nano's form, else None.

    The guard is also asked for the label of the request where only the answer's is known.
    """
    due = [
        row
        for row in rows
        if (row.request is None or (lexicon is None and not row.rationale)) and not getattr(row, "messages", "")
    ]
    verdicts = ask(due) if due else {}
    origins: Counter[Origin] = Counter()
    out = []
    for row in rows:
        verdict = verdicts.get(row.id)
        if row.request is None and verdict is not None:
            row = replace(row, request=verdict.request)
        if row.request is None:
            skipped(f"{row.name}: nothing says whether the request is harmful; give request_label")
            continue
        try:
            rationale, origin = _rationale(row, verdict, lexicon, read)
        except (GuardError, ValueError) as error:
            skipped(f"{row.name}: {error}")
            continue
        origins[origin] += 1
        out.append(replace(row, rationale=rationale))
    return out, origins


def _rationale(row: Row, verdict: Said | None, lexicon: Lexicon | None, read: Read | None) -> tuple[str, Origin]:
    if lexicon is not None:
        return _taught(row, lexicon, read), "teacher"
    if row.rationale:
        if any(tag in row.rationale for tag in TAGS):
            raise CorpusError(f"the rationale holds one of {', '.join(TAGS)}")
        return row.rationale, "given"
    if verdict and verdict.reasoning and (verdict.request, verdict.response) == (row.request, _judged(row)):
        return verdict.reasoning, "guard"
    return _short(row), "template"


def _judged(row: Row) -> Label | None:
    return row.response_label if row.response else None


def _taught(row: Row, lexicon: Lexicon, read: Read | None) -> str:
    text, place = _evidence(row, lexicon, read)
    answer = row.response if _judged(row) else None
    stretches = teach(Judged(text, place, row.request, row.category, answer, _judged(row)), lexicon)
    return parse(joined(stretches), answered=answer is not None).reasoning


def _evidence(row: Row, lexicon: Lexicon, read: Read | None) -> tuple[str, str]:
    """The words that the teacher looks at, and where they stand: what speaks most for the label of the request."""
    request, drawn_text, system, tool, earlier = PLACES
    drawn = " ".join(read(blob.data) for blob in whole(row).blobs()) if read and row.image else ""
    found = [(row.prompt, request), *([(drawn, drawn_text)] if drawn.strip() else [])]
    if isinstance(row, Lesson) and row.messages:
        for message in json.loads(row.messages)[: -1 if row.response else None]:
            place = {"system": system, "tool": tool}.get(message["role"], earlier)
            parts = [message["content"]] if isinstance(message["content"], str) else message["content"]
            said = " ".join(part if isinstance(part, str) else _words(part) for part in parts)
            if said.strip() and said.strip() != row.prompt.strip():
                found.append((said, place))
    known = [(text, place) for text, place in found if text.strip()] or [(row.prompt, request)]
    return max(known, key=lambda one: lexicon.score(one[0]) if row.request == "harmful" else one[1] == request)


def _words(part: Mapping[str, Any]) -> str:
    return " ".join(value for key, value in part.items() if key not in ("type", "image") and isinstance(value, str))


def _short(row: Row) -> str:
    """Two or three steps in the form of the paper's rationales, from the content and the labels alone."""
    about = f" ({row.category})" if row.category else ""
    asked = _quote(row.prompt)
    first = f"The request says: « {asked} »." if asked else "The request is an image."
    harm = {"harmful": f"it would do harm{about}", "unharmful": "it does no harm"}
    assert row.request is not None
    steps = ["# Task 1", f"## Reasoning Step 1: {first}", f"## Reasoning Step 2: To help with it: {harm[row.request]}."]
    if label := _judged(row):
        steps += ["# Task 2", f"## Reasoning Step 1: The answer says: « {_quote(row.response or '')} »."]
        steps += [f"## Reasoning Step 2: What it gives: {harm[label]}."]
    return "\n".join(steps)


def _quote(text: str) -> str:
    flat = " ".join(text.split())
    cut = flat if len(flat) <= _QUOTED else flat[:_QUOTED].rpartition(" ")[0] or flat[:_QUOTED]
    return cut.replace("<", "").replace(">", "")


def write_lessons(rows: Sequence[Row], path: Path) -> None:
    """Whole or not at all; images are brought beside the file."""
    placed = [bring_image(row, path.parent) for row in rows]
    lines = [{**row_to_json(row, path.parent), "messages": getattr(row, "messages", "")} for row in placed]
    write_whole(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())


def read_lessons(path: Path, skipped: Skipped) -> list[Row]:
    """What ``write_lessons`` wrote."""
    # by the file's lines: str.splitlines also cuts at U+2028 and U+0085, which JSON leaves as they are
    with path.open(encoding="utf-8") as lines:
        values = [json.loads(line) for line in lines]
    messages = {value["id"]: value["messages"] for value in values}
    return [
        Lesson(**{**asdict(row), "image": row.image}, messages=messages[row.id])
        for row in read_good_rows(path, skipped)
    ]
