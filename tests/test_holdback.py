"""The hold-back alone: whatever the split and whatever the order of verdicts, only judged text leaves."""

from __future__ import annotations

import json
import random
import tracemalloc
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from guard_middleware import enforce
from guard_middleware.config import StreamRules
from guard_middleware.dialects import CHAT_COMPLETIONS
from guard_middleware.dialects.base import Answer, Frame, Notice, Options, PublicError, Ruling, Said
from guard_middleware.holdback import HoldBack, Window
from guard_middleware.limits import Limits
from guard_middleware.sse import Decoder, Event
from guard_middleware.types import Message, Reasoning, Text
from tests.support.flow import chat, says

NOTICE = enforce.not_moderated("d", "output")


class PlainParser:
    """A dialect reduced to its frames: what leaves is a line of JSON for each."""

    keep_alive, answer_id = b"", None

    def feed(self, event: Event) -> Sequence[Frame]:
        raise NotImplementedError

    def finish(self) -> tuple[Answer, ...]:
        raise NotImplementedError

    def release(self, frame: Frame) -> bytes:
        return json.dumps([frame.choice, frame.value]).encode() + b"\n"

    def cut(self, choice: int, notice: Notice, soft: bool) -> bytes:
        return json.dumps([choice, "cut"]).encode() + b"\n"

    def close(self, ruling: Ruling) -> bytes:
        raise NotImplementedError

    def fail(self, error: PublicError) -> bytes:
        raise NotImplementedError


def window_rules(first: int = 16, last: int = 64, growth: float = 1.5, overlap: int = 8) -> StreamRules:
    return StreamRules(mode="window", first_window=first, last_window=last, growth=growth, overlap=overlap)


def async_rules(bound: int = 20, overlap: int = 8) -> StreamRules:
    return StreamRules(mode="async", leak_bound=bound, first_window=32, overlap=overlap)


def frame(choice: int, number: int, *said: tuple[str, str], whole: bool = False) -> Frame:
    texts = tuple(Said(surface, text, surface.startswith("reasoning")) for surface, text in said)
    return Frame(choice, number, texts, whole)


@dataclass
class Play:
    """A hold-back, driven; checks after each step what left against what was judged."""

    rules: StreamRules
    frames: list[Frame]
    hold: HoldBack = field(init=False)
    open: list[Window] = field(default_factory=list)
    fed: list[Frame] = field(default_factory=list)
    #: the numbers of the frames that left, by choice, "cut" among them; and the choices as they first left
    left: dict[int, list[Any]] = field(default_factory=dict)
    #: (choice, surface) -> how much of it a cleared window held
    judged: dict[tuple[int, str], int] = field(default_factory=dict)
    asked: dict[tuple[int, str], list[str]] = field(default_factory=dict)
    ahead: int = 0

    def __post_init__(self) -> None:
        self.hold = HoldBack(PlainParser(), self.rules)

    def text(self, choice: int, surface: str) -> str:
        """What was fed of one surface, without the frames that leave only at the end."""
        return "".join(
            said.text
            for frame in self.fed
            if frame.choice == choice and not frame.whole
            for said in frame.said
            if said.surface == surface
        )

    def feed(self) -> None:
        frame = self.frames.pop(0)
        self.fed.append(frame)
        self.hold.feed([frame])
        self.step()

    def answer(self, window: Window, harmful: bool = False) -> None:
        self.open.remove(window)
        if harmful:
            self.hold.cut(window.choice, NOTICE, False)
        else:
            self.hold.cleared(window)
            for name, mark in window.marks.items():
                self.judged[window.choice, name] = mark
        self.step()

    def step(self) -> None:
        for window in self.hold.due():
            self.open.append(window)
            self.check_question(window)
        self.take(self.hold.release())
        self.check_released()

    def check_question(self, window: Window) -> None:
        """A window is the text of its surfaces up to its marks, from no later than the last mark."""
        before = {key: sum(map(len, texts)) for key, texts in self.asked.items()}
        parts = iter(window.message.parts)
        for name, mark in window.marks.items():
            key, text = (window.choice, name), self.text(window.choice, name)
            seen = before.get(key, 0)
            if mark == seen:
                continue
            part = next(parts)
            assert isinstance(part, Reasoning if name.startswith("reasoning") else Text)
            start = max(0, seen - self.rules.overlap)
            assert part.text == text[start:mark]
            self.asked.setdefault(key, []).append(text[seen:mark])
        assert next(parts, None) is None

    def take(self, data: bytes) -> None:
        for line in data.splitlines():
            choice, value = json.loads(line)
            self.left.setdefault(choice, []).append(value)

    def shown(self, choice: int, surface: str) -> int:
        return sum(
            len(said.text)
            for frame in self.fed
            if frame.choice == choice and frame.value in self.left.get(choice, ())
            for said in frame.said
            if said.surface == surface
        )

    def check_released(self) -> None:
        for choice in {frame.choice for frame in self.fed}:
            ahead = sum(
                max(0, self.shown(choice, said.surface) - self.judged.get((choice, said.surface), 0))
                for said in {said.surface: said for f in self.fed if f.choice == choice for said in f.said}.values()
            )
            self.ahead = max(self.ahead, ahead)
        assert self.ahead <= (self.rules.leak_bound or 0)

    def finish(self) -> None:
        self.take(b"".join(self.hold.finish()))


