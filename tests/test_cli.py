"""The command line: what is printed where, and the exit status that a script sees."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from guard_middleware import __version__, cli
from tests.support.gateway import command

CONFIG = """\
policies:
  strict:
    input: {threshold: 0.2, deadline: 2s}
    output: {on_harmful: annotate, on_error: annotate_unscreened}
  lab:
    input: {moderate: false}
tenants:
  header: x-tenant
  match:
    - {tenant: acme, policy: strict}
    - {api_key_sha256: "%s", policy: lab}
routes:
  - {path: /v1/models, policy: lab}
"""


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "guard.yaml"
    path.write_text(CONFIG % hashlib.sha256(b"sk-1").hexdigest())
    return str(path)


@pytest.fixture(autouse=True)
def _nothing_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    def started(*_: Any) -> None:
        raise AssertionError("it started")

    monkeypatch.setattr(uvicorn.Server, "run", started)


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    status = cli.main(list(argv))
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.mark.parametrize(
    ("argv", "options"),
    [
        ([], ["serve", "demo", "check", "worker", "policy", "weights", "--version", "--log-level", "examples:"]),
        (["serve"], ["--config", "--upstream", "--host", "--port"]),
        (["demo"], ["--upstream", "--upstream-model", "--port", "--no-serve"]),
        (["check"], ["FILE", "--text", "--image", "--response", "--model", "--worker", "--threads", "--deadline"]),
        (["weights"], ["list", "stage", "unstage", "promote", "rollback", "examples:"]),
        (["weights", "stage"], ["REVISION", "--config", "--directory", "--guard", "--force", "--no-wait", "--timeout"]),
        (["policy"], ["explain"]),
        (["policy", "explain"], ["--config", "--path", "--tenant", "--api-key-env", "--untrusted-peer", "--json"]),
    ],
)
def test_help_names_every_option(capsys: pytest.CaptureFixture[str], argv: list[str], options: list[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main([*argv, "--help"])
    assert left.value.code == 0
    said = capsys.readouterr().out
    assert all(option in said for option in options)


def test_the_workers_own_help_is_shown() -> None:
    done = subprocess.run([*command(), "worker", "--help"], capture_output=True, text=True, check=True, timeout=60)
    assert all(option in done.stdout for option in ("--model", "--socket", "--exit-with-parent"))


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(["--version"])
    assert (left.value.code, capsys.readouterr().out.strip()) == (0, __version__)


@pytest.mark.parametrize("argv", [[], ["policy"], ["nonsense"], ["serve", "--port", "x"], ["serve", "extra"]])
def test_a_wrong_command_line_is_2_with_its_usage(capsys: pytest.CaptureFixture[str], argv: list[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(argv)
    assert left.value.code == 2
    assert "usage: guard-gateway" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "chosen", "words"),
    [
        ([], "default", ["default_policy", "BLOCK: 400 content_filter", "BLOCK: 503 guard_unavailable"]),
        (["--tenant", "acme"], "strict", ["tenant `acme`", "score 0.2", "in 2 s", "PASSES UNSCREENED", "fails OPEN"]),
        (["--tenant", "acme", "--untrusted-peer"], "default", ["ignored: the peer is not in tenants.trusted_proxies"]),
        (["--path", "/v1/models"], "lab", ["the route /v1/models", "UNGUARDED"]),
        (["--api-key-env", "CLIENT_KEY"], "lab", ["the API key with SHA-256"]),
    ],
)
def test_explain_says_which_policy_and_why(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    config: str,
    argv: list[str],
    chosen: str,
    words: list[str],
) -> None:
    monkeypatch.setenv("CLIENT_KEY", "sk-1")
    status, text, errors = run(capsys, "policy", "explain", "--config", config, *argv)
    assert (status, errors) == (0, "")
    assert f"policy     {chosen} " in text
    assert all(word in text for word in words)
    assert "sk-1" not in text
    status, out, _ = run(capsys, "policy", "explain", "--config", config, "--json", *argv)
    value = json.loads(out)
    assert (status, value["policy"]) == (0, chosen)
    assert set(value) == {
        "policy", "digest", "rule", "reason", "tenant", "block_style", "race", "input", "output", "warnings",
    }  # fmt: skip
    assert value["digest"][:12] in text


def test_explain_without_a_file_is_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "policy", "explain", "--json")
    assert (status, json.loads(out)["input"]["on_error"]) == (0, "block")


def test_explain_wants_the_key_in_the_environment(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, config: str
) -> None:
    monkeypatch.delenv("CLIENT_KEY", raising=False)
    status, out, errors = run(capsys, "policy", "explain", "--config", config, "--api-key-env", "CLIENT_KEY")
    assert (status, out) == (2, "")
    assert "CLIENT_KEY" in errors


BROKEN: dict[str, tuple[str, int | None, str]] = {
    "unknown key": ("policies:\n  p:\n    input: {on_harm: block}\n", 3, "did you mean `on_harmful`?"),
    "unknown section": ("polices: {}\n", 1, "did you mean `policies`?"),
    "unknown choice": ("policies:\n  p:\n    output:\n      on_error: alow_unscreened\n", 4, "allow_unscreened"),
    "no unit": ("policies:\n  p:\n    input: {deadline: 2}\n", 3, "500ms, 2s or 1m"),
    "undefined policy": ("default_policy: strict\n", 1, "default"),
    "duplicate key": ("worker: {model: nano}\nworker: {model: nano}\n", 2, ""),
    "not YAML": ("policies: [\n", None, ""),
    "a secret": ("upstream:\n  url: http://user:pass@x/v1\n", 2, "headers_from_env"),
    "everybody trusted": ("tenants:\n  header: x-t\n  trusted_proxies: [0.0.0.0/0]\n", 3, ""),
}


@pytest.mark.parametrize(("text", "line", "remedy"), BROKEN.values(), ids=list(BROKEN))
@pytest.mark.parametrize("argv", [["serve", "--upstream", "http://127.0.0.1:1", "--port", "0"], ["policy", "explain"]])
def test_a_broken_file_stops_the_start_with_its_line_and_remedy(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, argv: list[str], text: str, line: int | None, remedy: str
) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    status, out, errors = run(capsys, *argv, "--config", str(path))
    assert (status, out) == (2, "")
    place = f"{path}:{line}: " if line else f"{path}:"
    assert errors.startswith(f"guard-gateway: {place}")
    assert remedy in errors
    assert " -- " in errors
    assert errors.count("\n") == 1
    assert "pass@" not in errors


def serve(*argv: Any) -> list[str]:
    return ["serve", "--port", "0", *map(str, argv)]


@pytest.mark.parametrize(
    ("argv", "text", "words"),
    [
        (serve(), "", ["--upstream"]),
        (serve("--upstream", "api.example.com"), "", ["http"]),
        (serve("--upstream", "http://user:secret@x"), "", ["headers_from_env"]),
        (serve("--upstream", "http://127.0.0.1:1", "--host", "256.0.0.1"), "", ["256.0.0.1", "--host"]),
        (["serve", "--upstream", "http://127.0.0.1:1", "--port", "70000"], "", ["70000", "--port"]),
        (
            serve("--upstream", "http://127.0.0.1:1"),
            "upstream: {headers_from_env: {authorization: NOT_SET_ANYWHERE}}",
            ["NOT_SET_ANYWHERE"],
        ),
        (serve("--upstream", "http://127.0.0.1:1"), "audit: {path: /nonexistent/decisions.jsonl}", ["decision log"]),
    ],
)
def test_what_cannot_work_is_said_before_anything_starts(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, argv: list[str], text: str, words: list[str]
) -> None:
    path = tmp_path / "guard.yaml"
    path.write_text(f"{text}\nworker: {{socket: /tmp/nobody.sock, manage: false}}\n")
    status, out, errors = run(capsys, *argv, "--config", str(path))
    assert (status, out) == (2, "")
    assert all(word in errors for word in words)
    assert "secret" not in errors
    assert errors.count("\n") == 1


def test_a_file_that_is_not_there_is_said(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status, _, errors = run(capsys, *serve("--config", tmp_path / "no.yaml", "--upstream", "http://127.0.0.1:1"))
    assert status == 2
    assert "no.yaml" in errors
    assert "--config" in errors


def test_a_worker_that_cannot_start_ends_serve_with_its_last_words(tmp_path: Path) -> None:
    path = tmp_path / "guard.yaml"
    path.write_text(f"worker: {{model: {tmp_path}/no-such-model}}\n")
    argv = [*command(), *serve("--config", path, "--upstream", "http://127.0.0.1:1")]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert "exited before it was ready" in done.stderr
    assert "no-such-model" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_gateway_needs_no_torch() -> None:
    code = (
        "import sys, guard_middleware.cli; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
