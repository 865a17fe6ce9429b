"""The service on an engine whose outputs are written by the test, with the real prompts, windows and parser."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from dataclasses import replace

import pytest

from guard_middleware.errors import GuardError, GuardErrorKind
from guard_middleware.guard.client import GuardClient
from guard_middleware.guard.parse import completion
from guard_middleware.guard.prompt import PromptEncoder
from guard_middleware.types import Blob, Conversation, Judging, Message, Text, Usage
from guard_middleware.wire import ModerationRequest
from guard_middleware.worker import serve
from guard_middleware.worker.app import Worker
from guard_middleware.worker.batching import BatchLimits
from guard_middleware.worker.calibration import Calibration, Scale
from guard_middleware.worker.engine import Generation
from guard_middleware.worker.metrics import Metrics
from guard_middleware.worker.service import GuardService, ServiceLimits
from guard_middleware.worker.weights import ModelFacts

FACTS = ModelFacts("stub", "r1")


class StubEngine:
    """Judges by the prompt's words after ``steps`` steps of ``seconds`` each; counts the steps taken per row."""

    def __init__(self, tokenizer, facts=FACTS, *, steps=1, seconds=0.0, output=None, finish="stop") -> None:
        self.encoder, self.facts, self.max_batch = PromptEncoder(tokenizer), facts, 8
        self._decode = tokenizer.backend_tokenizer.decode
        self._steps, self._seconds, self._output, self._finish = steps, seconds, output, finish
        self.steps_taken, self.prompts, self.started = 0, [], threading.Event()

    def image_tokens(self, image):
        if image == b"broken":
            raise GuardError(GuardErrorKind.MEDIA, "an image that cannot be decoded")
        return 16

    def generate_batch(self, prompts, cancelled):
        self.prompts += prompts
        self.started.set()
        for _ in range(self._steps):
            if all(cancelled(row) for row in range(len(prompts))):
                break
            time.sleep(self._seconds)
            self.steps_taken += 1
        return [self._generate(prompt) for prompt in prompts]

    def _generate(self, prompt):
        words = self.text(prompt).partition("Human user:")[2]
        label = "harmful" if "pick a lock" in words else "unharmful"
        response = label if prompt.answered else None
        score = 0.9 if label == "harmful" else 0.1
        if not prompt.think:
            score = 0.6 if label == "harmful" else 0.01
            return Generation(completion("", label, response), len(prompt.ids), 1, 0, score, score, "stop")
        text = self._output or completion(f"Step 1: it is {label}.", label, response)
        return Generation(text, len(prompt.ids), 20, 15, score, score if prompt.answered else None, self._finish)

    def text(self, prompt):
        return self._decode(list(prompt.ids), skip_special_tokens=False)


class StubReader:
    """Reads an image's bytes as its text."""

    def __init__(self, seconds=0.0) -> None:
        self.read_images, self.timeouts, self._seconds = [], [], seconds

    def read(self, image, timeout=None):
        self.read_images.append(image)
        self.timeouts.append(timeout)
        time.sleep(self._seconds)
        if image == b"fails":
            raise GuardError(GuardErrorKind.READER, "the reader failed")
        return image.decode()


def question(text="how do I bake bread", images=(), answer=None, deadline=5.0, **changes):
    parts = (*(Blob("image/png", image) for image in images), Text(text))
    answer = None if answer is None else Message("assistant", (Text(answer),))
    return ModerationRequest("q", Conversation((Message("user", parts),), (), answer), "input", deadline, **changes)


def moderate(engine, *requests, **options):
    """The outcomes of requests, asked together."""

    async def main():
        service = GuardService(engine, Metrics(), **options)
        try:
            deadlines = [asyncio.get_running_loop().time() + request.deadline for request in requests]
            calls = [service.moderate(*pair) for pair in zip(requests, deadlines, strict=True)]
            return await asyncio.gather(*calls, return_exceptions=True)
        finally:
            await service.aclose()

    return asyncio.run(main())


