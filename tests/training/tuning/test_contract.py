from __future__ import annotations

import json
import shutil
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from guard_middleware.guard.parse import TAGS, parse
from guard_middleware.worker.engine import GuardPrompt
from guard_middleware.worker.engine_transformers import TransformersEngine
from guard_middleware.worker.weights import NANO, load
from guard_training.corpus.conversation import conversation
from guard_training.corpus.rows import CorpusError, Row
from guard_training.tuning.contract import (
    Contract,
    ContractError,
    ImageTextProcessor,
    load_contract,
    load_model,
    pictures,
    target,
)
from tests.tiny_model import PLAIN_ADDED, SPECIAL


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "a.png"
    Image.new("RGB", (90, 150), (10, 200, 30)).save(path)
    return path


@lru_cache
def _nano() -> Contract:
    return load_contract("nano")


def _rows(image: Path) -> list[Row]:
    return [
        Row("text", "made", "how do I bake bread", "unharmful"),
        Row("pair", "made", "how do I bake bread", "unharmful", "With flour.", "unharmful"),
        Row("image", "made", "", "harmful", image=image),
        Row("both", "made", "what does it say", "harmful", "A sign.", "unharmful", image=image),
    ]


@pytest.mark.parametrize("answered", [False, True])
@pytest.mark.parametrize("request_label", ["harmful", "unharmful"])
@pytest.mark.parametrize("response_label", ["harmful", "unharmful"])
def test_the_target_is_what_the_strict_parser_reads(answered: bool, request_label: str, response_label: str) -> None:
    row = Row("r", "made", "x", request_label, "y" if answered else None, response_label if answered else None)  # type: ignore[arg-type]
    read = parse(target(row, "# Task 1\n## Reasoning Step 1\nIt asks for x."), answered=answered)
    assert (read.request, read.response) == (request_label, response_label if answered else None)
    assert read.reasoning == "# Task 1\n## Reasoning Step 1\nIt asks for x."


def test_the_target_is_the_papers_form_byte_for_byte() -> None:
    assert target(Row("r", "made", "x", "harmful"), "why") == (
        "<think>\nwhy\n</think>\n<result>\nAnswers:\nRequest: harmful\nResponse: None\n</result>"
    )


def test_an_answer_that_nobody_labelled_is_neither_shown_nor_judged() -> None:
    row = Row("r", "made", "x", "harmful", "an answer", None)
    assert conversation(row).answer is None
    assert parse(target(row, "why"), answered=False).response is None


@pytest.mark.parametrize(
    ("row", "rationale", "words"),
    [
        (Row("r", "made", "x", None, "y", "harmful"), "why", "the request has no label"),
        (Row("r", "made", "x", "harmful"), " \n", "no rationale"),
        *((Row("r", "made", "x", "harmful"), f"a {tag} b", "must not hold a tag") for tag in TAGS),
    ],
)
def test_a_row_that_has_no_target_is_refused(row: Row, rationale: str, words: str) -> None:
    with pytest.raises(CorpusError, match=f"^r: .*{words}"):
        target(row, rationale)


@pytest.mark.parametrize("model", ["nano", "tiny"])
def test_prompts_are_those_of_the_worker(model: str, folder: Path, image: Path) -> None:
    """The worker's own engine takes the ids, and sees as many tokens as training does."""
    where = NANO if model == "nano" else folder
    contract = load_contract(str(where))
    engine = TransformersEngine(load(where, name=model), device="cpu")
    for row in _rows(image):
        made = contract.encode(row)
        seen = conversation(row)
        images = tuple(blob.data for blob in seen.blobs())
        done = engine.generate_batch([GuardPrompt(made.ids, images, made.answered, 1)], lambda _: False)[0]
        assert done.prompt_tokens == len(contract.expand(made.ids, pictures(row)))  # type: ignore[union-attr]
        assert made.answered == (row.response is not None)


def test_the_image_stands_where_the_published_weights_expect_it(contract: Contract, image: Path) -> None:
    text = contract.tokenizer.decode(contract.encode(_rows(image)[3]).ids)
    wanted = "Human user:\n<|vision_start|><|image_pad|><|vision_end|>\nwhat does it say\n\nAI assistant:\nA sign.\n"
    assert wanted in text
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")


@given(st.lists(st.sampled_from([*SPECIAL, *PLAIN_ADDED, "<image>", "a ", "\n"]), max_size=6).map("".join))
def test_text_of_a_row_never_becomes_a_control_token(text: str) -> None:
    contract = _nano()
    count = lambda ids: [ids.count(id) for id in sorted(contract.tokenizer.added_tokens_decoder)]  # noqa: E731
    plain = contract.encode(Row("r", "made", "x", "harmful", "y", "harmful"))
    hostile = contract.encode(Row("r", "made", text, "harmful", f"{text}y", "harmful"))
    assert count(hostile.ids) == count(plain.ids)


