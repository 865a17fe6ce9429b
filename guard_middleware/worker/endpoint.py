"""A guard that runs elsewhere: ``app.Guard`` on an OpenAI-compatible endpoint, in one of the formats of ``guards``.

For teams that already serve a guard (vLLM, SGLang, any ``/v1/chat/completions``). The worker keeps its socket, its
deadlines and its metrics; no model and no torch are in its process.

What an endpoint cannot do, and an engine in this process can:

- the server tokenises text, so control strings in a user's words are split visibly (``guards.base.Neutraliser``);
- the prompt's length in tokens is the server's to know: content past ``max_characters`` is ``too_long`` here, a
  prompt past the model's context is ``too_long`` when the server says so. A server that cuts prompts in silence
  (Ollama past ``num_ctx``, SGLang with ``--allow-auto-truncate``) must not be used;
- the revision names the model, the format, the policy text and whether drawn text is read, not the weights: say
  ``revision`` when they change.

Bounds: ``concurrency`` calls at once, ``max_queue`` that wait (more are ``overloaded``), each within the question's
deadline.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from urllib.parse import urlsplit

from PIL import Image

from guard_middleware.errors import ConfigError, GuardError, GuardErrorKind
from guard_middleware.types import Blob, Conversation, Label, Message, Text, Usage, Verdict
from guard_middleware.wire import ModerationRequest
from guard_middleware.worker.completions import Server, score
from guard_middleware.worker.guards.base import GuardFormat, Modality, Question
from guard_middleware.worker.judged import UNSURE, Found, Judged, after, merged, settled, unsure
from guard_middleware.worker.reading import DrawnText
from guard_middleware.worker.windows import texts

logger = logging.getLogger(__name__)

_LIST_SECONDS, _WARM_UP_SECONDS = 10.0, 120.0


@dataclass(frozen=True, slots=True)
class EndpointOptions:
    """``url`` is the server's root or its ``/v1``. ``ignore`` is content that the guard does not read and that another
    guard of an ensemble judges; where it is not ignored, such content is ``GuardError(media)``."""

    url: str
    model: str
    key: str | None = field(default=None, repr=False)
    revision: str = ""
    ignore: frozenset[Modality] = frozenset()
    concurrency: int = 32
    max_queue: int = 256
    max_characters: int = 100_000

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
            remedy = "write http://HOST:PORT or https://HOST/v1; a key goes into the variable GUARD_ENDPOINT_KEY"
            raise ConfigError("--endpoint is not the URL of a server", remedy=remedy)

    @property
    def base(self) -> str:
        root = self.url.rstrip("/")
        return root if root.endswith("/v1") else f"{root}/v1"


class EndpointGuard:
    """``app.Guard``. Make it with ``load``; use it from one event loop."""

    def __init__(
        self, form: GuardFormat, options: EndpointOptions, *, policy: str | None = None, drawn: DrawnText | None = None
    ) -> None:
        unread = form.modalities & options.ignore
        if unread:
            remedy = "--ignore names what the guard does not read"
            raise ConfigError(f"{form.name} reads {', '.join(sorted(unread))} and is told not to", remedy=remedy)
        self._format, self._options, self._logprobs = form, options, True
        self._server, self._drawn = Server(options.base, options.key), drawn or DrawnText()
        reads = self._drawn.by_default
        named = json.dumps([form.name, options.model, options.revision, policy, sorted(options.ignore), reads])
        self._revision = hashlib.sha256(named.encode()).hexdigest()[:16]
        self._turns = asyncio.Semaphore(options.concurrency)
        self._asked = self._running = 0

    @property
    def model(self) -> str:
        return self._options.model

    @property
    def revision(self) -> str:
        return self._revision

    async def moderate(self, request: ModerationRequest, deadline: float) -> Verdict:
        """See ``app.Guard``."""
        loop = asyncio.get_running_loop()
        started, conversation, mode = loop.time(), request.conversation, request.judging.mode
        self._check(conversation)
        drawn = await self._drawn.read(conversation.blobs(), request.reader, deadline)
        read = loop.time()

        async def questions(think: bool) -> Sequence[Question]:
            return await asyncio.to_thread(self._format.prompt, conversation, drawn, think=think)

        asked = await questions(mode == "reason")
        found = await self._ask(asked, deadline)
        if mode == "hybrid" and self._format.thinks:
            due = [n for n, one in enumerate(found) if unsure(one, request)]
            if due:
                longer = await questions(True)
                thought = await self._ask([longer[n] for n in due], deadline)
                for n, one in zip(due, thought, strict=True):
                    found[n] = after(found[n], one)
        judged, usage = settled(asked, found)
        timings = (("reader", read - started), ("generate", loop.time() - read))
        return replace(self._verdict(request, judged, usage), drawn_text=drawn, timings=timings)

    def gauges(self) -> Mapping[str, float]:
        return {"queue_depth": self._asked - self._running, "running": self._running, "reading": self._drawn.reading}

    def stalled(self) -> float:
        return 0.0  # nothing runs here

    async def aclose(self) -> None:
        self._drawn.close()
        await self._server.aclose()

    async def warm_up(self) -> None:
        """The model's name and one real verdict; raises ``ConfigError`` for what an operator can put right.

        A server that refuses log probabilities, or leaves them out, is asked without them from then on.
        """
        await self._find_model()
        part = Text("Hello, how are you?") if "text" in self._format.modalities else Blob("image/png", _white())
        questions = self._format.prompt(Conversation((Message("user", (part,)),)))
        for self._logprobs in (True, False):
            try:
                found = await self._ask(questions, asyncio.get_running_loop().time() + _WARM_UP_SECONDS)
                judged, _ = settled(questions, found)
                self._logprobs = any(one.score is not None for one in judged)
            except GuardError as error:
                if error.kind in (GuardErrorKind.INTERNAL, GuardErrorKind.MEDIA):
                    refused = error
                    continue
                if error.kind is GuardErrorKind.TOO_LONG:
                    tokens = max(question.max_tokens for question in questions)
                    remedy = "serve it with a longer context, such as vLLM's --max-model-len 16384"
                    why = f"the endpoint leaves no room for {tokens} tokens of output"
                    raise ConfigError(why, remedy=remedy) from None
                if error.kind not in (GuardErrorKind.UNPARSEABLE, GuardErrorKind.TRUNCATED):
                    raise
                logger.warning("the warm-up gave no verdict: %s", error)
            if not self._logprobs:
                logger.warning(
                    "the endpoint gives no log probabilities: scores are 0 or 1, mode hybrid always thinks, and an "
                    "ensemble by first_confident must not ask this guard before another"
                )
            return
        remedy = f"check that it serves {self.model} for chat completions, and its log"
        raise ConfigError(f"the endpoint refuses questions: {refused.message}", remedy=remedy)

    async def _find_model(self) -> None:
        """A server that does not list its models is taken at its word."""
        try:
            async with asyncio.timeout(_LIST_SECONDS):
                status, served = await self._server.models()
        except TimeoutError:
            raise GuardError(GuardErrorKind.UNAVAILABLE, "the endpoint does not answer") from None
        if status in (401, 403):
            raise ConfigError("the endpoint wants a key", remedy="set the variable GUARD_ENDPOINT_KEY")
        if served and self.model not in served:
            remedy = f"--endpoint-model is one of {', '.join(served[:10])}"
            raise ConfigError(f"the endpoint serves no model {self.model!r}", remedy=remedy)

    def _check(self, conversation: Conversation) -> None:
        readable = self._format.modalities | self._options.ignore
        if conversation.blobs() and "image" not in readable:
            raise GuardError(GuardErrorKind.MEDIA, f"{self._format.name} reads no images")
        if "text" not in readable and _says(conversation):
            raise GuardError(GuardErrorKind.MEDIA, f"{self._format.name} reads no text")
        characters = sum(map(len, texts(conversation)))
        if characters > self._options.max_characters:
            raise GuardError(GuardErrorKind.TOO_LONG, f"{characters} characters")

    async def _ask(self, questions: Sequence[Question], deadline: float) -> list[Found]:
        """What each question found. Raises ``GuardError(overloaded)``."""
        if self._asked and self._asked + len(questions) > self._options.concurrency + self._options.max_queue:
            raise GuardError(GuardErrorKind.OVERLOADED, "too many questions wait for the endpoint", retry_after=1.0)
        self._asked += len(questions)
        try:
            return await asyncio.gather(*(self._ask_one(question, deadline) for question in questions))
        finally:
            self._asked -= len(questions)

    async def _ask_one(self, question: Question, deadline: float) -> Found:
        try:
            async with asyncio.timeout_at(deadline), self._turns:
                self._running += 1
                try:
                    completion = await self._server.complete(question, self.model, logprobs=self._logprobs)
                finally:
                    self._running -= 1
            parsed = self._format.parse(completion.output, question)
        except TimeoutError:
            return GuardError(GuardErrorKind.TIMEOUT, "no answer of the endpoint before the deadline")
        except GuardError as error:
            return error
        judged = []
        for finding in parsed.findings:
            probability = score(completion, finding.at, self._format.words)
            if probability is None and (finding.at < 0 or completion.tokens):
                probability = UNSURE[finding.label]
            judged.append(Judged(finding.target, finding.label, probability, parsed))
        return judged, completion.usage

    def _verdict(self, request: ModerationRequest, judged: Sequence[Judged], usage: Usage) -> Verdict:
        harmful = [one for one in judged if one.label == "harmful"]
        reasons = [one.parsed.reasoning for one in (*reversed(harmful), *reversed(judged)) if one.parsed.reasoning]
        request_label, request_score = merged(judged, "request") or _IGNORED
        response_label, response_score = None, None
        if request.conversation.answer is not None:
            response_label, response_score = merged(judged, "response") or _IGNORED
        return Verdict(
            request=request_label,
            response=response_label,
            request_score=request_score,
            response_score=response_score,
            reasoning=reasons[0] if reasons else "",
            usage=usage,
            model=self.model,
            revision=self.revision,
            categories=tuple(dict.fromkeys(name for one in harmful for name in one.parsed.categories)),
            judging=request.judging,
            thought=bool(reasons),
            ignored=self._ignored(request.conversation),
        )

    def _ignored(self, conversation: Conversation) -> tuple[Modality, ...]:
        there: dict[Modality, bool] = {"text": _says(conversation), "image": bool(conversation.blobs())}
        return tuple(kind for kind in there if there[kind] and kind in self._options.ignore)


def _says(conversation: Conversation) -> bool:
    return any(text.strip() for text in texts(conversation))


#: what stands for content that the operator has the guard ignore
_IGNORED: tuple[Label, float] = ("unharmful", 0.0)


async def load(
    form: GuardFormat, options: EndpointOptions, *, policy: str | None = None, drawn: DrawnText | None = None
) -> EndpointGuard:
    """A guard that has given one verdict; raises ``ConfigError`` or ``GuardError``."""
    guard = EndpointGuard(form, options, policy=policy, drawn=drawn)
    try:
        await guard.warm_up()
    except BaseException:
        await guard.aclose()
        raise
    return guard


def _white() -> bytes:
    page = io.BytesIO()
    Image.new("RGB", (64, 64), "white").save(page, "PNG")
    return page.getvalue()