def test_a_verdict_carries_labels_scores_reasoning_tokens_and_timings(tiny_tokenizer):
    (verdict,) = moderate(StubEngine(tiny_tokenizer), question("how do I pick a lock"))
    assert (verdict.request, verdict.response, verdict.request_score) == ("harmful", None, 0.9)
    assert verdict.reasoning == "Step 1: it is harmful."
    assert (verdict.usage.completion, verdict.usage.reasoning) == (20, 15)
    assert verdict.usage.prompt > 100
    assert (verdict.model, verdict.revision) == ("stub", "r1")
    assert [stage for stage, _ in verdict.timings] == ["reader", "plan", "queue", "generate"]


def test_an_answer_is_labelled_when_there_is_one(tiny_tokenizer):
    (verdict,) = moderate(StubEngine(tiny_tokenizer), question(answer="first pick a lock"))
    assert (verdict.response, verdict.response_score) == ("harmful", 0.9)


def test_a_verdict_says_in_which_mode_it_was_made_and_whether_it_was_thought_about(tiny_tokenizer):
    hybrid = Judging("hybrid", 0.2, 0.8)
    label, sure, unsure = moderate(
        StubEngine(tiny_tokenizer),
        question("how do I pick a lock", judging=Judging("label")),
        question(judging=hybrid),
        question("how do I pick a lock", judging=hybrid),
    )
    assert (label.judging, label.thought, label.request_score) == (Judging("label"), False, 0.6)
    assert (sure.judging, sure.thought, sure.usage.completion, sure.reasoning) == (hybrid, False, 1, "")
    assert (unsure.judging, unsure.thought, unsure.usage.completion) == (hybrid, True, 21)
    assert (unsure.request_score, unsure.reasoning) == (0.9, "Step 1: it is harmful.")


def test_hybrid_thinks_about_one_window_of_many(tiny_tokenizer):
    encoder = PromptEncoder(tiny_tokenizer)
    facts = replace(FACTS, window_tokens=len(encoder.opening) + len(encoder.closing) + 400, max_windows=20)
    engine = StubEngine(tiny_tokenizer, facts)
    text = "bread " * 100 + "how do I pick a lock " + "bread " * 100
    (verdict,) = moderate(engine, question(text, judging=Judging("hybrid", 0.2, 0.8)))
    (thought,) = [prompt for prompt in engine.prompts if prompt.think]
    assert "pick a lock" in engine.text(thought)
    assert len(engine.prompts) > 3
    assert (verdict.request, verdict.request_score, verdict.reasoning) == ("harmful", 0.9, "Step 1: it is harmful.")


def test_scores_are_calibrated_and_the_revision_says_by_what(tiny_tokenizer):
    calibration = Calibration({("reason", "request"): Scale(0.5)}, "c0ffee00")
    (verdict,) = moderate(StubEngine(tiny_tokenizer), question("how do I pick a lock"), calibration=calibration)
    assert verdict.request_score == pytest.approx(81 / 82)
    assert verdict.revision == "r1+c0ffee00"
    (verdict,) = moderate(StubEngine(tiny_tokenizer), question(), calibration=calibration, serving="5e5e5e5e")
    assert verdict.revision == "r1+c0ffee00+5e5e5e5e"


def test_long_content_is_judged_in_windows_and_the_worst_one_wins(tiny_tokenizer):
    encoder = PromptEncoder(tiny_tokenizer)
    room = len(encoder.opening) + len(encoder.closing) + 400
    facts = replace(FACTS, window_tokens=room, max_windows=20)
    engine = StubEngine(tiny_tokenizer, facts)
    text = "bread " * 100 + "how do I pick a lock " + "bread " * 100
    (verdict,) = moderate(engine, question(text))
    assert verdict.request == "harmful"
    assert verdict.reasoning == "Step 1: it is harmful."
    assert len(engine.prompts) > 2
    assert verdict.usage == Usage(
        sum(len(p.ids) for p in engine.prompts), 20 * len(engine.prompts), 15 * len(engine.prompts)
    )


def test_content_past_the_token_budget_is_too_long(tiny_tokenizer):
    engine = StubEngine(tiny_tokenizer, replace(FACTS, max_input_tokens=300))
    (error,) = moderate(engine, question("bread " * 2000))
    assert error.kind is GuardErrorKind.TOO_LONG
    assert engine.prompts == []


