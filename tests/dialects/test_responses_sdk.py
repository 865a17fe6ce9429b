"""The Responses shapes through the real openai SDK: what a caller's code sees, call by call. No network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import openai
import pytest
from openai.types.responses import Response
from pydantic import BaseModel

from guard_middleware import enforce
from guard_middleware.dialects import RESPONSES
from guard_middleware.dialects.base import Options, Ruling
from guard_middleware.dialects.responses_stream import ResponseStreamParser
from guard_middleware.limits import Limits
from guard_middleware.types import Action
from tests.dialects.test_responses_response import COMPUTER, CUSTOM, answer, call, part, say, think
from tests.support import sdk
from tests.support.responses import encoded, events, streamed

ASK: dict[str, Any] = {"model": "m", "input": "hi"}
CITED = {"type": "url_citation", "title": "Bread", "url": "https://x.example", "start_index": 0, "end_index": 1}
FULL = answer(
    think("sum", "deep thoughts"),
    say(part("Bread needs an hour.", annotations=[CITED])),
    say({"type": "refusal", "refusal": "No more."}, id="msg_2"),
    call('{"city": "Rome"}'),
    CUSTOM,
    COMPUTER,
)


class Weather(BaseModel):
    city: str


def helper(client: openai.OpenAI, **fields: Any) -> Any:
    with client.responses.stream(**{**ASK, **fields}) as told:
        for _ in told:
            pass
        return told.get_final_response()


CALLS: dict[str, Callable[[openai.OpenAI], Any]] = {
    "create": lambda client: client.responses.create(**ASK),
    "create stream": lambda client: list(client.responses.create(**ASK, stream=True)),
    "parse": lambda client: client.responses.parse(**ASK, text_format=Weather),
    "stream helper": helper,
}
each_call = pytest.mark.parametrize("call", CALLS.values(), ids=list(CALLS))


def answering(what: Ruling, body: dict[str, Any]) -> sdk.Gateway:
    return sdk.answering(RESPONSES, what, lambda request: body, lambda request: encoded(streamed(body)))


def same(read: Any, body: dict[str, Any]) -> None:
    """``read`` is the response that the SDK makes of ``body`` itself."""
    plain = Response.model_validate(read.model_dump(exclude={"output": {"__all__": {"parsed_arguments"}}}))
    for item in plain.output:
        for inner in getattr(item, "content", None) or ():
            (inner.model_extra or {}).pop("parsed", None)
        (item.model_extra or {}).pop("parsed_arguments", None)
    assert plain.model_dump(exclude_unset=True, exclude_none=True) == Response.model_validate(body).model_dump(
        exclude_unset=True, exclude_none=True
    )


@each_call
def test_a_blocked_prompt_is_a_typed_error_and_not_retried(call: Callable[[openai.OpenAI], Any]) -> None:
    gateway = sdk.failing(RESPONSES, enforce.blocked_prompt(sdk.notice("input", Action.BLOCK)))
    with pytest.raises(openai.BadRequestError) as caught:
        call(gateway.client())
    assert (caught.value.code, caught.value.param, gateway.hits) == ("content_filter", "input", 1)


@each_call
def test_a_dead_guard_is_a_server_error_and_not_retried(call: Callable[[openai.OpenAI], Any]) -> None:
    gateway = sdk.failing(RESPONSES, sdk.unavailable())
    with pytest.raises(openai.InternalServerError) as caught:
        call(gateway.client())
    assert (caught.value.code, gateway.hits) == ("guard_unavailable", 1)


@pytest.mark.parametrize("call", ["create", "stream helper"])
def test_an_answer_that_is_let_through_is_the_same_response(call: str) -> None:
    same(CALLS[call](answering(sdk.ruling(Action.ALLOW), FULL).client()), FULL)


def test_streamed_deltas_say_what_the_answer_says() -> None:
    told = CALLS["create stream"](answering(sdk.ruling(Action.ALLOW), FULL).client())
    assert "".join(e.delta for e in told if e.type == "response.output_text.delta") == "Bread needs an hour."
    assert "".join(e.delta for e in told if e.type == "response.function_call_arguments.delta") == '{"city": "Rome"}'
    assert [event.sequence_number for event in told] == list(range(len(told)))
    same(told[-1].response, FULL)


def test_parsed_output_still_parses() -> None:
    body = answer(say(part('{"city": "Rome"}')))
    client = answering(sdk.ruling(Action.ANNOTATE), body).client()
    assert CALLS["parse"](client).output_parsed == Weather(city="Rome")
    done = helper(client, text_format=Weather)
    assert done.output_parsed == Weather(city="Rome")
    assert done.moderation.output.type == "moderation_result"


def test_a_blocked_answer_is_an_incomplete_one_with_a_refusal() -> None:
    done = CALLS["create"](answering(sdk.ruling(Action.BLOCK), FULL).client())
    assert (done.status, done.incomplete_details.reason, done.output_text) == ("incomplete", "content_filter", "")
    assert "decision d.output.0" in done.output[0].content[0].refusal
    assert done.usage.total_tokens == 5
    assert (done.moderation.input.flagged, done.moderation.output.flagged) == (False, True)
    assert CALLS["parse"](answering(sdk.ruling(Action.BLOCK), FULL).client()).output_parsed is None


def test_a_blocked_stream_ends_as_an_incomplete_response() -> None:
    told = CALLS["create stream"](answering(sdk.ruling(Action.BLOCK), FULL).client())
    assert "".join(event.delta for event in told if event.type == "response.output_text.delta") == ""
    assert told[-1].type == "response.incomplete"
    assert told[-1].response.incomplete_details.reason == "content_filter"
    with pytest.raises(RuntimeError, match=r"response\.completed"):
        helper(answering(sdk.ruling(Action.BLOCK), FULL).client())


def test_soft_blocks_are_ordinary_answers() -> None:
    soft = sdk.ruling(Action.BLOCK, soft=True)
    for name in ("create", "stream helper"):
        done = CALLS[name](answering(soft, FULL).client())
        assert (done.status, "decision d.output.0" in done.output_text) == ("completed", True)


@pytest.mark.parametrize("name", ["create", "create stream", "stream helper"])
def test_a_soft_block_of_the_prompt_is_an_ordinary_answer(name: str) -> None:
    gateway = sdk.Gateway(RESPONSES, lambda r: RESPONSES.soft_block(r, sdk.notice("input", Action.BLOCK), 1))
    done = CALLS[name](gateway.client())
    done = done[-1].response if isinstance(done, list) else done
    assert (done.status, done.created_at, done.id) == ("completed", 1, "resp_d-input-0")
    assert "decision d.input.0" in done.output_text


SPOKEN = answer(
    think("sum", "deep thoughts"), say(part("Bread needs an hour.", annotations=[])), say(part("x"), id="m2")
)
TOLD = streamed(SPOKEN)


def cut(released: int, soft: bool) -> sdk.Gateway:
    """A gateway whose stream is cut after so many frames."""
    stream = parser()
    held = [frame for event in events(TOLD[:-1]) for frame in stream.feed(event)]
    data = [stream.release(frame) for frame in held[:released]]
    data.append(stream.cut(0, sdk.notice("output", Action.BLOCK), soft))
    data.append(stream.close(sdk.ruling(Action.BLOCK)))
    return sdk.raw(RESPONSES, [stream.keep_alive, *data])


def parser() -> ResponseStreamParser:
    request = RESPONSES.parse_request({**ASK, "stream": True}, Limits(), Options())
    return ResponseStreamParser(request, Options())


@pytest.mark.parametrize("released", range(len(TOLD)))
def test_a_stream_cut_anywhere_is_read_to_its_end(released: int) -> None:
    told = CALLS["create stream"](cut(released, False).client())
    shown = "".join(event["delta"] for event in TOLD[:released] if event["type"] == "response.output_text.delta")
    assert "".join(event.delta for event in told if event.type == "response.output_text.delta") == shown
    assert (told[-1].type, told[-1].response.status) == ("response.incomplete", "incomplete")
    assert told[-1].response.output_text == shown
    with client_stream(cut(released, False)) as helped:
        assert [event.type for event in helped][-1] == "response.incomplete"


@pytest.mark.parametrize("released", range(len(TOLD)))
def test_a_soft_cut_anywhere_is_a_response_for_the_helper(released: int) -> None:
    done = helper(cut(released, True).client())
    assert done.status == "completed"
    assert "decision d.output.0" in done.output_text


def client_stream(gateway: sdk.Gateway) -> Any:
    return gateway.client().responses.stream(**ASK)


@pytest.mark.parametrize("name", ["create stream", "stream helper"])
def test_an_error_in_mid_stream_is_raised(name: str) -> None:
    stream = parser()
    held = [frame for event in events(TOLD) for frame in stream.feed(event)]
    data = [stream.release(frame) for frame in held[:6]]
    gateway = sdk.raw(RESPONSES, [*data, stream.fail(sdk.unavailable())])
    with pytest.raises(openai.APIError) as caught:
        CALLS[name](gateway.client())
    assert caught.value.code == "guard_unavailable"
