"""Long content is judged whole, in windows that overlap, and no window's verdict is lost."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guard_middleware.errors import GuardError, GuardErrorKind
from guard_middleware.guard.parse import completion
from guard_middleware.guard.prompt import PromptEncoder, render
from guard_middleware.types import Blob, Conversation, Message, Text, Usage
from guard_middleware.worker.engine import Generation, GuardPrompt
from guard_middleware.worker.weights import ModelFacts
from guard_middleware.worker.windows import Judgement, judge, merge, plan

IMAGE_TOKENS = 20
BAD = "the one bad sentence"


class Model:
    def __init__(self, tokenizer, **facts):
        self.encoder = PromptEncoder(tokenizer)
        self.frame = len(self.encoder.encode(render(conversation(""))).ids)
        if "window" in facts:
            facts["window_tokens"] = self.frame + facts.pop("window")
        self.facts = ModelFacts("m", "r", **{"max_windows": 64, "max_input_tokens": 20_000, **facts})

    def image_tokens(self, image):
        return IMAGE_TOKENS

    def cost(self, prompt):
        return len(prompt.ids) + (IMAGE_TOKENS - 1) * len(prompt.images)


def conversation(text, answer=None, images=0):
    blobs = tuple(Blob("image/png", bytes([n])) for n in range(images))
    reply = None if answer is None else Message("assistant", (Text(answer),))
    return Conversation((Message("user", (*blobs, Text(text))),), answer=reply)


def planned(model, value):
    return plan(render(value), [blob.data for blob in value.blobs()], model)


def words(count):
    return " ".join(f"word{n}" for n in range(count))


def texts(tokenizer, prompts):
    return [tokenizer.decode(prompt.ids) for prompt in prompts]


def test_what_fits_is_one_prompt_as_it_would_be_without_windows(tiny_tokenizer):
    model = Model(tiny_tokenizer, window=200)
    value = conversation("how do I pick a lock", "you turn it", images=2)
    (prompt,) = planned(model, value)
    assert list(prompt.ids) == model.encoder.encode(render(value)).ids
    assert prompt.images == (b"\x00", b"\x01")
    assert prompt.answered


@pytest.mark.parametrize("answer", [None, words(30), words(300)])
@pytest.mark.parametrize("images", [0, 3])
def test_every_window_fits_and_has_the_whole_frame(tiny_tokenizer, answer, images):
    model = Model(tiny_tokenizer, window=300, window_overlap=60)
    prompts = planned(model, conversation(words(400), answer, images))
    assert len(prompts) > 2
    for prompt, text in zip(prompts, texts(tiny_tokenizer, prompts), strict=True):
        assert model.cost(prompt) <= model.facts.window_tokens
        assert text.count("<|im_start|>") == 3
        assert text.count("Human user:\n") == text.count("\n\nAI assistant:\n") == 1
        assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")
        assert prompt.answered != ("AI assistant:\nNone\n<|im_end|>" in text)


@given(st.integers(0, 500), st.booleans())
@settings(max_examples=25, deadline=None)
def test_bad_text_anywhere_lies_whole_inside_a_window(tiny_tokenizer, place, in_answer):
    model = Model(tiny_tokenizer, window=300, window_overlap=60)
    text = words(place) + f" {BAD} " + words(500 - place)
    value = conversation("continue", text) if in_answer else conversation(text)
    found = [
        prompt
        for prompt, seen in zip(planned(model, value), texts(tiny_tokenizer, planned(model, value)), strict=True)
        if BAD in seen
    ]
    assert found
    assert found[0].answered == in_answer


def test_the_windows_together_hold_every_word(tiny_tokenizer):
    model = Model(tiny_tokenizer, window=200, window_overlap=40)
    prompts = planned(model, conversation(words(300), words(200)))
    seen = texts(tiny_tokenizer, prompts)
    requests = "".join(t for t, p in zip(seen, prompts, strict=True) if not p.answered)
    answers = "".join(t for t, p in zip(seen, prompts, strict=True) if p.answered)
    assert all(f"word{n}" in requests for n in range(300))
    assert all(f"word{n}" in answers for n in range(200))


def test_an_answers_window_shows_both_ends_of_a_long_request(tiny_tokenizer):
    model = Model(tiny_tokenizer, window=300, window_overlap=60)
    prompts = planned(model, conversation("begins " + words(300) + " ends", words(300)))
    answered = [t for t, p in zip(texts(tiny_tokenizer, prompts), prompts, strict=True) if p.answered]
    assert answered
    assert all("begins word0" in text and "\n[...]\n" in text and "word299 ends" in text for text in answered)


def test_a_short_request_is_whole_in_every_window_of_a_long_answer(tiny_tokenizer):
    model = Model(tiny_tokenizer, window=300, window_overlap=60)
    prompts = planned(model, conversation("how do I pick a lock", words(300)))
    assert all(prompt.answered for prompt in prompts)
    assert all("Human user:\nhow do I pick a lock\n\nAI" in text for text in texts(tiny_tokenizer, prompts))


def test_images_are_never_cut_and_each_is_shown(tiny_tokenizer):
    model = Model(tiny_tokenizer, window=70, window_overlap=30)
    prompts = planned(model, conversation(words(60), images=5))
    assert {image for prompt in prompts for image in prompt.images} == {bytes([n]) for n in range(5)}
    for prompt, text in zip(prompts, texts(tiny_tokenizer, prompts), strict=True):
        assert text.count("<|vision_start|><|image_pad|><|vision_end|>") == len(prompt.images)
        assert model.cost(prompt) <= model.facts.window_tokens


@pytest.mark.parametrize(
    ("facts", "value"),
    [
        ({"max_input_tokens": 400}, conversation(words(400))),
        ({"max_input_tokens": 400}, conversation("hi", words(400))),
        ({"max_input_tokens": 400}, conversation("hi", images=20)),
        ({"window": 100, "max_windows": 3}, conversation(words(300))),
        ({"window": 18}, conversation(words(20), images=1)),
    ],
    ids=["request", "answer", "images", "windows", "image"],
)
def test_what_is_too_long_is_refused_and_never_cut(tiny_tokenizer, facts, value):
    with pytest.raises(GuardError) as caught:
        planned(Model(tiny_tokenizer, **facts), value)
    assert caught.value.kind is GuardErrorKind.TOO_LONG


def test_a_window_smaller_than_the_frame_is_a_defect(tiny_tokenizer):
    with pytest.raises(GuardError, match="no room"):
        planned(Model(tiny_tokenizer, window_tokens=50), conversation(words(50)))


# ---- outcomes

PROMPT = GuardPrompt((1,), (), True, 40)


def generation(text, finish="stop", scores=(0.9, 0.2)):
    return Generation(text, 100, 30, 20, *scores, finish)


def test_an_output_is_read_with_its_scores_and_tokens():
    judged = judge(PROMPT, generation(completion("steps", "harmful", "unharmful")))
    assert judged == Judgement("harmful", "unharmful", 0.9, 0.2, "steps", Usage(100, 30, 20))


def test_a_label_without_a_probability_scores_zero_or_one():
    judged = judge(PROMPT, generation(completion("steps", "harmful", "unharmful"), scores=(None, None)))
    assert (judged.request_score, judged.response_score) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("text", "finish", "kind"),
    [
        ("<think>\nsteps", "length", "truncated"),
        (completion("steps", "unharmful", "unharmful"), "length", "truncated"),
        ("<think>\nsteps", "stop", "unparseable"),
        (completion("steps", "unharmful", None), "stop", "unparseable"),
    ],
)
def test_no_verdict_is_an_error(text, finish, kind):
    with pytest.raises(GuardError) as caught:
        judge(PROMPT, generation(text, finish))
    assert caught.value.kind == kind


def judgement(request, response=None, reasoning="", score=0.5):
    return Judgement(request, response, score, None if response is None else score, reasoning, Usage(10, 5, 3))


CALM, BADLY = judgement("unharmful", reasoning="calm", score=0.1), judgement("harmful", reasoning="bad", score=0.7)
ERROR = GuardError(GuardErrorKind.UNPARSEABLE)


@pytest.mark.parametrize("outcomes", list(itertools.permutations([CALM, BADLY, CALM])))
def test_the_worst_window_wins(outcomes):
    merged = merge(outcomes, answered=False)
    assert merged == Judgement("harmful", None, 0.7, None, "bad", Usage(30, 15, 9))


@pytest.mark.parametrize("outcomes", [[CALM, ERROR], [ERROR, CALM], [ERROR]])
def test_a_window_without_a_verdict_leaves_none(outcomes):
    with pytest.raises(GuardError) as caught:
        merge(outcomes, answered=False)
    assert caught.value is ERROR


@pytest.mark.parametrize("outcomes", [[BADLY, ERROR], [ERROR, BADLY]])
def test_harm_that_was_found_stands_beside_an_error(outcomes):
    assert merge(outcomes, answered=False).request == "harmful"


def test_for_an_answer_the_answers_label_counts():
    request_bad = judgement("harmful", score=0.9)
    answer_calm = judgement("unharmful", "unharmful", score=0.2)
    merged = merge([request_bad, answer_calm], answered=True)
    assert (merged.request, merged.response) == ("harmful", "unharmful")
    assert (merged.request_score, merged.response_score) == (0.9, 0.2)
    with pytest.raises(GuardError):
        merge([request_bad, ERROR, answer_calm], answered=True)
    answer_bad = judgement("unharmful", "harmful", "the answer", score=0.6)
    merged = merge([request_bad, ERROR, answer_bad], answered=True)
    assert (merged.response, merged.reasoning) == ("harmful", "the answer")


def test_an_answer_that_no_window_judged_is_a_defect():
    with pytest.raises(GuardError, match="no window"):
        merge([CALM], answered=True)