texts = st.text(alphabet="abcdefgh \u00e9\U0001f600", min_size=0, max_size=12)
surfaces = st.sampled_from(["content", "reasoning", "refusal"])


@st.composite
def streams(draw: st.DrawFn, choices: int = 2, whole: bool = True) -> list[Frame]:
    """Frames of some choices, their text cut anywhere, surfaces interleaved, structure and tool calls among them."""
    found = draw(
        st.lists(
            st.tuples(
                st.integers(0, choices - 1),
                st.lists(st.tuples(surfaces, texts), max_size=2, unique_by=lambda said: said[0]),
                st.booleans() if whole else st.just(False),
            ),
            max_size=60,
        )
    )
    # a whole frame is rare, or all that follows it would wait and show nothing
    return [frame(choice, n, *said, whole=wholly and n % 7 == 6) for n, (choice, said, wholly) in enumerate(found)]


all_rules = st.one_of(
    st.just(StreamRules()),
    st.builds(window_rules, st.integers(16, 40), st.integers(40, 80), st.floats(1, 4), st.integers(0, 8)),
    st.builds(async_rules, st.integers(1, 60), st.integers(0, 8)),
)


def run(play: Play, random_: random.Random, *, harm: float = 0.0) -> Play:
    """Feeds and answers in a random order, as fast as the hold-back lets the upstream go."""
    while play.frames or play.open:
        if play.frames and not play.hold.paused and (not play.open or random_.random() < 0.7):
            play.feed()
        elif play.open:
            play.answer(random_.choice(play.open), random_.random() < harm)
    return play


@settings(max_examples=300, deadline=None)
@given(streams(), all_rules, st.randoms(use_true_random=False))
def test_nothing_leaves_ahead_of_its_verdict_and_all_of_it_in_the_end(
    frames: list[Frame], rules: StreamRules, random_: random.Random
) -> None:
    numbers = {choice: [f.value for f in frames if f.choice == choice] for choice in (0, 1)}
    play = run(Play(rules, list(frames)), random_)
    whole = {f.value for f in frames if f.whole}
    assert not whole & {number for left in play.left.values() for number in left}
    if rules.mode == "hold":
        assert play.left == {}
    assert play.hold.leaked == play.ahead
    play.finish()
    assert {choice: play.left.get(choice, []) for choice in (0, 1)} == numbers
    assert play.hold.shown == sum(len(said.text) for f in frames for said in f.said)


@settings(max_examples=200, deadline=None)
@given(streams(), all_rules, st.randoms(use_true_random=False))
def test_after_a_cut_nothing_more_of_its_choice_leaves(
    frames: list[Frame], rules: StreamRules, random_: random.Random
) -> None:
    play = run(Play(rules, list(frames)), random_, harm=0.3)
    cut = play.hold.cut_choices
    play.finish()
    for choice in {f.choice for f in frames}:
        left = play.left.get(choice, [])
        assert ("cut" in left) == (choice in cut)
        numbers = [f.value for f in frames if f.choice == choice]
        if choice in cut:
            assert left[-1] == "cut"
            assert left[:-1] == numbers[: len(left) - 1]
        else:
            assert left == numbers


