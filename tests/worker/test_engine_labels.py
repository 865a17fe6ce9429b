"""Verdicts without reasoning on the transformers engine: one prefill, the model's own probabilities, never a reason."""

from __future__ import annotations

import dataclasses
import io

import pytest
from PIL import Image

torch = pytest.importorskip("torch")

from guard_middleware.errors import GuardError, GuardErrorKind  # noqa: E402
from guard_middleware.guard.parse import parse  # noqa: E402
from guard_middleware.guard.prompt import expand_images, render  # noqa: E402
from guard_middleware.types import Blob, Conversation, Message, Text  # noqa: E402
from guard_middleware.worker.engine import GuardPrompt  # noqa: E402
from guard_middleware.worker.engine_transformers import TransformersEngine  # noqa: E402
from guard_middleware.worker.weights import resolve  # noqa: E402

START = "<think>\n\n</think>\n<result>\nAnswers:\nRequest:"
DECIDE = {
    name: {"decide": name, "harmful": [" harmful"], "unharmful": [" unharmful"]} for name in ("request", "response")
}
BRIEF = [{"one_of": ["A"]}, {"one_of": ["B"]}, DECIDE["request"]]
FORM = {"unanswered": [DECIDE["request"], {"one_of": ["a"]}], "answered": [*DECIDE.values(), {"one_of": ["a"]}]}
LABEL_FORM = {
    "label_unanswered": [*BRIEF, {"one_of": ["C"]}, {"one_of": ["D"]}],
    "label_answered": [*BRIEF, {"one_of": ["C"]}, {"one_of": ["c"]}, DECIDE["response"], {"one_of": ["D"]}],
}


def engine_of(folder, form=None):
    weights = resolve(str(folder))
    return TransformersEngine(
        dataclasses.replace(weights, facts=dataclasses.replace(weights.facts, form=form)), device="cpu"
    )


@pytest.fixture(scope="module")
def plain(tiny_folder):
    return engine_of(tiny_folder)


@pytest.fixture(scope="module")
def formed(tiny_folder):
    return engine_of(tiny_folder, {**FORM, **LABEL_FORM})


@pytest.fixture
def labelling(plain):
    """The model is sure that a label comes next; which one is its own affair."""
    labels = [ids[0] for ids in plain._words.labels]

    def surer(module, inputs, logits):
        logits = logits.clone()
        logits[..., labels] += 100.0
        return logits

    handle = plain._model.lm_head.register_forward_hook(surer)
    yield plain
    handle.remove()


@pytest.fixture
def passes(plain, formed):
    """(rows, tokens) of each pass through the language model."""
    seen = []

    def note(module, inputs, kwargs, output):
        seen.append(tuple(output.last_hidden_state.shape[:2]))

    handles = [
        engine._model.model.language_model.register_forward_hook(note, with_kwargs=True) for engine in (plain, formed)
    ]
    yield seen
    for handle in handles:
        handle.remove()


def png(colour="teal"):
    out = io.BytesIO()
    Image.new("RGB", (90, 60), colour).save(out, "PNG")
    return out.getvalue()


def prompt(engine, text="how do I pick a lock", images=(), answer=None, think=False):
    parts = (*(Blob("image/png", data) for data in images), Text(text))
    reply = None if answer is None else Message("assistant", (Text(answer),))
    encoded = engine.encoder.encode(render(Conversation((Message("user", parts),), answer=reply)))
    return GuardPrompt(tuple(encoded.ids), tuple(images), encoded.answered, 12, think)


def never(row):
    return False


def odds(engine, one, written):
    """The probability of harmful after ``written``, by the model's plain forward pass."""
    counts = [engine.image_tokens(image) for image in one.images]
    after = engine._tokenizer.encode(written, add_special_tokens=False).ids
    ids = torch.tensor([[*expand_images(one.ids, counts, engine.encoder.image_pad), *after]])
    inputs = {"mm_token_type_ids": (ids == engine.encoder.image_pad).int()}
    if one.images:
        pictures = [Image.open(io.BytesIO(image)).convert("RGB") for image in one.images]
        inputs |= dict(engine._processor(images=pictures, return_tensors="pt"))
    with torch.inference_mode():
        logits = engine._model(input_ids=ids, **inputs).logits[0, -1]
    harmful, unharmful = (logits[label[0]] for label in engine._words.labels)
    return torch.sigmoid(harmful - unharmful).item()


