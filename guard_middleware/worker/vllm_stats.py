"""vLLM's own figures, as the worker's metrics show them: what each data-parallel rank reports, and all ranks as one.

Imports vLLM, so only ``engine_vllm`` may import it, after the environment that vLLM reads is set. Keeps the latest
figures and totals, no history, and of a report only what is named here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm.v1.metrics.loggers import StatLoggerBase


class Stats(StatLoggerBase):  # type: ignore[misc]  # vLLM is not there where this is checked
    """Keeps vLLM's latest figures of one rank."""

    def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
        self.now = {"running": 0.0, "waiting": 0.0, "kv_cache_usage": 0.0}
        self.total = {
            "preemptions": 0.0,
            "prefix_tokens": 0.0,
            "prefix_hit_tokens": 0.0,
            "images": 0.0,
            "image_hits": 0.0,
        }

    def record(
        self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
    ) -> None:
        if scheduler_stats is not None:
            self.now = {
                "running": scheduler_stats.num_running_reqs,
                "waiting": scheduler_stats.num_waiting_reqs,
                "kv_cache_usage": scheduler_stats.kv_cache_usage,
            }
            self.total["prefix_tokens"] += scheduler_stats.prefix_cache_stats.queries
            self.total["prefix_hit_tokens"] += scheduler_stats.prefix_cache_stats.hits
        if iteration_stats is not None:
            self.total["preemptions"] += iteration_stats.num_preempted_reqs
        if mm_cache_stats is not None:
            self.total["images"] += mm_cache_stats.queries
            self.total["image_hits"] += mm_cache_stats.hits

    def log_engine_initialized(self) -> None:
        """Nothing to say."""


def summed(ranks: Sequence[Stats]) -> dict[str, float]:
    """The figures of all ranks as one (shares: averaged), named as the worker's metrics name them."""
    figures: dict[str, float] = {}
    for rank in ranks:
        for name, value in (*rank.now.items(), *rank.total.items()):
            share = value / len(ranks) if name == "kv_cache_usage" else value
            figures[f"vllm_{name}"] = figures.get(f"vllm_{name}", 0.0) + share
    return figures
