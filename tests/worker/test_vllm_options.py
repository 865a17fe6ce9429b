"""Which of vLLM's arguments an operator may state, and what they change. Needs no vLLM."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from guard_middleware.errors import ConfigError
from guard_middleware.worker.vllm_options import check_stated, deciding, engine_arguments, ranks
from guard_middleware.worker.weights import ModelFacts, Weights

KNOWN = {"dtype", "quantization", "tensor_parallel_size", "max_num_seqs", "model"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("max_num_seqs", "sets this one itself -- use --max-batch"),
        ("model", "sets this one itself -- use --model"),
        ("quantisation", "no such engine argument -- did you mean quantization?"),
        ("zzz", "no such engine argument -- see vLLM's engine arguments"),
    ],
)
def test_an_argument_that_is_ours_or_that_vllm_has_not_is_refused_with_what_to_use(name, message):
    with pytest.raises(ConfigError, match=message) as caught:
        check_stated({"dtype": "float16", name: 1}, KNOWN)
    assert caught.value.path == f"--vllm-arg {name}"


def test_arguments_that_are_the_operators_pass():
    check_stated({"dtype": "float16", "tensor_parallel_size": 2}, KNOWN)


def test_what_is_stated_stands_over_the_defaults_and_under_what_is_ours(tmp_path):
    weights = Weights(tmp_path, ModelFacts("guard", "r1", min_pixels=1, max_pixels=2))
    stated = {"dtype": "float16", "max_num_seqs": 1}
    made = engine_arguments(weights, stated, max_batch=64, limit=100, dtype="bfloat16", processors=["p"])
    assert (made["dtype"], made["max_num_seqs"], made["max_model_len"]) == ("float16", 64, 100)
    assert (made["logits_processors"], made["enable_prefix_caching"]) == (["p"], True)
    assert made["mm_processor_kwargs"] == {"size": {"shortest_edge": 1, "longest_edge": 2}}


@pytest.mark.parametrize(
    ("stated", "found"),
    [
        ({}, {}),
        ({"tensor_parallel_size": 2, "gpu_memory_utilization": 0.5}, {}),
        ({"tensor_parallel_size": 2, "quantization": "fp8"}, {"quantization": "fp8"}),
        ({"an_argument_of_tomorrow": 1}, {"an_argument_of_tomorrow": 1}),
    ],
)
def test_all_but_where_and_how_fast_may_change_verdicts(stated, found):
    assert deciding(stated) == found


@pytest.mark.parametrize(
    ("stated", "found"),
    [({}, 1), ({"data_parallel_size": 4}, 4), ({"data_parallel_size": "x"}, 1), ({"data_parallel_size": 0}, 1)],
)
def test_ranks_are_the_data_parallel_copies(stated, found):
    assert ranks(stated) == found


def test_the_package_the_engine_and_the_page_ask_for_the_same_vllm() -> None:
    root = Path(__file__).parents[2]
    extras = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    (least,) = [re.findall(r">=([0-9.]+)", need) for need in extras["vllm"] if need.startswith("vllm")]
    engine = (root / "guard_middleware" / "worker" / "engine_vllm.py").read_text("utf-8")
    assert re.findall(r"^LEAST_VERSION = \((\d+), (\d+)\)$", engine, re.MULTILINE) == [tuple(least[0].split("."))]
    assert re.findall(r"vLLM ([0-9.]+) or newer", (root / "docs" / "worker.md").read_text("utf-8")) == least
