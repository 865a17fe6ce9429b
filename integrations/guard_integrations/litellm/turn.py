"""One request of LiteLLM as it goes through the guard: a ``GuardedExchange``, its record, and who asks.

LiteLLM calls separate hooks for what is one exchange here. ``Turn`` lives from the first of them to the last and, like
the decision log, has its record when it is over. A turn whose request ends without the last hook is closed with the
task that served it, and recorded as dropped.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import hashlib
import re
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from guard_integrations.litellm import wire
from guard_integrations.litellm.wire import Route
from guard_middleware.audit import AuditLog
from guard_middleware.dialects.base import Headers
from guard_middleware.exchange import Answer, GuardedExchange
from guard_middleware.runtime import Runtime
from guard_middleware.types import Record

JSON: Headers = ((b"content-type", b"application/json"),)
EVENTS: Headers = ((b"content-type", b"text/event-stream"),)

#: a virtual key as LiteLLM keeps it
_HASHED = re.compile(r"[0-9a-f]{64}")

_records: contextvars.ContextVar[list[Record] | None] = contextvars.ContextVar("guard_litellm_records", default=None)
_closing: set[asyncio.Task[None]] = set()


class Records:
    """The runtime's decision log, which also tells the turn that a record belongs to."""

    def __init__(self, log: AuditLog) -> None:
        self._log = log

    def __getattr__(self, name: str) -> Any:
        return getattr(self._log, name)

    def write(self, record: Record, *, trace_id: str | None = None) -> None:
        if (found := _records.get()) is not None:
            found.append(record)
        self._log.write(record, trace_id=trace_id)


class Refused(Exception):
    """The guard's own answer in place of the model's; ``status`` 200 is a soft refusal."""

    def __init__(self, status: int, headers: Headers, body: bytes) -> None:
        self.status, self.headers, self.body = status, headers, body
        super().__init__(f"refused with {status}")


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks. ``key`` is LiteLLM's hash of the virtual key; ``names`` are tenants, the most specific first."""

    key: str = ""
    names: Sequence[str] = ()
    span: Any = field(default=None, repr=False)

    def tenant(self, runtime: Runtime) -> str | None:
        """The first name that a rule of the configuration is about, else the first of all."""
        rules = {rule.tenant for rule in runtime.config.tenants.match}
        return next((name for name in self.names if name in rules), next(iter(self.names), None))


def caller_of(user_api_key_dict: Any, data: Mapping[str, Any]) -> Caller:
    """Who asks, as LiteLLM authenticated it: ``key:``, ``team:`` and ``model:`` names, the most specific first."""

    def of(name: str) -> str | None:
        value = getattr(user_api_key_dict, name, None)
        return value if isinstance(value, str) and value else None

    key = of("api_key") or ""
    hashed = key if _HASHED.fullmatch(key) else hashlib.sha256(key.encode()).hexdigest() if key else ""
    named = [
        ("key", of("key_alias")),
        ("key", hashed),
        ("team", of("team_alias")),
        ("team", of("team_id")),
        ("model", data.get("model") if isinstance(data.get("model"), str) else None),
    ]
    names = tuple(f"{kind}:{value}" for kind, value in named if value)
    return Caller(hashed, names, getattr(user_api_key_dict, "parent_otel_span", None))


class Turn:
    """Use ``begin``. ``headers`` are what the guard says of the answer; ``record`` is there once ``close`` returned."""

    def __init__(self, runtime: Runtime, route: Route, body: dict[str, Any], caller: Caller) -> None:
        if not isinstance(runtime.audit, Records):
            runtime.audit = Records(runtime.audit)  # type: ignore[assignment]
        self.route, self.body = route, body
        self.headers: Headers = ()
        #: whether LiteLLM relays the answer itself, its errors included
        self.relayed = False
        #: whether it is a deployment's, without a proxy around it
        self.deployed = False
        #: whether an answer was given, so that no second one can come
        self.answered = False
        #: whether LiteLLM's log has its entries
        self.reported = False
        self._found: list[Record] = []
        headers = (*JSON, (b"authorization", b"Bearer " + caller.key.encode())) if caller.key else JSON
        self._span = caller.span
        self._task: asyncio.Task[Any] | None = None
        self._exchange = GuardedExchange(
            runtime, route.path, wire.encode(body), headers=headers, tenant=caller.tenant(runtime)
        )

    @property
    def record(self) -> Record | None:
        return self._found[-1] if self._found else None

    async def begin(self) -> dict[str, Any]:
        """The body to send; raises ``Refused``. Where a policy races, it comes before the verdict."""
        token = _records.set(self._found)
        try:
            with _inside(self._span):
                await self._exchange.__aenter__()
        finally:
            _records.reset(token)
        self._task = asyncio.current_task()
        if self._task is not None:
            self._task.add_done_callback(self._abandon)
        sent = await self._exchange.request()
        if isinstance(sent, Answer):
            raise await self._refused(sent)
        value: dict[str, Any] = wire.decode(sent)
        return value

    async def whole(self, body: bytes, *, status: int = 200, headers: Headers = JSON) -> Any:
        """The value of an answer's ``body`` as it may be released; raises ``Refused``."""
        self.answered = True
        answer = await self._exchange.answer(status, headers, _once(body))
        if answer.status != 200:
            raise await self._refused(answer)
        released = await answer.read()
        self.headers = answer.headers
        await self.close()
        return wire.decode(released)

    async def upstream_failed(self, status: int) -> Refused:
        """What to say in place of an upstream's refusal."""
        try:
            await self.whole(b"{}", status=status if 400 <= status <= 599 else 502)
        except Refused as answer:
            return answer
        raise AssertionError("an error that was released")

    async def streamed(
        self, chunks: AsyncIterator[bytes], *, status: int = 200, headers: Headers = EVENTS
    ) -> AsyncIterator[bytes]:
        """The events that may be released; raises ``Refused`` before the first of them."""
        self.answered = True
        answer = await self._exchange.answer(status, headers, chunks)
        if answer.status != 200:
            raise await self._refused(answer)
        self.headers = answer.headers
        return answer.chunks

    async def close(self) -> None:
        """Ends the exchange, which makes its record."""
        self.answered = True
        if self._task is not None:
            self._task.remove_done_callback(self._abandon)
        await self._exchange.aclose()

    async def _refused(self, answer: Answer) -> Refused:
        body = await answer.read()
        self.headers = answer.headers
        await self.close()
        return Refused(answer.status, answer.headers, body)

    def _abandon(self, task: asyncio.Task[Any]) -> None:
        closing = asyncio.ensure_future(self.close())
        _closing.add(closing)
        closing.add_done_callback(_closing.discard)


async def _once(body: bytes) -> AsyncIterator[bytes]:
    yield body


@contextlib.contextmanager
def _inside(span: Any) -> Iterator[None]:
    """As if ``span``, which LiteLLM carries along, were the current one: the guard's spans come below it."""
    if span is None:
        yield
        return
    from opentelemetry import trace

    with trace.use_span(span, end_on_exit=False, record_exception=False, set_status_on_exception=False):
        yield
