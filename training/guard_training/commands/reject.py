"""``guard-train reject``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from guard_training.commands import count

_ABOUT = """\
Rejection sampling (GuardReasoner-VL, section 4.1): draws k outputs of a guard for every row and keeps the rows that
it still gets wrong. A sample is right where the product's strict parser reads it and every labelled side is right.
The paper keeps rows that are wrong in all four samples, and every row that is only an image (--keep-all-images);
--keep 1..3 keeps the rows of mixed outcome, from which group-relative RL learns. What a guard gets wrong is mostly of
one label, and RL on that alone moves its operating point and teaches it nothing: --balance evens the labels out.
Statistics by source and modality are printed. A stopped run goes on when the same command is given again, and draws
the same; --keep, --keep-all-images, --balance and --max-rows can be changed later without sampling again.

  guard-train reject --rows rows.jsonl --model out/sft --output hard.jsonl --keep-all-images --max-rows 12000
  guard-train reject --rows rows.jsonl --model out/sft --output mixed.jsonl --keep 1..3 --balance --engine vllm
"""


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    reject = commands.add_parser(
        "reject",
        help="keep the rows that a guard still gets wrong",
        description=_ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    arg = reject.add_argument
    arg("--rows", type=Path, required=True, metavar="FILE", help="labelled rows, .jsonl or .jsonl.gz")
    arg("--model", required=True, help="the guard after SFT: a folder, nano, or a hub id")
    arg("--output", type=Path, required=True, metavar="FILE", help="the hard rows; counts go to <output>.counts.jsonl")
    arg("--k", type=count, default=4, metavar="N", help="samples of each row (default 4)")
    arg("--temperature", type=float, default=1.0, metavar="X", help="of the samples (default 1.0)")
    arg("--top-p", type=float, default=0.95, metavar="X", help="of the samples (default 0.95)")
    arg("--max-new-tokens", type=count, metavar="N", help="of a sample (default: the guard's own limit; paper 4096)")
    arg("--keep", metavar="N[..M]", help="how many samples of a kept row are wrong (default: all k)")
    arg("--keep-all-images", action="store_true", help="keep every row that is only an image, as the paper does")
    arg("--balance", action="store_true", help="keep as many rows with a harmful label as without, side by side")
    arg("--max-rows", type=count, metavar="N", help="keep at most N rows, drawn by the seed (paper 12000)")
    arg("--seed", type=int, default=0, metavar="N", help="of samples and draws (default 0)")
    arg("--engine", choices=("transformers", "vllm"), default="transformers", help="default transformers")
    arg("--batch", type=count, default=32, metavar="N", help="samples drawn at once (default 32; vLLM: 1024 or more)")
    arg("--device", help="for transformers (default: CUDA where there is one)")
    arg("--tensor-parallel", type=count, default=1, metavar="N", help="GPUs of vLLM (default 1)")
    arg("--gpu-memory", type=float, default=0.9, metavar="X", help="share of the GPU's memory for vLLM (default 0.9)")
    arg("--max-pixels", type=count, metavar="N", help="bound images tighter than the guard does (area)")
    arg("--json", type=Path, metavar="FILE", help="also write the statistics here")
    reject.set_defaults(run=run)


def run(given: argparse.Namespace) -> None:
    from rich.console import Console
    from transformers.utils import logging

    from guard_training.nano.drawn import Read
    from guard_training.tuning.contract import load_contract
    from guard_training.tuning.hard import Selection, reject
    from guard_training.tuning.sampling import Sampler, Sampling, TransformersSampler, VllmSampler

    logging.disable_progress_bar()
    contract = load_contract(given.model, max_pixels=given.max_pixels)
    sampling = Sampling(
        k=given.k,
        temperature=given.temperature,
        top_p=given.top_p,
        max_new_tokens=given.max_new_tokens or contract.facts.max_new_tokens,
    )

    def sampler() -> Sampler:
        if given.engine == "vllm":
            options = {"tensor_parallel_size": given.tensor_parallel, "gpu_memory_utilization": given.gpu_memory}
            return VllmSampler(contract, sampling, **options)
        return TransformersSampler(contract, sampling, device=given.device)

    read: Read | None = None
    if contract.facts.reader:
        from guard_middleware.guard.reader import Reader
        from guard_training.nano.drawn import DrawnText

        read = DrawnText(given.output.with_name(f"{given.output.stem}.drawn.jsonl"), Reader().read)
    reject(
        given.rows,
        given.output,
        contract,
        sampling,
        Selection(given.keep, given.keep_all_images, given.balance, given.max_rows),
        sampler,
        engine=given.engine,
        sequences=given.batch,
        seed=given.seed,
        read=read,
        report=given.json,
        console=Console(width=None if sys.stdout.isatty() else 150),
    )
