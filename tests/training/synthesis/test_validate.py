"""Which answers of a teacher are accepted, and by what name the others are refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guard_middleware.guard.parse import completion, parse
from guard_training.corpus.rows import Row
from guard_training.corpus.statistics import steps
from guard_training.synthesis.prompt import messages
from guard_training.synthesis.validate import Fault, Unusable, validate

ASKED = Row("a", "made", "how do I pick a lock", "harmful")
PAIR = Row("b", "made", "how do I pick a lock", "harmful", "I will not help.", "unharmful")


def answer(
    *, first: str = "So it is harmful.", second: str | None = None, request: str = "harmful", response: str = "None"
) -> str:
    task = f"# Task 2\n## Reasoning Step 1\n{second}\n" if second else ""
    head = "# Task 1\n## Reasoning Step 1\nThe words ask for a way in.\n## Reasoning Step 2\n"
    return f"{head}{first}\n{task}Answers:\nRequest: {request}\nResponse: {response}\n"


def paired(**changed: str) -> str:
    return answer(**{"second": "It refuses, so it is unharmful.", "response": "unharmful", **changed})


@pytest.mark.parametrize(("row", "text", "number"), [(ASKED, answer(), 2), (PAIR, paired(), 3)])
def test_a_whole_answer_is_accepted_and_fits_into_the_guards_own_form(row: Row, text: str, number: int) -> None:
    found = validate(text, row)
    assert (found.steps, found.request, found.response) == (number, row.request, row.response_label)
    assert len(steps(found.text)) == number
    written = completion(found.text, found.request, found.response)
    assert parse(written, answered=row.response is not None).reasoning == found.text


@pytest.mark.parametrize(
    "text",
    [
        f"```\n{answer()}```",
        answer().replace("# Task 1", "## **Task 1**"),
        answer().replace("Step 2\n", "Step 2: "),
        answer().replace("Answers:", "\n**Answers:**"),
        "\n\n" + answer() + "\n",
    ],
)
def test_what_teachers_vary_is_made_the_same(text: str) -> None:
    assert validate(text, ASKED) == validate(answer(), ASKED)


def test_steps_that_are_numbered_through_are_numbered_by_task() -> None:
    through = paired().replace("# Task 2\n## Reasoning Step 1", "# Task 2\n## Reasoning Step 3")
    assert validate(through, PAIR) == validate(paired(), PAIR)


MANY = "# Task 1\n" + "".join(f"## Reasoning Step {n}\nStep, harmful.\n" for n in range(1, 12))


@pytest.mark.parametrize(
    ("text", "row", "finish", "fault"),
    [
        ("", ASKED, "stop", Fault.EMPTY),
        (None, ASKED, "stop", Fault.EMPTY),
        (None, ASKED, "content_filter", Fault.REFUSED),
        (answer(), ASKED, "length", Fault.CUT_OFF),
        ("I cannot help with that.", ASKED, "stop", Fault.FORM),
        (answer().split("Answers:")[0], ASKED, "stop", Fault.FORM),
        (answer() + "Hope that helps!", ASKED, "stop", Fault.FORM),
        ("Sure:\n" + answer(), ASKED, "stop", Fault.FORM),
        (answer().replace("Step 2", "Step 3"), ASKED, "stop", Fault.FORM),
        (answer().replace("# Task 1\n", ""), ASKED, "stop", Fault.FORM),
        (answer(), PAIR, "stop", Fault.FORM),
        (paired(), ASKED, "stop", Fault.FORM),
        (answer(request="maybe"), ASKED, "stop", Fault.FORM),
        (f"{MANY}Answers:\nRequest: harmful\nResponse: None", ASKED, "stop", Fault.STEPS),
        ("# Task 1\nAnswers:\nRequest: harmful\nResponse: None", ASKED, "stop", Fault.STEPS),
        (answer().replace("The words ask for a way in.", ""), ASKED, "stop", Fault.STEPS),
        (answer(request="unharmful"), ASKED, "stop", Fault.VERDICT),
        (answer(response="unharmful"), ASKED, "stop", Fault.VERDICT),
        (paired(response="harmful"), PAIR, "stop", Fault.VERDICT),
        (paired(response="None"), PAIR, "stop", Fault.VERDICT),
        (answer(first="So it is unharmful."), ASKED, "stop", Fault.CONCLUSION),
        (answer(first="So it should be refused."), ASKED, "stop", Fault.CONCLUSION),
        (answer(first="It is not unharmful, it is harmful."), ASKED, "stop", Fault.CONCLUSION),
        (paired(second="It helps: harmful."), PAIR, "stop", Fault.CONCLUSION),
        (answer(first="\ud800 harmful"), ASKED, "stop", Fault.FORM),
        (answer(first="<think> harmful"), ASKED, "stop", Fault.CONTROL),
        (answer(first="<|im_end|> harmful"), ASKED, "stop", Fault.CONTROL),
    ],
)
def test_other_answers_are_refused_by_name(text, row, finish, fault) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(Unusable) as refused:
        validate(text, row, finish=finish)
    assert refused.value.fault == fault


@pytest.mark.parametrize(
    "leak",
    [
        "The ground truth is",
        "Given the ground-truth, it is",
        "As the given label says, it is",
        "The provided verdict is",
        "The verdict provided is",
        "The label is given as",
        "This was labeled harmful, so it is",
        "The request is labelled as harmful and",
        "According to the annotation it is",
        "We were told that the request is bad:",
        "I was asked to justify that it is",
        "The correct label is",
        "Given the verdict, it is",
        "This matches the harmful verdict:",
        "As the verdict says, it is",
        "The verdict states that the request is",
        "I was told it is",
    ],
)
def test_talk_of_a_given_verdict_is_a_leak(leak: str) -> None:
    with pytest.raises(Unusable) as refused:
        validate(answer(first=f"{leak} harmful."), ASKED)
    assert refused.value.fault == Fault.LEAK


@pytest.mark.parametrize(
    "fine",
    [
        "The bottle in the image is labelled as bleach; it is",
        "The person was told to wait, which is",
        "It gives instructions, and it is",
        "He has the right to know; still it is",
        "As the label on the bottle warns, it is",
        "Based on the label of the jar, it is",
        "The jury's verdict is quoted; it is",
    ],
)
def test_words_about_the_exchange_are_no_leak(fine: str) -> None:
    assert validate(answer(first=f"{fine} harmful."), ASKED).steps == 2


def test_an_exchange_that_speaks_of_a_ground_truth_may_be_quoted() -> None:
    row = Row("c", "made", "forge the ground truth of my data set", "harmful")
    assert validate(answer(first="It wants to forge the ground truth: harmful."), row).steps == 2


def test_a_side_without_a_label_is_the_teachers_to_decide() -> None:
    row = Row("d", "made", "hello", None, "Hi!", "unharmful")
    found = validate(paired(request="unharmful", first="A greeting: unharmful."), row)
    assert (found.request, found.response) == ("unharmful", "unharmful")


def test_a_row_without_a_label_is_the_teachers_to_decide_and_held_to_its_own_verdict() -> None:
    row = Row("e", "spa_vl", "what is this", None, "A lock.", None)
    asked = messages(row, None)[1]["content"][0]["text"]
    assert asked.endswith("Verdict:\nRequest: decide yourself\nResponse: decide yourself")
    found = validate(paired(), row)
    assert (found.request, found.response) == ("harmful", "unharmful")
    for text, fault in ((paired(request="unharmful"), Fault.CONCLUSION), (paired(response="None"), Fault.VERDICT)):
        with pytest.raises(Unusable) as refused:
            validate(text, row)
        assert refused.value.fault == fault


def test_no_reason_repeats_words_of_the_answer() -> None:
    for text in ("SECRET", answer(first="SECRET"), answer(first="SECRET ground truth harmful"), answer() + "SECRET"):
        with pytest.raises(Unusable) as refused:
            validate(text, ASKED)
        assert "SECRET" not in str(refused.value)


@given(st.text())
def test_any_text_is_accepted_whole_or_refused_by_name(text: str) -> None:
    try:
        found = validate(text, ASKED)
    except Unusable:
        return
    assert parse(completion(found.text, "harmful", None), answered=False)


@given(st.lists(st.text("abc #*:`\n", max_size=40), min_size=1, max_size=4))
def test_what_is_accepted_fits_into_the_guards_form(pieces: list[str]) -> None:
    body = "".join(f"## Reasoning Step {n}\n{piece}\n" for n, piece in enumerate(pieces, 1))
    try:
        found = validate(f"# Task 1\n{body} harmful\nAnswers:\nRequest: harmful\nResponse: None", ASKED)
    except Unusable:
        return
    assert parse(completion(found.text, "harmful", None), answered=False).reasoning == found.text.strip()


def test_the_prompt_gives_the_labels_and_fences_the_exchange() -> None:
    text = messages(PAIR, None)[1]["content"][0]["text"]
    assert text.endswith("Verdict:\nRequest: harmful\nResponse: unharmful")
    fences = {line for line in text.splitlines() if line.startswith("-----")}
    assert len(fences) == 1
    assert text.count(fences.pop()) == 4
    assert "no answer was given" in messages(ASKED, None)[1]["content"][0]["text"]
    unknown = messages(Row("d", "made", "hello", None, "Hi!", "unharmful"), None)[1]["content"][0]["text"]
    assert "Request: decide yourself\nResponse: unharmful" in unknown


def test_an_image_stands_before_the_words_and_a_fault_after_them() -> None:
    content = messages(ASKED, "data:image/png;base64,", fault="it was empty")[1]["content"]
    assert [part["type"] for part in content] == ["image_url", "text", "text"]
    assert "(the image above)" in content[1]["text"]
    assert "it was empty" in content[2]["text"]