CASES = [{"text": "hello"}, {"text": "how do I pick a lock " * 9}, {"images": (png(),)}]
ANSWERED = [{**case, "answer": answer} for case, answer in zip(CASES, ("turn it", "no", "a plain one"), strict=True)]


@pytest.mark.parametrize("case", [*CASES, *ANSWERED], ids=str)
def test_the_scores_are_the_models_own_after_an_empty_reasoning(labelling, case):
    one = prompt(labelling, **case)
    (found,) = labelling.generate_batch([one], never)
    said = parse(found.text, answered=one.answered)
    assert said.reasoning == ""
    assert found.text.startswith(START)
    assert found.request_score == pytest.approx(odds(labelling, one, START), abs=1e-5)
    assert (found.request_score > 0.5) == (said.request == "harmful")
    if one.answered:
        before = f"{START} {said.request}\nResponse:"
        assert found.response_score == pytest.approx(odds(labelling, one, before), abs=1e-5)
        assert (found.response_score > 0.5) == (said.response == "harmful")
    else:
        assert found.response_score is None


def test_a_label_is_one_prefill_and_an_answer_one_step_more(labelling, formed, passes):
    start = len(labelling._words.start)
    for engine, fixed in ((labelling, start), (formed, 2)):
        del passes[:]
        one = prompt(engine)
        (found,) = engine.generate_batch([one], never)
        assert passes == [(1, len(one.ids) + fixed)]
        assert (found.prompt_tokens, found.completion_tokens, found.reasoning_tokens) == (len(one.ids) + fixed, 1, 0)
        del passes[:]
        (found,) = engine.generate_batch([prompt(engine, answer="turn it")], never)
        assert (len(passes), found.completion_tokens) == (2, 2)


def test_a_mixed_batch_writes_what_each_prompt_writes_alone(labelling, formed):
    for engine in (labelling, formed):
        prompts = [prompt(engine, **case, think=think) for think in (False, True) for case in (*CASES, *ANSWERED)]
        together = engine.generate_batch(prompts, never)
        for one, found in zip(prompts, together, strict=True):
            (alone,) = engine.generate_batch([one], never)
            assert (found.text, found.finish, found.completion_tokens) == (
                alone.text, alone.finish, alone.completion_tokens,
            )  # fmt: skip
            for side in ("request_score", "response_score"):
                assert getattr(found, side) == pytest.approx(getattr(alone, side), abs=1e-5)


def test_a_model_that_would_write_something_else_has_no_label_to_give(plain):
    (found,) = plain.generate_batch([prompt(plain)], never)
    with pytest.raises(GuardError) as error:
        parse(found.text, answered=False)
    assert error.value.kind is GuardErrorKind.UNPARSEABLE
    assert found.request_score is None


def test_a_form_gives_its_own_words_around_the_labels(formed):
    request, answer = formed.generate_batch([prompt(formed), prompt(formed, answer="turn it")], never)
    assert request.text in ("AB harmfulCD", "AB unharmfulCD")
    assert answer.text in {f"AB {a}Cc {b}D" for a in ("harmful", "unharmful") for b in ("harmful", "unharmful")}
    assert (request.response_score, answer.finish) == (None, "stop")


def test_a_form_without_label_parts_judges_with_reasoning_only_and_says_so(tiny_folder):
    engine = engine_of(tiny_folder, FORM)
    refused, judged = engine.generate_batch([prompt(engine), prompt(engine, think=True)], never)
    assert isinstance(refused, GuardError)
    assert refused.kind is GuardErrorKind.UNSUPPORTED
    assert "mode reason" in refused.message
    assert judged.finish == "stop"


def test_a_cancelled_label_leaves_the_batch(labelling):
    prompts = [prompt(labelling, **case) for case in ANSWERED]
    outcomes = labelling.generate_batch(prompts, lambda row: row == 1)
    expected = labelling.generate_batch(prompts, never)
    assert isinstance(outcomes[1], GuardError)
    assert [outcomes[n].text for n in (0, 2)] == [expected[n].text for n in (0, 2)]
