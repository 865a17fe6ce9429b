"""The engine on random weights: loading, images, batches, cancellation, budgets, scores."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil

import pytest
from PIL import Image

torch = pytest.importorskip("torch")

from guard_middleware.errors import ConfigError, GuardError, GuardErrorKind  # noqa: E402
from guard_middleware.guard.parse import completion, parse  # noqa: E402
from guard_middleware.guard.prompt import expand_images, render  # noqa: E402
from guard_middleware.types import Blob, Conversation, Message, Text  # noqa: E402
from guard_middleware.worker.engine import BatchEngine, Generation, GuardPrompt  # noqa: E402
from guard_middleware.worker.engine_transformers import TransformersEngine  # noqa: E402
from guard_middleware.worker.weights import load, resolve  # noqa: E402


@pytest.fixture(scope="module")
def engine(tiny_folder):
    return TransformersEngine(resolve(str(tiny_folder)), device="cpu")


@pytest.fixture
def scripted(engine, monkeypatch):
    """Makes the model write given texts, one per row: every logit is 0, and the next token's is 5."""
    rows, outputs, prepare = [], [], engine._prepare

    def remember(index, prompt):
        row, images = prepare(index, prompt)
        rows.append(row)
        return row, images

    def overrule(module, inputs, logits):
        logits = torch.zeros_like(logits)
        for n, row in enumerate(row for row in rows if row.finish is None):
            logits[n, outputs[row.index][len(row.written)]] = 5.0
        return logits

    def script(*texts):
        for text in texts:
            outputs.append([*engine._tokenizer.encode(text, add_special_tokens=False).ids, engine.encoder.im_end])

    monkeypatch.setattr(engine, "_prepare", remember)
    handle = engine._model.lm_head.register_forward_hook(overrule)
    yield script
    handle.remove()


def png(size=(90, 60), colour="teal"):
    out = io.BytesIO()
    Image.new("RGB", size, colour).save(out, "PNG")
    return out.getvalue()


def prompt(engine, text="how do I pick a lock", images=(), answer=None, budget=12):
    parts = (*(Blob("image/png", data) for data in images), Text(text))
    reply = None if answer is None else Message("assistant", (Text(answer),))
    encoded = engine.encoder.encode(render(Conversation((Message("user", parts),), answer=reply)))
    return GuardPrompt(tuple(encoded.ids), tuple(images), encoded.answered, budget)


def never(row):
    return False


def test_it_is_a_batch_engine(engine):
    checked: BatchEngine = engine
    assert checked.max_batch == 8
    assert engine.facts.name == "tiny"


MIXED = [
    {"text": "hello"},
    {"text": "how do I pick a lock " * 12},
    {"images": (png(),)},
    {"text": "compare", "images": (png(), png((200, 40), "red")), "answer": "both are plain"},
]


def test_a_mixed_batch_writes_what_each_prompt_writes_alone(engine):
    prompts = [prompt(engine, **case) for case in MIXED]
    together = engine.generate_batch(prompts, never)
    alone = [engine.generate_batch([one], never)[0] for one in prompts]
    assert together == alone
    assert all(isinstance(one, Generation) and one.completion_tokens for one in alone)


def test_the_loop_writes_what_generate_writes(engine):
    for case in MIXED:
        one = prompt(engine, **case)
        (found,) = engine.generate_batch([one], never)
        counts = [engine.image_tokens(image) for image in one.images]
        ids = torch.tensor([expand_images(one.ids, counts, engine.encoder.image_pad)])
        inputs = {"mm_token_type_ids": (ids == engine.encoder.image_pad).int()}
        if one.images:
            pictures = [Image.open(io.BytesIO(image)).convert("RGB") for image in one.images]
            inputs |= dict(engine._processor(images=pictures, return_tensors="pt"))
        written = engine._model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12, **inputs
        )[0, ids.shape[1] :].tolist()
        assert found.text == engine._tokenizer.decode(written)


def test_the_picture_changes_what_is_seen(engine):
    rows = [engine._prepare(0, prompt(engine, images=(png(colour=colour),))) for colour in ("black", "white")]
    from transformers import DynamicCache

    config = engine._model.config.get_text_config()
    with torch.inference_mode():
        seen = [engine._prefill([row], pixels, DynamicCache(config=config))[0][:, -1] for row, pixels in rows]
    assert not torch.allclose(*seen)


def test_image_tokens_are_counted_as_they_are_fed(engine):
    image = png((500, 120))
    one = prompt(engine, images=(image,))
    (found,) = engine.generate_batch([one], never)
    assert found.prompt_tokens == len(one.ids) - 1 + engine.image_tokens(image)


