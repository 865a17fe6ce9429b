"""The worker as a process, with a tiny real model of random weights."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from guard_middleware.errors import ConfigError, GuardErrorKind
from guard_middleware.guard.client import GuardClient
from guard_middleware.types import Conversation, Message, Text
from guard_middleware.wire import ModerationRequest
from guard_middleware.worker.__main__ import load, main
from guard_middleware.worker.metrics import Metrics
from guard_middleware.worker.options import parser
from guard_middleware.worker.weights import load as load_weights

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


def test_the_revision_says_that_an_operator_changed_whether_drawn_text_is_read(tiny_folder, tmp_path):
    folder = tmp_path / "reads"
    shutil.copytree(tiny_folder, folder)
    (folder / "guard.json").write_text('{"reader": true}')
    with start("--model", folder, "--socket", tmp_path / "w.sock", "--no-reader") as process:
        said = process.stdout.readline()
        process.terminate()
        process.communicate(timeout=20)
    assert f" revision={load_weights(folder, name='reads').facts.revision}+" in said


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
        (["--port", "0", "--guard-format", "singguard"], "--guard-format: says nothing without --endpoint"),
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


def test_an_engine_that_is_not_installed_is_refused_with_the_remedy():
    if importlib.util.find_spec("vllm") is not None:
        pytest.skip("vLLM is installed here")
    options = parser().parse_args(["--socket", "unused", "--no-reader", "--engine", "vllm"])
    with pytest.raises(ConfigError, match="which is not installed") as caught:
        asyncio.run(load(options, Metrics()))
    for word in ("guard-middleware[vllm]", "--engine transformers"):
        assert word in str(caught.value)
