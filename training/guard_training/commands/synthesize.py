"""``guard-train synthesize``."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from guard_training.commands import count, subcommand, terminal

if TYPE_CHECKING:
    from rich.console import Console

    from guard_training.synthesis.cost import Price
    from guard_training.synthesis.writing import Asking, Tally

_ABOUT = """\
Writes the reasoning of rows with a teacher, any vision-language model behind OpenAI's chat completions. The labels are
given to it, as in GuardReasoner-VL; what the source does not label, one side or both, is the teacher's to decide (and
the row says so). An answer is kept where it is whole, has one to ten steps, concludes what the labels say and does
not speak of them; else the row is asked again, --attempts times in all, and then reported. The cost is shown first.
A stopped run goes on when the same command is given again. The key is read from the variable --key-from names.

  guard-train synthesize --rows rows.jsonl --output taught.jsonl --teacher gpt-4o --dry-run \\
      --price-prompt 2.5 --price-completion 10
  guard-train synthesize --rows rows.jsonl --output taught.jsonl --teacher Qwen/Qwen2.5-VL-72B-Instruct \\
      --base-url http://localhost:8000/v1 --concurrency 64 --yes

A line also holds "synthesis": {"teacher", "attempts", "steps", "decided"}. Content leaves this machine for the
teacher's; nothing of it is logged.
"""


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    synthesize = subcommand(commands, "synthesize", "write the reasoning of rows with a teacher", _ABOUT)
    arg = synthesize.add_argument
    arg("--rows", type=Path, required=True, metavar="FILE", help="rows, .jsonl or .jsonl.gz")
    arg("--output", type=Path, required=True, metavar="FILE", help="rows with rationales; images go beside it")
    arg("--teacher", required=True, metavar="MODEL", help="the teacher's name at its server")
    arg("--base-url", metavar="URL", help="of the server (default: OpenAI's)")
    arg("--key-from", default="OPENAI_API_KEY", metavar="NAME", help="variable with the key (default OPENAI_API_KEY)")
    arg("--temperature", type=float, metavar="X", help="of the answers (default: the server's)")
    arg("--max-tokens", type=count, default=1200, metavar="N", help="of an answer (default 1200)")
    arg("--attempts", type=count, default=3, metavar="N", help="answers asked for until a row is given up (default 3)")
    arg("--repeats", type=int, default=6, metavar="N", help="of a request that meets 429, 5xx or no server (default 6)")
    arg("--timeout", type=float, default=180.0, metavar="S", help="seconds for one request (default 180)")
    arg("--concurrency", type=count, default=16, metavar="N", help="requests under way (default 16)")
    arg("--requests-per-minute", type=count, metavar="N", help="at most so many, repeats included")
    arg("--tokens-per-minute", type=count, metavar="N", help="at most so many, prompt and answer")
    arg("--image-side", type=count, default=1024, metavar="N", help="longer side of a sent image (default 1024)")
    arg("--limit", type=count, metavar="N", help="only the first N rows that need a rationale")
    arg("--again", action="store_true", help="ask again for rows whose answers were all refused")
    arg("--price-prompt", type=float, metavar="X", help="of a million prompt tokens")
    arg("--price-completion", type=float, metavar="X", help="of a million answer tokens")
    arg("--image-tokens", type=count, metavar="N", help="of an image, as estimated (default: one per 28 x 28 pixels)")
    arg("--expected-tokens", type=count, default=280, metavar="N", help="of an answer, for the estimate (default 280)")
    arg("--dry-run", action="store_true", help="show the cost and stop")
    arg("--yes", action="store_true", help="go on without asking")
    synthesize.set_defaults(run=run)


def run(given: argparse.Namespace) -> None:
    from rich.progress import Progress

    from guard_training.corpus.rows import CorpusError, Skipped, distinct, read_good_rows
    from guard_training.rowfile import begin, digest
    from guard_training.synthesis.cost import Price, estimate, table
    from guard_training.synthesis.limits import Limiter
    from guard_training.synthesis.writing import copy, invalid_file, left_over, needed, write

    if given.repeats < 0 or not given.timeout > 0:
        raise ValueError("--repeats is 0 or more, and --timeout above 0")
    console = terminal()
    skipped, asking = Skipped(), _asking(given)
    limiter = Limiter(given.requests_per_minute, given.tokens_per_minute)
    price = Price(given.price_prompt, given.price_completion)
    rows = distinct(read_good_rows(given.rows, skipped), skipped)
    if not rows:
        raise CorpusError(f"{given.rows}: no usable row; {skipped.summary()}")
    wanted = needed(rows, asking, skipped)[: given.limit]
    console.print(table(estimate(left_over(wanted, given.output, again=given.again), asking.expected), price))
    skipped.tell(console)
    if given.dry_run:
        return
    _confirm(given.yes, console)
    teacher = asking.teacher
    settings = {"teacher": teacher.model, "base_url": teacher.base_url, "temperature": teacher.temperature}
    # not the attempts: more of them for rows given up is what --again is for, and a row says how many it took
    settings |= {"max_tokens": teacher.max_tokens, "side": asking.side, "rows": digest(given.rows)}
    begin(given.output, {"command": "synthesize", **settings})
    if given.again:
        invalid_file(given.output).unlink(missing_ok=True)
    copy(rows, given.output)
    with Progress(console=console) as progress:
        tally = write(wanted, asking, limiter, given.output, progress)
    _report(tally, price, asking, given.output, console)
    skipped.tell(console, given.output.with_name(f"{given.output.stem}.skipped.txt"))
    if tally.out_of_reach:
        raise ValueError(
            f"{tally.out_of_reach} rows were out of the teacher's reach ({tally.why}): give the same command again"
        )


def _asking(given: argparse.Namespace) -> Asking:
    from guard_training.synthesis.client import Teacher, TeacherError
    from guard_training.synthesis.writing import Asking

    key = os.environ.get(given.key_from, "")
    if not key and given.base_url is None and not given.dry_run:
        raise TeacherError(f"no key in {given.key_from}: set it, name another variable with --key-from, or --base-url")
    teacher = Teacher(
        model=given.teacher,
        base_url=given.base_url,
        key=key,
        temperature=given.temperature,
        max_tokens=given.max_tokens,
        repeats=given.repeats,
        timeout=given.timeout,
    )
    return Asking(
        teacher=teacher,
        attempts=given.attempts,
        concurrency=given.concurrency,
        side=given.image_side,
        expected=given.expected_tokens,
        image_tokens=given.image_tokens,
    )


def _confirm(yes: bool, console: Console) -> None:
    from rich.prompt import Confirm

    if yes:
        return
    if not sys.stdin.isatty():
        raise ValueError("nobody is there to agree to the cost: give --yes to go on, or --dry-run to look only")
    if not Confirm.ask("Go on?", console=console, default=False):
        raise ValueError("stopped before anything was asked")


def _report(tally: Tally, price: Price, asking: Asking, output: Path, console: Console) -> None:
    from guard_training.synthesis.writing import invalid_file

    cost = price.of(tally.prompt_tokens, tally.completion_tokens)
    console.print(
        f"{tally.written} rationales written in {output}; {tally.answers} answers, {tally.prompt_tokens:,} prompt and "
        f"{tally.completion_tokens:,} answer tokens{f', cost {cost:,.2f}' if cost is not None else ''}",
        markup=False,
        soft_wrap=True,
    )
    if tally.decided:
        sides = ", ".join(f"{side} {number}" for side, number in sorted(tally.decided.items()))
        console.print(
            f"labels that the teacher decided: {sides}; {tally.unlabelled} rows had none of their own",
            markup=False,
            soft_wrap=True,
        )
    if tally.faults:
        reasons = ", ".join(f"{fault} {number}" for fault, number in tally.faults.most_common())
        console.print(f"answers refused: {reasons}", markup=False, soft_wrap=True)
    if tally.invalid:
        console.print(
            f"{tally.invalid} rows given up, up to {asking.attempts} answers each: {invalid_file(output)}",
            markup=False,
            soft_wrap=True,
        )