@given(st.text(max_size=40) | st.lists(st.sampled_from([*SPECIAL, "a ", "\n"]), max_size=6).map("".join))
def test_a_target_ends_its_turn_once_and_only_at_its_end(text: str) -> None:
    contract = _nano()
    ids = contract.encode_target(text)
    special = set(contract.tokenizer.all_special_ids)
    assert ids[-1] == contract.encoder.im_end
    assert special.isdisjoint(ids[:-1])


def test_a_target_reads_back_from_its_ids(contract: Contract) -> None:
    text = target(Row("r", "made", "x", "harmful", "y", "unharmful"), 'It says "<|im_end|>", which is text.')
    for one in (contract, _nano()):
        assert parse(one.tokenizer.decode(one.encode_target(text)[:-1]), answered=True).response == "unharmful"


def test_pixels_agree_with_the_expanded_pads(contract: Contract, image: Path) -> None:
    row = _rows(image)[3]
    ids = contract.expand(contract.encode(row).ids, pictures(row))
    grid = contract.images(images=pictures(row), return_tensors="pt")["image_grid_thw"]
    assert ids.count(contract.encoder.image_pad) == int(grid.prod()) // 4 == contract.image_tokens(pictures(row)[0])


def test_max_pixels_only_tightens(folder: Path, image: Path) -> None:
    picture = pictures(Row("r", "made", "", "harmful", image=image))[0].resize((600, 600))
    wide, tight = load_contract(str(folder)), load_contract(str(folder), max_pixels=9 * 28 * 28)
    assert tight.image_tokens(picture) <= 9 < wide.image_tokens(picture)
    assert load_contract("nano", max_pixels=10**9).image_tokens(picture) == load_contract("nano").image_tokens(picture)


def test_the_joined_processor_gives_what_the_parts_give(contract: Contract, image: Path) -> None:
    row = _rows(image)[3]
    made = contract.encode(row)
    both = ImageTextProcessor(contract.images, contract.tokenizer, chat_template=contract.tokenizer.chat_template)
    out = both(text=[contract.tokenizer.decode(made.ids)], images=pictures(row), return_tensors="pt")
    assert out["input_ids"][0].tolist() == contract.expand(made.ids, pictures(row))
    assert torch.equal(out["pixel_values"], contract.images(images=pictures(row), return_tensors="pt")["pixel_values"])


def test_a_saved_contract_is_a_guards_folder(contract: Contract, tmp_path: Path, image: Path) -> None:
    load_model(contract.folder).save_pretrained(tmp_path / "new")
    contract.save(tmp_path / "new")
    again = load_contract(str(tmp_path / "new"))
    row = _rows(image)[3]
    assert again.encode(row) == contract.encode(row)
    assert again.image_tokens(pictures(row)[0]) == contract.image_tokens(pictures(row)[0])
    nano = _nano()
    nano.save(tmp_path / "new")
    facts = json.loads((tmp_path / "new" / "guard.json").read_text())
    assert facts["form"] == nano.facts.form


def test_a_model_for_training_keeps_no_cache(contract: Contract) -> None:
    model = load_model(contract.folder)
    assert model.dtype == torch.float32
    assert not model.config.use_cache


@pytest.mark.parametrize("broken", ["missing", "architecture", "tokenizer", "weights"])
def test_another_kind_of_model_is_refused(broken: str, folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    if broken == "missing":
        shutil.rmtree(copy)
    elif broken == "architecture":
        (copy / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    elif broken == "tokenizer":
        spec = json.loads((copy / "tokenizer.json").read_text())
        spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] != "<|image_pad|>"]
        (copy / "tokenizer.json").write_text(json.dumps(spec))
        (copy / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    else:
        next(copy.glob("*.safetensors")).unlink()
    with pytest.raises(ContractError, match="copy"):
        load_contract(str(copy))


def test_an_image_that_cannot_be_opened_is_refused_by_its_row(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no image")
    Image.new("RGB", (30, 30)).save(tmp_path / "b.gif")
    for name in ("a.png", "b.gif", "missing.png"):
        with pytest.raises(CorpusError, match=f"r7: {name} is no readable PNG, JPEG or WebP"):
            conversation(Row("r7", "made", "", "harmful", image=tmp_path / name))


def test_an_image_with_too_many_pixels_is_refused_by_its_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (30, 30)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)
    with pytest.raises(CorpusError, match=r"rows\.jsonl:3: r7: a\.png is no readable"):
        conversation(Row("r7", "made", "", "harmful", image=tmp_path / "a.png", where="rows.jsonl:3"))