@settings(max_examples=200, deadline=None)
@given(streams(choices=4), all_rules, st.randoms(use_true_random=False))
def test_choices_begin_in_the_order_in_which_they_appeared(
    frames: list[Frame], rules: StreamRules, random_: random.Random
) -> None:
    play = run(Play(rules, list(frames)), random_, harm=0.1)
    play.finish()
    assert list(play.left) == list(dict.fromkeys(f.choice for f in frames))


def split(text: str, random_: random.Random, longest: int) -> list[str]:
    pieces, at = [], 0
    while at < len(text):
        size = random_.randint(1, longest)
        pieces.append(text[at : at + size])
        at += size
    return pieces


PHRASE = "pick a lock"


@settings(max_examples=200, deadline=None)
@given(
    st.integers(0, 300), st.integers(1, 40), st.randoms(use_true_random=False),
    st.one_of(
        st.builds(window_rules, st.integers(22, 60), st.integers(60, 90), st.floats(1, 3), st.just(len(PHRASE) - 1)),
        st.builds(async_rules, st.integers(1, 60), st.just(len(PHRASE) - 1)),
    ),
)  # fmt: skip
def test_a_phrase_no_longer_than_the_overlap_and_one_is_seen_whole_wherever_it_stands(
    place: int, longest: int, random_: random.Random, rules: StreamRules
) -> None:
    text = "." * place + PHRASE + "." * 100
    play = Play(rules, [frame(0, n, ("content", piece)) for n, piece in enumerate(split(text, random_, longest))])
    seen: list[str] = []
    check = play.check_question

    def remember(window: Window) -> None:
        check(window)
        seen.append("".join(part.text for part in window.message.parts))  # type: ignore[union-attr]

    play.check_question = remember  # type: ignore[method-assign]
    run(play, random_)
    asked = sum(map(len, play.asked[0, "content"]))
    assert any(PHRASE in question for question in seen) or asked < place + len(PHRASE)  # left to the last question