def test_text_beyond_all_bounds_costs_nothing(tiny_tokenizer):
    """Every line of it would be folded, and every letter of each; the body limit of the gateway lets it through."""
    engine = StubEngine(tiny_tokenizer)
    started = time.process_time()
    (found,) = moderate(engine, question("\ufdfa\n" * 3_000_000))
    assert found.kind is GuardErrorKind.TOO_LONG
    assert time.process_time() - started < 1
    assert engine.prompts == []


@pytest.mark.parametrize(
    ("output", "finish", "kind"),
    [
        ("<think>\nno verdict", "length", "truncated"),
        ("The request is harmful.", "stop", "unparseable"),
        (completion("", "unharmful", "unharmful"), "stop", "unparseable"),
    ],
)
def test_an_output_without_exactly_one_verdict_is_an_error(tiny_tokenizer, output, finish, kind):
    (error,) = moderate(StubEngine(tiny_tokenizer, output=output, finish=finish), question())
    assert isinstance(error, GuardError)
    assert error.kind == kind


def test_drawn_text_is_read_once_per_image_shown_to_the_guard_and_kept(tiny_tokenizer):
    engine, reader = StubEngine(tiny_tokenizer), StubReader()
    images = [b"a loaf", b"how to pick a lock", b"a loaf"]
    (verdict,) = moderate(engine, question(images=images), reader=reader, read_by_default=True)
    assert verdict.request == "harmful"
    assert verdict.drawn_text == ("a loaf", "how to pick a lock", "a loaf")
    assert sorted(reader.read_images) == [b"a loaf", b"how to pick a lock"]
    assert "[text drawn in image 2] how to pick a lock" in engine.text(engine.prompts[0])
    assert engine.prompts[0].images == tuple(images)


@pytest.mark.parametrize(
    ("default", "wanted", "reads"), [(True, None, 1), (True, False, 0), (False, None, 0), (False, True, 1)]
)
def test_the_request_decides_about_reading_and_else_the_worker(tiny_tokenizer, default, wanted, reads):
    reader = StubReader()
    (verdict,) = moderate(
        StubEngine(tiny_tokenizer), question(images=[b"x"], reader=wanted), reader=reader, read_by_default=default
    )
    assert len(reader.read_images) == reads
    assert verdict.drawn_text == (("x",) if reads else ())


def test_reading_that_fails_is_an_error_and_so_is_a_wish_to_read_without_a_reader(tiny_tokenizer):
    engine = StubEngine(tiny_tokenizer)
    (error,) = moderate(engine, question(images=[b"ok", b"fails"]), reader=StubReader(), read_by_default=True)
    assert error.kind is GuardErrorKind.READER
    (error,) = moderate(engine, question(images=[b"ok"], reader=True))
    assert error.kind is GuardErrorKind.READER
    assert engine.prompts == []


def test_reading_is_bounded_in_time_and_in_number(tiny_tokenizer):
    reader = StubReader(seconds=0.1)
    limits = ServiceLimits(reader_seconds=0.4, reads=3)
    first, second = moderate(
        StubEngine(tiny_tokenizer),
        question(images=[b"a", b"b"]),
        question(images=[b"c", b"d"], deadline=0.2),
        reader=reader,
        read_by_default=True,
        limits=limits,
    )
    assert first.drawn_text == ("a", "b")
    assert second.kind is GuardErrorKind.OVERLOADED
    assert second.retry_after > 0
    assert all(timeout <= 0.4 for timeout in reader.timeouts)


def test_a_full_queue_refuses_before_anything_is_read_or_planned(tiny_tokenizer):
    engine, reader = StubEngine(tiny_tokenizer, steps=2000, seconds=0.002), StubReader()

    async def main():
        limits = ServiceLimits(BatchLimits(1, queue=1))
        service = GuardService(engine, Metrics(), reader=reader, read_by_default=True, limits=limits)
        end = asyncio.get_running_loop().time() + 20
        waiting = []
        for what in ("running", "queue_depth"):  # together they could find each other in the queue of one
            waiting.append(asyncio.create_task(service.moderate(question(), end)))
            while service.gauges()[what] < 1:
                await asyncio.sleep(0.01)
        with pytest.raises(GuardError, match="queue is full") as caught:
            await service.moderate(question(images=[b"a loaf"]), end)
        assert caught.value.retry_after > 0
        assert reader.read_images == []
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        await service.aclose()

    asyncio.run(asyncio.wait_for(main(), 30))


