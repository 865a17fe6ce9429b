"""Labelled moderation rows: reading them, holding some out, and the passages that break source cues.

Harmful and benign rows almost never share a source, so a model can learn how a source writes instead of what is
asked. ``passages`` cuts stretches out of long benign answers (wide vocabulary, every length) and out of labelled
dialogue turns, so that topic words and length alone do not give the label away.

Refuses: a line that is no JSON object in UTF-8, a row without an id or source, a text that is none or holds half of a
surrogate pair, another label than harmful, unharmful or null, an image outside the data file's folder, and what a
broken compressed file would have held behind the break.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from guard_middleware.types import Label

if TYPE_CHECKING:
    from rich.console import Console

T = TypeVar("T")

_BROKEN = (EOFError, gzip.BadGzipFile, zlib.error)


class CorpusError(ValueError):
    """A data file that does not follow the schema; the message names the line and the remedy."""


@dataclass(frozen=True, slots=True)
class Row:
    """One labelled case. A label None means that the source does not label that side.

    ``rationale`` is the text between ``<think>`` and ``</think>`` that a teacher wrote for it. ``where`` is the
    ``file:line`` that it was read from, for messages; rows that differ in nothing else are equal.
    """

    id: str
    source: str
    prompt: str
    request: Label | None
    response: str | None = None
    response_label: Label | None = None
    category: str | None = None
    licence: str = ""
    image: Path | None = None
    rationale: str | None = None
    where: str = field(default="", compare=False, repr=False)

    @property
    def name(self) -> str:
        """How messages call it: ``file:line: id``, or its id where it was made and not read."""
        return f"{self.where}: {self.id}" if self.where else self.id


@dataclass(slots=True)
class Skipped:
    """Lines that could not be used, as ``file:line: reason``. Commands go on with the good ones and print a summary."""

    reasons: list[str] = field(default_factory=list)

    def __call__(self, reason: str) -> None:
        self.reasons.append(reason)

    def summary(self, shown: int = 5) -> str:
        """``3 rows left out:`` and the first reasons, or nothing."""
        if not self.reasons:
            return ""
        more = [f"... and {len(self.reasons) - shown} more"] if len(self.reasons) > shown else []
        return "\n  ".join([f"{len(self.reasons)} rows left out:", *self.reasons[:shown], *more])

    def report(self, file: Path, shown: int = 5) -> str:
        """The summary; where it does not show every reason, all of them go to ``file``, which it names.

        Nothing is written where the file's folder is not there: the command ended before it made any output.
        """
        if len(self.reasons) <= shown or not file.parent.is_dir():
            file.unlink(missing_ok=True)
            return self.summary(shown)
        file.write_text("".join(f"{reason}\n" for reason in self.reasons), "utf-8", "backslashreplace")
        return f"{self.summary(shown)}: {file}"

    def tell(self, console: Console, file: Path | None = None, shown: int = 5) -> None:
        """Prints the summary where there is one; of several processes the quiet ones leave ``file`` to the other."""
        if self.reasons and not console.quiet:
            said = self.report(file, shown) if file else self.summary(shown)
            console.print(said, markup=False, highlight=False, soft_wrap=True)


def read_good_rows(path: Path, skipped: Skipped) -> list[Row]:
    """Rows of a ``.jsonl`` or ``.jsonl.gz`` file; image paths are relative to its folder. What is bad goes to
    ``skipped`` and the reading goes on."""
    rows: list[Row] = []
    try:
        for row in read_lines(path, partial(_row, path.parent), skipped, "a labelled row (docs/training.md shows one)"):
            rows.append(row)
    except BrokenFileError as error:
        skipped(str(error))
    return rows


class BrokenFileError(CorpusError):
    """A compressed file that breaks off, behind what was read of it."""


def read_lines(
    path: Path, make: Callable[[dict[str, Any], str], T], skipped: Callable[[str], object], what: str
) -> Iterator[T]:
    """What ``make`` gives of each JSON object of a ``.jsonl`` or ``.jsonl.gz`` file and its ``file:line``.

    A line that is no object, or that ``make`` raises for, goes to ``skipped`` as not ``what``, and the reading goes on.
    Raises ``CorpusError``, a ``BrokenFileError`` where the file breaks off.
    """
    number = 0
    try:
        # As bytes, so that one line that is not UTF-8 is one bad line.
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                where = f"{path.name}:{number}"
                try:
                    value = json.loads(line.decode())
                    if not isinstance(value, dict):
                        raise ValueError("not a JSON object")
                    made = make(value, where)
                except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
                    why = f"{error.args[0]} is missing" if isinstance(error, KeyError) else str(error)
                    skipped(f"{where}: not {what}: {why}")
                else:
                    yield made
    except _BROKEN as error:
        why = f"the file is broken or cut off from here on ({type(error).__name__})"
        raise BrokenFileError(f"{path.name}:{number + 1}: {why}") from None
    except IsADirectoryError:
        raise CorpusError(f"{path} is a folder; give a file in it") from None


def row_to_json(row: Row, folder: Path) -> dict[str, Any]:
    """The row as ``read_good_rows`` takes it back from a file in ``folder``, which must hold its image."""
    return {
        "id": row.id,
        "source": row.source,
        "licence": row.licence,
        "kind": "mm" if row.image else "pair" if row.response else "prompt",
        "prompt": row.prompt,
        "response": row.response,
        "prompt_label": row.request,
        "response_label": row.response_label,
        "category": row.category,
        "image": str(row.image.resolve().relative_to(folder.resolve())) if row.image else None,
        "rationale": row.rationale,
    }


def rows_to_jsonl(rows: Iterable[Row], folder: Path) -> str:
    """The text of a file of rows in ``folder``, which must hold their images."""
    return "".join(json.dumps(row_to_json(row, folder), ensure_ascii=False) + "\n" for row in rows)


def encodable(text: str) -> bool:
    """Whether a text can be written as UTF-8: half of a surrogate pair, which JSON can spell, cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _row(folder: Path, value: Mapping[str, Any], where: str) -> Row:
    image = _text(value, "image")
    picture = (folder / image).resolve() if image else None
    if picture and not picture.is_relative_to(folder.resolve()):
        raise ValueError("the image lies outside the data file's folder: move it inside")
    return Row(
        id=_name(value, "id"),
        source=_name(value, "source"),
        prompt=_text(value, "prompt") or "",
        request=_label(value, "prompt_label"),
        response=_text(value, "response") or None,
        response_label=_label(value, "response_label"),
        category=_text(value, "category"),
        licence=_text(value, "licence") or "",
        image=picture,
        rationale=_text(value, "rationale") or None,
        where=where,
    )


