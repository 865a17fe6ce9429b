"""``--model`` names a guard or says what is wrong; the facts of serving come from the folder."""

from __future__ import annotations

import json
import shutil

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from guard_middleware.errors import ConfigError
from guard_middleware.worker import weights
from guard_middleware.worker.weights import ARCHITECTURE, ModelFacts, load, resolve, serving


@pytest.fixture
def folder(tmp_path):
    """What the loader looks at, without real weights."""
    made = tmp_path / "guard"
    made.mkdir()
    (made / "config.json").write_text(json.dumps({"architectures": [ARCHITECTURE]}))
    (made / "model.safetensors").write_bytes(b"weights")
    (made / "tokenizer.json").write_text("{}")
    return made


def guard_json(folder, value):
    (folder / "guard.json").write_text(value if isinstance(value, str) else json.dumps(value))


def test_published_weights_have_no_facts_of_their_own(tiny_folder):
    facts = resolve(str(tiny_folder)).facts
    assert facts == ModelFacts(name="tiny", revision=facts.revision)
    assert (facts.reader, facts.window_tokens) == (False, None)


def test_facts_are_read_from_guard_json(folder):
    guard_json(folder, {"name": "nano", "reader": True, "window_tokens": 512, "max_new_tokens": 160})
    facts = resolve(str(folder)).facts
    assert facts == ModelFacts("nano", facts.revision, reader=True, window_tokens=512, max_new_tokens=160)


@pytest.mark.parametrize(
    ("file", "content", "another"),
    [
        ("model.safetensors", "other weights", True),
        ("model-2.safetensors", "more weights", True),
        ("tokenizer.json", '{"added_tokens": []}', True),
        ("config.json", json.dumps({"architectures": [ARCHITECTURE], "note": 1}), True),
        ("generation_config.json", '{"eos_token_id": 7}', True),
        ("preprocessor_config.json", '{"patch_size": 28}', True),
        ("guard.json", '{"max_pixels": 3136}', True),
        ("calibration.json", "{}", False),  # named by itself, in the revision of a verdict
        ("README.md", "# A card", False),
    ],
)
def test_the_revision_is_a_digest_of_the_files_that_decide_a_verdict(folder, file, content, another):
    before = load(folder, name="a").facts.revision
    assert before == load(folder, name="b").facts.revision
    assert len(before) == 16
    (folder / file).write_text(content)
    assert (load(folder, name="a").facts.revision != before) == another


def test_what_an_operator_changes_of_the_serving_has_a_name_and_nothing_has_none():
    changes = [{}, {"reader": True}, {"reader": False}, {"dtype": "float16"}, {"dtype": "float16", "reader": True}]
    names = [serving(one) for one in changes]
    assert len(set(names)) == len(changes)
    assert [len(name) for name in names] == [0, 8, 8, 8, 8]
    assert serving({"reader": True, "dtype": "float16"}) == names[-1]


def test_nano_is_the_guard_in_the_package(folder, monkeypatch):
    monkeypatch.setattr(weights, "NANO", folder)
    found = resolve("nano")
    assert (found.folder, found.facts.name) == (folder, "nano")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"window": 512}, "unknown key 'window'"),
        ({"revision": "7"}, "unknown key 'revision'"),
        ({"reader": "yes"}, "reader must be a bool"),
        ({"reader": 1}, "reader must be a bool"),
        ({"max_new_tokens": "160"}, "max_new_tokens must be a positive integer"),
        ({"max_new_tokens": 0}, "max_new_tokens must be a positive integer"),
        ({"max_new_tokens": True}, "max_new_tokens must be a positive integer"),
        ({"max_new_tokens": None}, "max_new_tokens must be a positive integer"),
        ({"name": ""}, "name must be a str"),
        ({"window_tokens": 100, "window_overlap": 60}, "window_overlap must be at most half"),
        ([], "must hold a JSON object"),
        ("{", "cannot be read as JSON"),
    ],
)
def test_a_wrong_guard_json_is_refused_with_its_place(folder, value, message):
    guard_json(folder, value)
    with pytest.raises(ConfigError, match=message) as caught:
        load(folder, name="x")
    assert caught.value.path == str(folder / "guard.json")


def test_null_window_means_no_window(folder):
    guard_json(folder, {"window_tokens": None})
    assert load(folder, name="x").facts.window_tokens is None


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "tokenizer.json"])
def test_an_incomplete_folder_is_refused(folder, missing):
    (folder / missing).unlink()
    with pytest.raises(ConfigError):
        resolve(str(folder))


@pytest.mark.parametrize("architectures", [["LlamaForCausalLM"], None, []])
def test_another_architecture_is_refused(folder, architectures):
    (folder / "config.json").write_text(json.dumps({"architectures": architectures}))
    with pytest.raises(ConfigError, match="is no guard of this kind") as caught:
        resolve(str(folder))
    assert ARCHITECTURE in caught.value.remedy


@pytest.mark.parametrize("name", ["nowhere", "./nowhere", "/nowhere/at/all", "a/b/c"])
def test_what_is_neither_folder_nor_hub_id_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="no such folder"):
        resolve(name)


COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_a_hub_id_is_its_snapshot_and_its_commit(folder, tmp_path, monkeypatch):
    commit = tmp_path / "models--someone--guard-3b" / "snapshots" / COMMIT
    shutil.copytree(folder, commit)
    asked = []

    def snapshot_download(model, **options):
        asked.append(model)
        return str(commit)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    found = resolve("someone/guard-3b")
    assert asked == ["someone/guard-3b"]
    assert (found.facts.name, found.facts.revision) == ("someone/guard-3b", COMMIT)


@pytest.mark.parametrize(
    "place", ["snapshots/latest", f"snapshots/{COMMIT}", "models--a--b/snapshots/main", f"models--a--b/refs/{COMMIT}"]
)
def test_a_folder_that_only_looks_like_a_snapshot_is_named_by_its_files(folder, tmp_path, place):
    shutil.copytree(folder, tmp_path / place)
    assert load(tmp_path / place, name="a").facts.revision == load(folder, name="a").facts.revision


def test_offline_says_how_to_get_the_weights(monkeypatch):
    def snapshot_download(model, **options):
        raise LocalEntryNotFoundError("not in the cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(ConfigError, match="hf download someone/guard-3b"):
        resolve("someone/guard-3b")


def test_a_hub_id_of_the_wrong_form_is_refused():
    with pytest.raises(ConfigError, match="is no hub id"):
        resolve("some one/guard!")