def test_large_images_are_scaled_to_the_guards_limit(tiny_folder):
    weights = load(tiny_folder, name="x")
    facts = dataclasses.replace(weights.facts, max_pixels=16 * 28 * 28)
    small = TransformersEngine(dataclasses.replace(weights, facts=facts), device="cpu")
    assert small.image_tokens(png((3000, 3000))) <= 16
    (found,) = small.generate_batch([prompt(small, images=(png((3000, 3000)),))], never)
    assert isinstance(found, Generation)


def test_the_budget_ends_an_output(engine):
    (found,) = engine.generate_batch([prompt(engine, budget=5)], never)
    assert (found.finish, found.completion_tokens, found.reasoning_tokens) == ("length", 5, 5)


def test_a_bad_image_fails_its_own_row_only(engine):
    bad = dataclasses.replace(prompt(engine, images=(png(),)), images=(b"no image",))
    cut = dataclasses.replace(bad, images=(png((300, 300))[:200],))
    long = dataclasses.replace(prompt(engine), ids=(1,) * 9000)
    good = prompt(engine)
    outcomes = engine.generate_batch([bad, good, cut, long], never)
    kinds = [one.kind if isinstance(one, GuardError) else None for one in outcomes]
    assert kinds == [GuardErrorKind.MEDIA, None, GuardErrorKind.MEDIA, GuardErrorKind.TOO_LONG]
    assert outcomes[1] == engine.generate_batch([good], never)[0]


def test_a_cancelled_row_leaves_the_batch_and_the_others_go_on(engine):
    asked = []

    def cancelled(row):
        asked.append(row)
        return row == 1 and asked.count(1) > 2

    prompts = [prompt(engine, **case) for case in MIXED]
    outcomes = engine.generate_batch(prompts, cancelled)
    assert isinstance(outcomes[1], GuardError)
    assert asked.count(1) == 3
    expected = engine.generate_batch(prompts, never)
    assert [outcomes[n] for n in (0, 2, 3)] == [expected[n] for n in (0, 2, 3)]


def test_a_batch_that_nobody_waits_for_ends_at_once(engine):
    outcomes = engine.generate_batch([prompt(engine, budget=1000)] * 2, lambda row: True)
    assert [type(one) for one in outcomes] == [GuardError, GuardError]


@pytest.mark.parametrize("after", ["", " and more that nobody reads"])
def test_an_output_ends_with_its_result(engine, scripted, after):
    text = completion("steps", "harmful", "unharmful")
    scripted(text + after)
    (found,) = engine.generate_batch([prompt(engine, answer="you turn it", budget=200)], never)
    assert found.text.startswith(text)
    assert "more" not in found.text
    assert found.finish == "stop"
    thought = text[: text.index("</think>") + len("</think>")]
    assert found.reasoning_tokens == len(engine._tokenizer.encode(thought, add_special_tokens=False).ids)
    assert parse(found.text, answered=True).request == "harmful"


def test_scores_are_read_where_the_labels_are_written(engine, scripted):
    scripted(completion("Request: unharmful\nResponse: unharmful", "harmful", "unharmful"))
    (found,) = engine.generate_batch([prompt(engine, answer="you turn it", budget=200)], never)
    high, low = torch.sigmoid(torch.tensor([5.0, -5.0])).tolist()
    assert found.request_score == pytest.approx(high)
    assert found.response_score == pytest.approx(low)


def test_without_an_answer_there_is_no_response_score(engine, scripted):
    scripted(completion("steps", "unharmful", None))
    (found,) = engine.generate_batch([prompt(engine, budget=200)], never)
    assert found.request_score < 0.1
    assert found.response_score is None


def test_a_quoted_end_of_result_does_not_end_the_reasoning(engine, scripted):
    text = completion("steps", "harmful", None).replace("steps", "it says </result> here")
    scripted(text)
    (found,) = engine.generate_batch([prompt(engine, budget=200)], never)
    assert found.text == text


def test_rows_end_one_by_one(engine, scripted):
    texts = [completion(steps, "harmful", None) for steps in ("a b c d e f", "a", "a b c")]
    scripted(*texts)
    outcomes = engine.generate_batch([prompt(engine, budget=200)] * 3, never)
    assert [one.text for one in outcomes] == texts


def test_labels_that_begin_alike_are_refused(tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "alike")
    spec = json.loads((folder / "tokenizer.json").read_text())
    spec["model"]["merges"] = []
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(ConfigError, match="labels begin with the same token"):
        TransformersEngine(resolve(str(folder)), device="cpu")


def test_broken_weights_are_a_configuration_error(tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "broken")
    (folder / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        TransformersEngine(resolve(str(folder)), device="cpu")
