"""vLLM's engine arguments: which of them an operator may state, which change verdicts, and which the worker sets.

Refuses (``ConfigError``) an argument that the worker sets itself, naming what to use instead, and one that vLLM does
not have. Values are vLLM's to check. Imports nothing of vLLM.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from guard_middleware.errors import ConfigError
from guard_middleware.worker.weights import Weights

#: pictures of one prompt; more is ``too_long`` (tests/worker/test_engine_vllm.py). A gateway passes 20 at most
MAX_IMAGES = 32
#: arguments that the engine sets, and what an operator gives instead
_OWNED = {
    "model": "--model",
    "max_num_seqs": "--max-batch",
    "max_model_len": "max_input_tokens and max_new_tokens in guard.json",
    "tokenizer": "the model's folder",
    "skip_tokenizer_init": "nothing",
    "scheduling_policy": "nothing: it is by priority",
    "logits_processors": "form in guard.json",
    "logprobs_mode": "nothing",
    "worker_extension_cls": "nothing",
    "limit_mm_per_prompt": "nothing",
    "mm_processor_kwargs": "min_pixels and max_pixels in guard.json",
    "reasoning_parser": "nothing",
    "reasoning_config": "nothing",
}
#: arguments that say where a model runs and how fast; any other may change a verdict
_PLACING = frozenset(
    {
        "tensor_parallel_size",
        "pipeline_parallel_size",
        "data_parallel_size",
        "data_parallel_size_local",
        "data_parallel_address",
        "data_parallel_rpc_port",
        "data_parallel_backend",
        "device_ids",
        "distributed_executor_backend",
        "gpu_memory_utilization",
        "kv_cache_memory_bytes",
        "max_num_batched_tokens",
        "enable_prefix_caching",
        "enable_chunked_prefill",
        "enforce_eager",
        "mm_processor_cache_gb",
        "cpu_offload_gb",
        "download_dir",
        "served_model_name",
        "disable_log_stats",
    }
)


def deciding(stated: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the stated arguments that may change a verdict, such as ``quantization`` and ``dtype``."""
    return {name: value for name, value in stated.items() if name not in _PLACING}


def ranks(stated: Mapping[str, Any]) -> int:
    """Data-parallel copies of the model, each with a batch of its own. What is no number is vLLM's to refuse."""
    size = stated.get("data_parallel_size", 1)
    return size if type(size) is int and size > 0 else 1


def check_stated(args: Collection[str], known: Collection[str]) -> None:
    """Raises ``ConfigError`` for a name among ``args`` that is not the operator's to set, or not among ``known``."""
    for name in args:
        if name in _OWNED:
            raise ConfigError(
                "the worker sets this one itself", path=f"--vllm-arg {name}", remedy=f"use {_OWNED[name]}"
            )
        if name not in known:
            near = difflib.get_close_matches(name, known, 3)
            raise ConfigError(
                "vLLM has no such engine argument",
                path=f"--vllm-arg {name}",
                remedy=f"did you mean {' or '.join(near)}?" if near else "see vLLM's engine arguments",
            )


def engine_arguments(
    weights: Weights,
    stated: Mapping[str, Any],
    *,
    max_batch: int,
    limit: int,
    dtype: str,
    processors: Sequence[str],
) -> dict[str, Any]:
    """All that is stated to vLLM: defaults, over them what the operator has ``stated``, over both what is ours.

    ``limit`` is in tokens, prompt and output together; ``processors`` are vLLM's names of logits processors.
    """
    facts = weights.facts
    ours: dict[str, Any] = {
        "model": str(weights.folder),
        "max_num_seqs": max_batch,
        "max_model_len": limit,
        "scheduling_policy": "priority",
        "worker_extension_cls": "guard_middleware.worker.vllm_end.Extension",
        "limit_mm_per_prompt": {"image": MAX_IMAGES, "video": 0},
        "mm_processor_kwargs": {"size": {"shortest_edge": facts.min_pixels, "longest_edge": facts.max_pixels}},
    }
    defaults: dict[str, Any] = {
        "served_model_name": facts.name,
        "enable_prefix_caching": True,
        "disable_log_stats": True,
        "dtype": dtype,
    }
    if processors:
        ours["logits_processors"] = list(processors)
    return {**defaults, **stated, **ours}
