from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from guard_middleware.turns import PICTURE, Past, TurnBounds, View, size, view
from guard_middleware.types import (
    Blob,
    Conversation,
    Definition,
    Message,
    Part,
    Reasoning,
    Text,
    ToolCall,
    ToolCallResponse,
)


def user(*said: str | Blob) -> Message:
    return Message("user", tuple(Text(part) if isinstance(part, str) else part for part in said))


def model(text: str) -> Message:
    return Message("assistant", (Text(text),))


def image(name: str) -> Blob:
    return Blob("image/png", name.encode())


def texts(seen: View) -> list[str]:
    return [part.text for m in seen.conversation.messages for part in m.parts if isinstance(part, Text)]


TALK = Conversation(
    (
        Message("system", (Text("be brief"),)),
        user("one"),
        model("A" * 300),
        user("two"),
        model("B" * 300),
        user("three"),
        model("C" * 300),
        user("four"),
    ),
    (Definition("tool", "finds"),),
)
KNOWN = Past(6, frozenset({2, 4, 6}))


def test_what_fits_is_asked_as_it_is() -> None:
    assert view(TALK, KNOWN, TurnBounds(2000)).conversation is TALK


def test_of_an_unknown_past_nothing_is_left_out() -> None:
    assert view(TALK, Past(), TurnBounds(0, 0)).conversation is TALK
    assert view(TALK, Past(0, frozenset({2, 4})), TurnBounds(0, 0)).conversation is TALK


def test_judged_answers_go_oldest_first_and_the_one_that_does_not_fit_keeps_its_end() -> None:
    seen = view(TALK, KNOWN, TurnBounds(size(user("x")) * 23 + 400))
    assert texts(seen) == ["be brief", "one", "two", "B" * 100, "three", "C" * 300, "four"]
    assert (seen.characters, seen.images) == (500, 0)
    assert seen.conversation.definitions == TALK.definitions


def test_the_newest_answer_keeps_an_eighth_however_much_the_client_wrote() -> None:
    long = replace(TALK, messages=(user("x" * 5000), *TALK.messages[1:]))
    seen = view(long, KNOWN, TurnBounds(800))
    assert texts(seen) == ["x" * 5000, "one", "two", "three", "C" * 100, "four"]


def test_turns_of_one_role_side_by_side_become_one_unless_they_hold_more_than_text() -> None:
    named = replace(user("d"), name="ann")
    talk = Conversation((user("a"), model("A" * 99), user("b"), user("c", image("1")), user("d"), named, user("e")))
    seen = view(talk, Past(6, frozenset({1})), TurnBounds(0, 9))
    joined = Message("user", (Text("a"), Text("b")))
    assert seen.conversation.messages == (joined, *talk.messages[3:])


def test_an_answer_that_nobody_judged_stays_as_the_clients_word() -> None:
    seen = view(TALK, Past(6, frozenset({4, 6})), TurnBounds(0))
    assert texts(seen) == ["be brief", "one", "A" * 300, "two", "three", "four"]


def test_an_answer_beyond_what_was_judged_with_its_request_stays() -> None:
    seen = view(TALK, Past(2, frozenset({2, 4, 6})), TurnBounds(0))
    assert texts(seen) == ["be brief", "one", "two", "B" * 300, "three", "C" * 300, "four"]


def test_only_the_newest_images_are_shown_and_the_text_drawn_in_the_others_stays() -> None:
    talk = Conversation((user("a", image("1")), user("b", image("2"), image("3")), user("c", image("4"))))
    past = Past(2, drawn={image("1").digest: "sale\n today ", image("2").digest: ""})
    seen = view(talk, past, TurnBounds(images=2))
    assert texts(seen) == ["a", f"{PICTURE} sale today", "b", PICTURE, "c"]
    assert [blob.data for blob in seen.conversation.blobs()] == [b"3", b"4"]
    assert seen.images == 2


def test_new_images_are_shown_however_many_they_are() -> None:
    talk = Conversation((user("a", image("1")), user("b", *(image(str(n)) for n in range(2, 6)))))
    assert [blob.data for blob in view(talk, Past(1), TurnBounds(images=2)).conversation.blobs()] == [
        b"2", b"3", b"4", b"5",
    ]  # fmt: skip
    assert len(view(talk, Past(1), TurnBounds(images=9)).conversation.blobs()) == 5


def test_the_answer_that_is_judged_is_never_shortened() -> None:
    talk = replace(TALK, answer=model("D" * 9000))
    assert view(talk, KNOWN, TurnBounds(0)).conversation.answer == talk.answer


WORDS = st.text("abc [", min_size=1, max_size=12)
PART = st.one_of(
    st.builds(Text, WORDS),
    st.builds(ToolCallResponse, st.just("c"), WORDS),
    st.builds(ToolCall, st.just("c"), WORDS, WORDS),
    st.builds(Reasoning, WORDS),
    st.builds(image, WORDS),
)
MESSAGE = st.builds(
    Message, st.sampled_from(["system", "user", "assistant", "tool"]), st.lists(PART, max_size=3).map(tuple)
)


@given(
    st.lists(MESSAGE, min_size=1, max_size=8).map(tuple),
    st.integers(0, 7),
    st.frozensets(st.integers(0, 7)),
    st.integers(0, 60),
    st.integers(0, 3),
)
def test_whatever_the_client_wrote_is_in_every_view(
    messages: tuple[Message, ...], judged: int, answers: frozenset[int], characters: int, images: int
) -> None:
    judged = min(judged, len(messages) - 1)
    ours = {index for index in answers if index <= judged}
    messages = tuple(model("~" * 5 * index) if index in ours else said for index, said in enumerate(messages))
    talk = Conversation(messages)
    drawn = {blob.digest: f"drawn{blob.digest[:4]}" for blob in talk.blobs()}
    seen = view(talk, Past(judged, answers, drawn), TurnBounds(characters, images))
    client = [(index, said) for index, said in enumerate(messages) if index not in ours]
    written = [(index, said.role, part) for index, said in client for part in said.parts]
    left = [(said.role, part) for said in seen.conversation.messages for part in said.parts if not is_answer(part)]
    for (index, role, was), (shown_as, now) in zip(written, left, strict=True):
        hidden = isinstance(was, Blob) and index < judged
        assert role == shown_as
        assert was == now or (hidden and now == Text(f"{PICTURE} {drawn[was.digest]}"))


def is_answer(part: Part) -> bool:
    return isinstance(part, Text) and not part.text.strip("~")
