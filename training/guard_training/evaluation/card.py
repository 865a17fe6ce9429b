"""The results section of a model card, from evaluate's JSON.

Refuses: a card without exactly one pair of marker lines.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from guard_training.evaluation import tables
from guard_training.evaluation.outcomes import SIDES
from guard_training.rowfile import write_whole

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"


def results(summary: dict[str, Any]) -> str:
    """One summary as Markdown: what was measured, the table, the totals, other models on the same rows beside it, the
    paper's benchmarks where asked about."""
    part = f" (at most {summary['limit']} rows of a source)" if summary.get("limit") else ""
    lines = [
        f"`{summary['data']}`{part}, revision `{summary['revision']}`, per cent with 95 % intervals:",
        "",
        tables.sources(summary).markdown(),
        "",
        f"Format compliance {tables.cell(summary['format_compliance'])} of {summary['rows']} rows; guard errors: "
        f"{', '.join(f'{kind} {n}' for kind, n in sorted(summary['errors'].items())) or 'none'}; "
        f"mean reasoning tokens {summary['mean_reasoning_tokens'] or 0:.1f}.",
    ]
    others, name = summary.get("others") or {}, summary["model"]
    named = {f"{name} {summary['revision']}" if name in others else name: summary, **others}
    more = [tables.models(named) if others else None]
    more += [*(tables.thresholds(named, side) for side in SIDES), *(tables.benchmarks(named, side) for side in SIDES)]
    for sheet in more:
        if sheet is not None:
            lines += ["", f"{sheet.title}:", "", sheet.markdown(), *(["", sheet.note] if sheet.note else [])]
    return "\n".join(lines)


def write_results(card: Path, files: Sequence[Path]) -> None:
    """Replaces what stands between the card's markers; raises ``ValueError`` where they are missing or a file
    does not hold figures."""
    text = card.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{card}: needs one line {BEGIN} and after it one line {END}")
    before, after = text[: text.index(BEGIN)], text[text.index(END) :]
    sections = "\n\n".join(_section(file) for file in files)
    write_whole(card, f"{before}{BEGIN}\n{sections}\n{after}".encode())


def _section(file: Path) -> str:
    try:
        return results(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file}: not the figures of this version ({error!r}); run `guard-train evaluate --json`"
        ) from None