def row_id(value: object) -> str | None:
    """A row's id as its text: a text, or a whole number, as some data sets count their rows; None for anything else."""
    return str(value) if type(value) is int else value if isinstance(value, str) and value else None


def _name(value: Mapping[str, Any], key: str) -> str:
    name = row_id(value.get(key)) or _text(value, key)
    if not name:
        raise ValueError(f"no {key!r}")
    if not encodable(name):
        raise ValueError(f"{key!r} holds half of a surrogate pair")
    return name


def _text(value: Mapping[str, Any], key: str) -> str | None:
    found = value.get(key)
    if found is not None and not isinstance(found, str):
        raise ValueError(f"{key!r} is no text")
    if found and not encodable(found):
        raise ValueError(f"{key!r} holds half of a surrogate pair")
    return found


def _label(value: Mapping[str, Any], key: str) -> Label | None:
    found = value.get(key)
    if found not in ("harmful", "unharmful", None):
        raise ValueError(f"{key!r} is none of harmful, unharmful, null")
    return cast(Label | None, found)


def labelled(rows: Iterable[Row], skipped: Skipped) -> list[Row]:
    """The rows whose request or given answer has a label, the first of every id."""

    def checked() -> Iterator[Row]:
        for row in rows:
            if row.request is None and not (row.response and row.response_label):
                skipped(f"{row.name}: no label of the request or of a given answer")
            else:
                yield row

    return distinct(checked(), skipped)


def distinct(rows: Iterable[Row], skipped: Skipped) -> list[Row]:
    """The first row of every id: what is written under an id is found again by it."""
    kept: dict[str, Row] = {}
    for row in rows:
        if kept.setdefault(row.id, row) is not row:
            skipped(f"{row.name}: a second row with this id")
    return list(kept.values())


def sample(rows: Sequence[Row], limit: int | None, seed: int = 0) -> list[Row]:
    """At most ``limit`` rows of each source, drawn from a fixed seed."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.source].append(row)
    rng = random.Random(seed)  # noqa: S311
    return [
        row for kept in groups.values() for row in (rng.sample(kept, limit) if limit and limit < len(kept) else kept)
    ]


def held_out(id: str, fraction: float) -> bool:
    """Whether a row belongs to the validation part: by the digest of its id, so that no seed moves it."""
    return int.from_bytes(hashlib.sha256(id.encode()).digest()[:4], "big") < fraction * 2**32


def unique_prompts(rows: Iterable[Row]) -> list[Row]:
    """The first row of every distinct pair of prompt and response (lower-cased)."""
    seen: set[tuple[str, str, str]] = set()
    kept = []
    for row in rows:
        key = (row.prompt.lower(), (row.response or "").lower(), str(row.image or ""))
        if key not in seen:
            seen.add(key)
            kept.append(row)
    return kept


def passages(rows: Sequence[Row], rng: random.Random) -> list[Row]:
    """Stretches of answers as prompts of their own.

    Answers of ``coconot_pref`` and ``gsm8k`` (unharmful) in windows of 12 to 100 words; turns of ``diasafety`` with
    their own label, weak because it was given in context.
    """
    out: list[Row] = []
    for row in rows:
        if row.response is None or row.response_label is None:
            continue
        if row.source in ("coconot_pref", "gsm8k"):
            words, size = row.response.split(), rng.choice((12, 25, 50, 100))
            for start in range(0, min(len(words), 400), size):
                piece = words[start : start + size]
                if len(piece) > 8:
                    out.append(Row(f"{row.id}+{start}", f"{row.source}_passage", " ".join(piece), "unharmful"))
        elif row.source == "diasafety":
            category = row.category if row.response_label == "harmful" else None
            out.append(Row(f"{row.id}+r", "diasafety_turn", row.response, row.response_label, category=category))
    return out
