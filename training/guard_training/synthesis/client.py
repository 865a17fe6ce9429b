"""The teacher: any server that speaks OpenAI's chat completions, through the vendor's own SDK.

The SDK repeats what may be repeated (429, 5xx, lost connections) with backoff and honours ``Retry-After``. Every
attempt, the SDK's own too, passes the limiter first, and a ``Retry-After`` holds back all requests, not one.

Refuses to go on (``TeacherError``): a rejected key, an unknown model, a spent quota. What the API refuses for one row
is that row's fault; what stays out of reach is left for the next run.
"""

from __future__ import annotations

import contextlib
import email.utils
import json
import time
from collections.abc import AsyncIterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import openai
from openai.types.chat import ChatCompletion

from guard_training.synthesis.limits import Limiter, Taken

#: the bound of an answer; servers that refuse it by name get it by its older one
_BOUND, _OLDER_BOUND = "max_completion_tokens", "max_tokens"
#: seconds; a server that asks for more is not waited for by the SDK either
_LONGEST_WAIT = 120.0


class TeacherError(ValueError):
    """Nothing can be had from this teacher; the message says what to change."""


class Refused(Exception):
    """The API does not take this one request."""


class OutOfReach(Exception):
    """No answer after all repetitions."""


@dataclass(frozen=True, slots=True)
class Teacher:
    """Where the teacher is and how it is asked.

    ``temperature`` None leaves it to the server (some models take no other). ``repeats`` are the SDK's, of one
    request; ``timeout`` is in seconds.
    """

    model: str
    base_url: str | None = None
    key: str = ""
    temperature: float | None = None
    max_tokens: int = 1200
    repeats: int = 6
    timeout: float = 180.0


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer and what it cost, in tokens; 0 where the server does not say."""

    text: str | None
    finish: str | None
    prompt_tokens: int
    completion_tokens: int


@dataclass(slots=True)
class _Ticket:
    tokens: int
    taken: Taken | None = None


_ticket: ContextVar[_Ticket | None] = ContextVar("ticket", default=None)


class Client:
    """Asks one teacher; made by ``connect``."""

    def __init__(self, teacher: Teacher, api: openai.AsyncOpenAI) -> None:
        self._teacher, self._api = teacher, api
        self._bound = _BOUND

    async def ask(self, messages: list[dict[str, Any]], *, tokens: int) -> Reply:
        """One answer. ``tokens`` is what the request is likely to cost in all, for the limiter.

        Raises ``TeacherError``, ``Refused`` or ``OutOfReach``.
        """
        ticket = _Ticket(tokens)
        _ticket.set(ticket)
        try:
            answer = await self._create(messages)
        except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
            raise TeacherError(
                f"the teacher refuses: {_said(error)}; check --base-url, --teacher and the key"
            ) from None
        except openai.RateLimitError as error:
            if error.code == "insufficient_quota":
                raise TeacherError(f"the teacher's quota is spent: {_said(error)}") from None
            raise OutOfReach(_said(error)) from None
        except (openai.APIConnectionError, openai.InternalServerError) as error:
            raise OutOfReach(_said(error)) from None
        except openai.APIStatusError as error:
            about = ", ".join(str(part) for part in (error.code, error.param) if part)
            raise Refused(f"the API answered {error.status_code}{f' ({about})' if about else ''}") from None
        except (openai.APIError, json.JSONDecodeError) as error:
            raise OutOfReach(type(error).__name__) from None
        # The SDK hands over whatever came with status 200: a web page, or the error of a provider behind the server.
        if not isinstance(answer, ChatCompletion) or not answer.choices or not answer.choices[0].message:
            raise OutOfReach("what came back is no chat completion")
        usage, choice = answer.usage, answer.choices[0]
        if usage and ticket.taken:
            ticket.taken.tokens = usage.total_tokens
        return Reply(
            text=choice.message.content,
            finish="content_filter" if choice.message.refusal else choice.finish_reason,
            prompt_tokens=usage.prompt_tokens if usage else 0,
            completion_tokens=usage.completion_tokens if usage else 0,
        )

    async def _create(self, messages: list[dict[str, Any]]) -> Any:
        bound = self._bound
        try:
            return await self._send(messages, bound)
        except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
            if bound == _OLDER_BOUND or bound not in error.response.text:
                raise
            with contextlib.suppress(openai.BadRequestError, openai.UnprocessableEntityError):
                answer = await self._send(messages, _OLDER_BOUND)
                self._bound = _OLDER_BOUND
                return answer
            raise

    async def _send(self, messages: list[dict[str, Any]], bound: str) -> Any:
        limit: dict[str, Any] = {bound: self._teacher.max_tokens}
        return await self._api.chat.completions.create(
            model=self._teacher.model,
            messages=messages,  # type: ignore[arg-type]
            temperature=openai.omit if self._teacher.temperature is None else self._teacher.temperature,
            **limit,
        )


@contextlib.asynccontextmanager
async def connect(teacher: Teacher, limiter: Limiter) -> AsyncIterator[Client]:
    """A client whose every HTTP request waits for ``limiter``."""

    async def before(_: Any) -> None:
        ticket = _ticket.get()
        if ticket is not None:
            ticket.taken = await limiter.take(ticket.tokens)

    async def after(response: Any) -> None:
        if response.status_code in (429, 503):
            limiter.pause(min(retry_after(response.headers), _LONGEST_WAIT))

    hooks: dict[str, Any] = {"request": [before], "response": [after]}
    async with openai.AsyncOpenAI(
        api_key=teacher.key or "none",
        base_url=teacher.base_url,
        timeout=teacher.timeout,
        max_retries=teacher.repeats,
        http_client=openai.DefaultAsyncHttpxClient(event_hooks=hooks),
    ) as api:
        yield Client(teacher, api)


def retry_after(headers: Any) -> float:
    """Seconds that a ``Retry-After`` (seconds or a date) or ``retry-after-ms`` asks for; 0 without or unreadable."""
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        with contextlib.suppress(TypeError, ValueError):
            return max(0.0, float(headers.get(name)) * unit)
    with contextlib.suppress(TypeError, ValueError):
        return max(0.0, email.utils.parsedate_to_datetime(headers.get("retry-after")).timestamp() - time.time())
    return 0.0


def _said(error: openai.APIError) -> str:
    status = f" {error.status_code}" if isinstance(error, openai.APIStatusError) else ""
    return f"{type(error).__name__}{status}"
