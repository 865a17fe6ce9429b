"""``guard-train augment``."""

from __future__ import annotations

import argparse
from pathlib import Path

from guard_training.commands import count, subcommand, terminal
from guard_training.tuning.concatenation import ACROSS, LAYOUTS, ORDERS, PAIRINGS

_ABOUT = """\
Safety-aware data concatenation (GuardReasoner-VL, section 4.2): writes the given rows and, beside them, mixes of two
rows. Texts are joined, images merged, and a mix is harmful if either row is, for request and response separately.
Unknown labels: harmful if one is known to be, unharmful only if both are, else null. The paper's settings are the
defaults; --layout, --order, --gap and --fillers take several values, of which each mix draws one. A stopped run goes
on when the same command is given again.

  guard-train reject --rows rows.jsonl --model out/sft --output hard.jsonl --max-rows 12000
  guard-train augment --rows hard.jsonl --output rl.jsonl --held-out 0.2
  guard-train augment --rows hard.jsonl --output rl.jsonl --layout side_by_side grid inset --gap 0 32 --pairing opposed

A mix's line also holds "concatenation": {"parents", "sources", "fillers", "layout", "gap", "order"}.
"""


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    augment = subcommand(commands, "augment", "mix hard rows into harder ones", _ABOUT)
    arg = augment.add_argument
    arg("--rows", type=Path, required=True, metavar="FILE", help="labelled rows, .jsonl or .jsonl.gz")
    arg("--output", type=Path, required=True, metavar="FILE", help="rows and mixes; images go to images/ beside it")
    arg("--share", type=float, default=0.2, metavar="X", help="mixes among all rows of the output (default 0.2)")
    arg("--seed", type=int, default=0, metavar="N", help="of the draws (default 0)")
    arg(
        "--held-out",
        type=float,
        default=0.0,
        metavar="X",
        help="share of rows that go unmixed to <output>.validation.jsonl (the paper: 0.2; default 0)",
    )
    arg(
        "--layout", nargs="+", choices=LAYOUTS, default=["side_by_side"], help="of merged images (default side_by_side)"
    )
    arg("--order", nargs="+", choices=ORDERS, default=["drawn"], help="of harmful and unharmful (default drawn)")
    arg("--gap", nargs="+", type=int, default=[0], metavar="N", help="pixels between images (default 0)")
    arg(
        "--fillers",
        nargs="+",
        type=int,
        default=[],
        metavar="N",
        help="unharmful rows between the two (default: 2 with images in a grid, else 0)",
    )
    arg("--pairing", choices=PAIRINGS, default="uniform", help="opposed: harmful with unharmful (default uniform)")
    arg("--modalities", choices=ACROSS, default="any", help="across: one row with an image, one without (default any)")
    arg("--side", type=count, default=1024, metavar="N", help="longest side of a merged image (default 1024)")
    arg("--inset", type=float, default=0.4, metavar="X", help="share of the sides that an inset takes (default 0.4)")
    arg("--separator", default=" ", metavar="TEXT", help="between joined texts (default one space)")
    augment.set_defaults(run=run)


def run(given: argparse.Namespace) -> None:
    from guard_training.tuning.augmentation import augment
    from guard_training.tuning.concatenation import Options

    options = Options(
        layouts=tuple(given.layout),
        orders=tuple(given.order),
        gaps=tuple(given.gap),
        fillers=tuple(given.fillers),
        pairing=given.pairing,
        across=given.modalities,
        side=given.side,
        inset=given.inset,
    )
    augment(
        given.rows,
        given.output,
        options,
        share=given.share,
        seed=given.seed,
        held_out_share=given.held_out,
        separator=given.separator,
        console=terminal(),
    )