@settings(max_examples=200, deadline=None)
@given(
    st.integers(16, 200).flatmap(lambda first: st.tuples(st.just(first), st.integers(0, first // 2))),
    st.sampled_from([1.0, 1.1, 1.5, 4.0]),
    st.integers(0, 2000),
    st.integers(1, 50),
    st.sampled_from([["content"], ["reasoning", "content"], ["content", "reasoning", "refusal"]]),
    st.randoms(use_true_random=False),
)
@example((16, 8), 1.0, 3000, 2, ["content", "reasoning", "refusal"], random.Random(0))
def test_the_guards_work_is_linear_in_the_answer_however_it_is_split(
    sizes: tuple[int, int], growth: float, length: int, longest: int, names: list[str], random_: random.Random
) -> None:
    first, overlap = sizes
    rules = window_rules(first, max(first, 400), growth, overlap)
    hold, asked = HoldBack(PlainParser(), rules), 0
    for number, piece in enumerate(split("x" * length, random_, longest)):
        hold.feed([frame(0, number, (random_.choice(names), piece))])
        for window in list(hold.due()):
            asked += sum(len(part.text) for part in window.message.parts)  # type: ignore[union-attr]
            hold.cleared(window)
    assert asked + length <= 2.5 * length


def test_windows_grow_up_to_the_last() -> None:
    play = Play(
        window_rules(first=16, last=40, growth=2, overlap=0), [frame(0, n, ("content", "x")) for n in range(200)]
    )
    sizes = []
    while play.frames:
        play.feed()
        for window in list(play.open):
            sizes.append(len(window.message.parts[0].text))  # type: ignore[union-attr]
            play.answer(window)
    assert sizes == [16, 32, 40, 40, 40]


def test_the_next_window_is_asked_about_while_nobody_waits_for_the_last() -> None:
    play = Play(window_rules(first=16, last=16, growth=1), [frame(0, n, ("content", "x" * 16)) for n in range(3)])
    play.feed()
    play.feed()
    (first,) = play.open  # one question of a choice at a time; what comes meanwhile waits for the next
    play.feed()
    play.answer(first)
    (second,) = play.open
    assert [len(part.text) for part in second.message.parts] == [8 + 32]  # type: ignore[union-attr]
    assert play.left == {0: [0]}


def test_surfaces_and_choices_have_a_hold_back_of_their_own() -> None:
    frames = [
        frame(0, 0, ("reasoning", "r" * 16)),
        frame(1, 1, ("content", "x" * 16)),
        frame(0, 2, ("content", "c" * 16)),
    ]
    play = Play(window_rules(), frames)
    for _ in range(3):
        play.feed()
    thought, other = play.open
    assert thought.message == Message("assistant", (Reasoning("r" * 16),))
    play.answer(other)
    assert play.left == {}  # choice 0 appeared first
    play.answer(thought)
    assert play.left == {0: [0], 1: [1]}
    assert play.open == []  # 16 more: too few for the second window


def test_a_tool_call_and_what_follows_it_leave_at_the_end() -> None:
    frames = [frame(0, 0, ("content", "x" * 16)), frame(0, 1, ("tool_calls.0", "{}"), whole=True)]
    frames += [frame(0, 2), frame(0, 3, ("content", "y" * 40))]
    play = run(Play(window_rules(), frames), random.Random(0))
    assert play.left == {0: [0]}
    play.finish()
    assert play.left == {0: [0, 1, 2, 3]}


def test_async_does_not_hold_the_upstream_for_what_leaves_at_the_end_anyway() -> None:
    play = Play(async_rules(bound=5), [frame(0, 0, whole=True), frame(0, 1, ("content", "x" * 100))])
    play.feed()
    play.feed()
    assert play.open
    assert not play.hold.paused


@pytest.mark.parametrize("mode", ["hold", "window"])
def test_outside_async_the_upstream_is_never_held(mode: str) -> None:
    rules = StreamRules() if mode == "hold" else window_rules()
    play = Play(rules, [frame(0, n, ("content", "x" * 16)) for n in range(50)])
    while play.frames:
        play.feed()
        assert not play.hold.paused


def test_only_a_single_window_that_is_the_whole_answer_stands_for_the_last_question() -> None:
    answer = Message("assistant", (Text("x" * 16),))
    for extra, covered in [((), True), ((frame(0, 1, ("content", "y")),), False), ((frame(0, 1),), True)]:
        play = Play(window_rules(), [frame(0, 0, ("content", "x" * 16)), *extra])
        while play.frames:
            play.feed()
        assert play.hold.covered(0, answer) is covered
    assert not play.hold.covered(0, Message("assistant", (Text("x" * 16), Text("z"))))
    assert not play.hold.covered(1, answer)
    twice = run(Play(window_rules(), [frame(0, n, ("content", "x" * 16)) for n in range(9)]), random.Random(0))
    assert not twice.hold.covered(0, Message("assistant", (Text("x" * 144),)))


def test_a_hold_back_of_any_length_keeps_its_order() -> None:
    play = Play(
        window_rules(first=100, last=1000, growth=2, overlap=10), [frame(0, n, ("content", "xy")) for n in range(5000)]
    )
    while play.frames:
        play.feed()
    run(play, random.Random(0))
    play.finish()
    assert play.left == {0: list(range(5000))}


def test_a_long_hold_back_costs_about_what_its_text_costs() -> None:
    """10 MB for 8 MiB at most; parsed, the same chunks take five times as much."""
    size, sent = 2 * 1024 * 1024, 0
    parser = CHAT_COMPLETIONS.stream_parser(CHAT_COMPLETIONS.parse_request(chat(), Limits(), Options()), Options())
    hold = HoldBack(parser, StreamRules())
    tracemalloc.start()
    try:
        while sent < size:
            data = says("word")[0].replace(b'"finish_reason"', b'"logprobs": null, "finish_reason"')
            data = data.replace(b'"c"', b'"chatcmpl-BxYzAbCdEfGhIjKlMnOpQrStUvWx"')
            data = data.replace(b'"m"', b'"gpt-4o-2024-08-06", "system_fingerprint": "fp_abcdef1234"')
            sent += len(data)
            (event,) = Decoder().feed(data)
            hold.feed(parser.feed(event))
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held <= size * 10e6 / (8 * 1024 * 1024)