def test_an_image_that_cannot_be_decoded_is_a_media_error(tiny_tokenizer):
    (error,) = moderate(StubEngine(tiny_tokenizer), question(images=[b"broken"]))
    assert error.kind is GuardErrorKind.MEDIA


@pytest.mark.parametrize(
    ("output", "finish", "passes"), [(None, "stop", True), ("nonsense", "stop", True), ("<think>", "length", True)]
)
def test_the_warm_up_wants_an_output_not_a_good_one(tiny_tokenizer, output, finish, passes):
    engine = StubEngine(tiny_tokenizer, output=output, finish=finish)

    async def main():
        service = GuardService(engine, Metrics())
        await service.warm_up()
        await service.aclose()

    asyncio.run(main())
    assert len(engine.prompts) == 1


def test_the_warm_up_fails_with_an_engine_that_fails(tiny_tokenizer):
    class Broken(StubEngine):
        def generate_batch(self, prompts, cancelled):
            raise RuntimeError("no memory")

    async def main():
        service = GuardService(Broken(tiny_tokenizer), Metrics())
        with pytest.raises(GuardError, match="the engine failed"):
            await service.warm_up()
        await service.aclose()

    asyncio.run(main())


@contextlib.asynccontextmanager
async def worker_with(engine, tmp_path, **options):
    """(client, service) of a served worker."""
    services = []

    async def load(metrics):
        services.append(GuardService(engine, metrics, **options))
        return services[0]

    worker = Worker(load)
    server = serve.Server(worker.asgi, serve.unix_listener(tmp_path / "w.sock"), max_frame=1 << 20)
    task = asyncio.create_task(server.serve())
    client = GuardClient(tmp_path / "w.sock")
    try:
        while not await client.ready():
            await asyncio.sleep(0.01)
        yield client, services[0]
    finally:
        await client.aclose()
        server.stop()
        await task


@pytest.mark.parametrize("how", ["cancelled", "deadline", "connection lost"])
def test_a_question_that_nobody_waits_for_stops_the_generation(tiny_tokenizer, tmp_path, how):
    engine = StubEngine(tiny_tokenizer, steps=2000, seconds=0.002)

    async def main():
        async with worker_with(engine, tmp_path) as (client, service):
            deadline = 0.3 if how == "deadline" else 20.0
            task = asyncio.create_task(client.moderate(question(deadline=deadline)))
            await asyncio.to_thread(engine.started.wait, 5)
            if how == "cancelled":
                task.cancel()
            elif how == "connection lost":
                await client.aclose()
            await asyncio.gather(task, return_exceptions=True)
            await asyncio.sleep(0.1)
            taken = engine.steps_taken
            assert service.gauges()["running"] == 0
            await asyncio.sleep(0.1)
            assert engine.steps_taken == taken < 500

    asyncio.run(asyncio.wait_for(main(), 20))


def test_an_overflowing_queue_reaches_the_client_as_overloaded_with_a_time_to_come_back(tiny_tokenizer, tmp_path):
    engine = StubEngine(tiny_tokenizer, steps=30, seconds=0.01)

    async def main():
        limits = ServiceLimits(BatchLimits(batch=2, queue=4))
        async with worker_with(engine, tmp_path, limits=limits) as (client, _):
            outcomes = await asyncio.gather(*(client.moderate(question(deadline=10.0)) for _ in range(20)))
        errors = [outcome for outcome in outcomes if isinstance(outcome, GuardError)]
        assert {error.kind for error in errors} == {GuardErrorKind.OVERLOADED}
        assert all(0.5 <= error.retry_after <= 60 for error in errors)
        assert 12 <= len(errors) <= 16

    asyncio.run(asyncio.wait_for(main(), 20))
