"""Options that go together, those that do not, and how much a guard takes on with them."""

from __future__ import annotations

import pytest

from guard_middleware.errors import ConfigError
from guard_middleware.worker.batching import BatchLimits
from guard_middleware.worker.options import check, in_flight, limits, parser, vllm_args

REMOTE = ["--endpoint", "http://h", "--endpoint-model", "m", "--guard-format", "singguard"]


def options(*arguments):
    return parser().parse_args(["--socket", "unused", *arguments])


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--model", "nano", "--threads", "1", "--max-batch", "4", "--no-calibration"],
        ["--engine", "vllm", "--vllm-arg", "tensor_parallel_size=2"],
        REMOTE,
        [*REMOTE, "--ignore", "image", "--endpoint-concurrency", "4", "--max-queue", "9", "--reader"],
    ],
)
def test_options_that_go_together_pass(arguments):
    check(options(*arguments))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--endpoint-model", "m"], ("--endpoint-model: says nothing without --endpoint",)),
        (["--guard-format", "singguard"], ("--guard-format: says nothing without --endpoint",)),
        (["--policy-text", "p"], ("--policy-text: says nothing without --endpoint",)),
        (["--endpoint-revision", "2"], ("--endpoint-revision: says nothing without --endpoint",)),
        (["--endpoint-concurrency", "4"], ("--endpoint-concurrency: says nothing without --endpoint",)),
        (["--ignore", "image"], ("--ignore: says nothing without --endpoint",)),
        ([*REMOTE, "--model", "other"], ("either --model or --endpoint",)),
        (["--endpoint", "http://h"], ("add --endpoint-model NAME and --guard-format NAME",)),
        ([*REMOTE, "--engine", "vllm"], ("--engine: says nothing with --endpoint",)),
        ([*REMOTE, "--vllm-arg", "dtype=float16"], ("--vllm-arg: says nothing with --endpoint",)),
        ([*REMOTE, "--vllm-args", "f"], ("--vllm-args: says nothing with --endpoint",)),
        ([*REMOTE, "--max-batch", "8"], ("--max-batch: says nothing with --endpoint",)),
        ([*REMOTE, "--threads", "1"], ("--threads: says nothing with --endpoint",)),
        ([*REMOTE, "--max-queue-tokens", "1"], ("--max-queue-tokens: says nothing with --endpoint",)),
        ([*REMOTE, "--no-calibration"], ("--calibration: says nothing with --endpoint",)),
        (["--engine", "vllm", "--threads", "1"], ("--threads is for the CPU", "OMP_NUM_THREADS")),
        (["--engine", "vllm", "--vllm-arg", "tensor_parallel_size"], ("no KEY=VALUE", "tensor_parallel_size=2")),
        (["--engine", "vllm", "--vllm-args", "/nonexistent.json"], ("cannot be read as JSON",)),
        (["--vllm-arg", "tensor_parallel_size=2"], ("another engine", "add --engine vllm")),
    ],
)
def test_options_that_do_not_go_together_are_refused_with_the_remedy(arguments, words):
    with pytest.raises(ConfigError) as caught:
        check(options(*arguments))
    for word in words:
        assert word in str(caught.value)


def test_vllms_arguments_are_json_or_bare_words_and_those_on_the_line_win(tmp_path):
    file = tmp_path / "args.json"
    file.write_text('{"dtype": "float16", "enforce_eager": true}')
    stated = ["tensor-parallel-size=2", "dtype=bfloat16", 'override_generation_config={"a": 1}']
    arguments = [part for one in stated for part in ("--vllm-arg", one)]
    assert vllm_args(options("--vllm-args", str(file), *arguments)) == {
        "dtype": "bfloat16",
        "enforce_eager": True,
        "tensor_parallel_size": 2,
        "override_generation_config": {"a": 1},
    }


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ([], BatchLimits(8, 256, 262_144)),
        (["--max-batch", "4", "--max-queue", "9", "--max-queue-tokens", "10"], BatchLimits(4, 9, 10)),
        (["--engine", "vllm"], BatchLimits(256, 256, 262_144)),
        (["--engine", "vllm", "--vllm-arg", "data_parallel_size=2"], BatchLimits(512, 256, 262_144)),
        (["--engine", "vllm", "--vllm-arg", "data_parallel_size=2", "--max-batch", "4"], BatchLimits(8, 256, 262_144)),
        ([*REMOTE, "--endpoint-concurrency", "4", "--max-queue", "9"], BatchLimits(4, 9)),
    ],
)
def test_what_a_guard_takes_on_follows_from_batch_ranks_and_queue(arguments, found):
    assert limits(options(*arguments)) == found


def test_one_connection_may_ask_more_than_the_guard_takes_so_that_its_queue_refuses_first():
    assert in_flight(BatchLimits(256, 512)) > 256 + 512
