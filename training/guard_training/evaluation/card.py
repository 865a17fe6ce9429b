"""The results section of a model card, from evaluate's JSON.

Refuses: a card without exactly one pair of marker lines.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from guard_training.evaluation.measure import COLUMNS, cell, cells

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"


def results(summary: dict[str, Any]) -> str:
    """One summary as Markdown: what was measured, the table, the totals."""
    part = f" (at most {summary['limit']} rows of a source)" if summary.get("limit") else ""
    lines = [
        f"`{summary['data']}`{part}, revision `{summary['revision']}`, per cent with 95 % intervals:",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "---|" * len(COLUMNS),
        *("| " + " | ".join(cells(entry)) + " |" for entry in summary["sources"]),
        "",
        f"Format compliance {cell(summary['format_compliance'])} of {summary['rows']} rows; guard errors: "
        f"{', '.join(f'{kind} {n}' for kind, n in sorted(summary['errors'].items())) or 'none'}; "
        f"mean reasoning tokens {summary['mean_reasoning_tokens'] or 0:.1f}.",
    ]
    return "\n".join(lines)


def write_results(card: Path, files: Sequence[Path]) -> None:
    """Replaces what stands between the card's markers; raises ``ValueError`` where they are missing."""
    text = card.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{card}: needs one line {BEGIN} and after it one line {END}")
    before, after = text[: text.index(BEGIN)], text[text.index(END) :]
    tables = "\n\n".join(results(json.loads(file.read_text(encoding="utf-8"))) for file in files)
    card.write_text(f"{before}{BEGIN}\n{tables}\n{after}", encoding="utf-8")
