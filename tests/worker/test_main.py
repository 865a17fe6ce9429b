"""The worker as a process, with a tiny real model of random weights."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from guard_middleware.errors import ConfigError, GuardErrorKind
from guard_middleware.guard.client import GuardClient
from guard_middleware.types import Conversation, Message, Text
from guard_middleware.wire import ModerationRequest
from guard_middleware.worker.__main__ import _vllm_args, load, main, parser
from guard_middleware.worker.metrics import Metrics

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "guard_middleware.worker"]


def start(*arguments, **options):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [*COMMAND, *map(str, arguments)], env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options
    )


def ask(address, deadline):
    async def run():
        client = GuardClient(address)
        request = ModerationRequest("q", Conversation((Message("user", (Text("Hello"),)),)), "input", deadline)
        try:
            return await client.ready(), await client.moderate(request)
        finally:
            await client.aclose()

    return asyncio.run(run())


@pytest.mark.parametrize("where", ["socket", "tcp"])
def test_it_says_when_it_is_ready_answers_and_ends_on_sigterm(tiny_folder, tmp_path, where):
    path = tmp_path / "w.sock"
    listen = ["--socket", path] if where == "socket" else ["--port", 0]
    with start("--model", tiny_folder, *listen, "--threads", 1, "--no-reader") as process:
        line = process.stdout.readline()
        ready = re.fullmatch(r"worker ready model=tiny revision=[0-9a-f]{16} socket=(\S+)\n", line)
        assert ready
        assert where == "tcp" or ready[1] == str(path)
        is_ready, outcome = ask(ready[1], 20.0)
        assert is_ready
        # Random weights write no verdict; what matters is that it is an error and never a guess.
        assert outcome.kind in (GuardErrorKind.TRUNCATED, GuardErrorKind.UNPARSEABLE)
        _, outcome = ask(ready[1], 0.05)
        assert outcome.kind is GuardErrorKind.TIMEOUT
        process.terminate()
        _, errors = process.communicate(timeout=20)
    assert process.returncode == -15
    assert not path.exists()
    assert '"message": "moderated"' in errors
    assert "Hello" not in errors


def test_it_ends_when_its_parent_does(tiny_folder, tmp_path):
    arguments = ("--model", tiny_folder, "--socket", tmp_path / "w.sock", "--exit-with-parent", "--no-reader")
    with start(*arguments, stdin=subprocess.PIPE) as process:
        assert process.stdout.readline().startswith("worker ready")
        process.stdin.close()
        started = time.monotonic()
        process.wait(10)
        assert time.monotonic() - started < 6


def test_a_model_that_is_not_there_ends_it_with_the_remedy(tmp_path):
    with start("--model", tmp_path / "nothing", "--socket", tmp_path / "w.sock") as process:
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 3
    assert "no such folder" in errors
    assert "give a folder, a hub id, or `nano`" in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give either --socket PATH or --port N"),
        (["--socket", "/tmp/x", "--port", "1"], "give either --socket PATH or --port N"),
        (["--port", "0", "--host", "0.0.0.0"], "--allow-remote"),
        (["--port", "0", "--max-batch", "0"], "must be positive"),
        (["--socket", "/nonexistent/x/w.sock"], "cannot make the socket"),
    ],
)
def test_wrong_options_end_it_with_status_2_and_the_remedy(arguments, words, capsys):
    try:
        status = main(arguments)
    except SystemExit as exit:
        status = exit.code
    assert status == 2
    assert words in capsys.readouterr().err


def test_help_teaches_by_examples():
    text = parser().format_help()
    for words in ("--socket PATH", "curl --unix-socket", "worker ready model=", "Exit status"):
        assert words in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--engine", "vllm"], ("which is not installed", "guard-middleware[vllm]", "--engine transformers")),
        (["--engine", "vllm", "--threads", "1"], ("--threads is for the CPU", "OMP_NUM_THREADS")),
        (["--engine", "vllm", "--vllm-arg", "tensor_parallel_size"], ("no KEY=VALUE", "tensor_parallel_size=2")),
        (["--engine", "vllm", "--vllm-args", "/nonexistent.json"], ("cannot be read as JSON",)),
        (["--vllm-arg", "tensor_parallel_size=2"], ("another engine", "add --engine vllm")),
    ],
)
def test_an_engine_that_cannot_be_had_is_refused_with_the_remedy(arguments, words):
    if importlib.util.find_spec("vllm") is not None:
        pytest.skip("vLLM is installed here")
    options = parser().parse_args(["--socket", "unused", "--no-reader", *arguments])
    with pytest.raises(ConfigError) as caught:
        asyncio.run(load(options, Metrics()))
    for word in words:
        assert word in str(caught.value)


def test_vllms_arguments_are_json_or_bare_words_and_those_on_the_line_win(tmp_path):
    file = tmp_path / "args.json"
    file.write_text('{"dtype": "float16", "enforce_eager": true}')
    stated = ["tensor-parallel-size=2", "dtype=bfloat16", 'override_generation_config={"a": 1}']
    arguments = [part for one in stated for part in ("--vllm-arg", one)]
    options = parser().parse_args(["--socket", "unused", "--vllm-args", str(file), *arguments])
    assert _vllm_args(options) == {
        "dtype": "bfloat16",
        "enforce_eager": True,
        "tensor_parallel_size": 2,
        "override_generation_config": {"a": 1},
    }
