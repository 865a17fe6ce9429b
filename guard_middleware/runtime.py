"""What the requests of one process share: policies, the guard and its worker, the fetcher, telemetry, the log."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from guard_middleware.audit import AuditLog
from guard_middleware.caches import Caches
from guard_middleware.config import DEFAULT_GUARD, Config, SourcePolicy, Weights, Worker
from guard_middleware.dialects.base import Headers, Options
from guard_middleware.ensemble import EnsembleGuard
from guard_middleware.errors import RejectKind, RequestRejected
from guard_middleware.evidence import ContentDigest, Redactor
from guard_middleware.fetch import Fetcher
from guard_middleware.guard.supervisor import WorkerProcess, worker_command
from guard_middleware.guard.workers import Workers
from guard_middleware.media import canonicalise
from guard_middleware.policy import PolicySet
from guard_middleware.references import classify, decode_data_url
from guard_middleware.telemetry import Telemetry
from guard_middleware.types import Blob, Source
from guard_middleware.weights import golden
from guard_middleware.weights.directory import WeightsDirectory
from guard_middleware.weights.follower import Follower, Trials
from guard_middleware.weights.seats import Compared
from guard_middleware.weights.state import Entry
from guard_middleware.wire import Guard

#: images decoded at once: the worst allowed one costs about 1 s of a core and 320 MB while it lasts
_DECODERS = 2


class Runtime:
    """Built once per process from a ``Config``; ``guard`` replaces the worker that it would start, and ``guards`` the
    named ones.

    Raises ``ConfigError`` for what cannot work. ``remote`` says that the wrapped application is an upstream
    elsewhere.
    """

    def __init__(
        self,
        config: Config,
        *,
        guard: Guard | None = None,
        guards: Mapping[str, Guard] | None = None,
        telemetry: Telemetry | None = None,
        remote: bool = False,
    ) -> None:
        self.config, self.remote = config, remote
        self.policies = PolicySet(config)
        self.options = {name: Options(section.extra_fields) for name, section in config.dialects}
        audit = config.audit
        digest = ContentDigest.from_env(audit.hmac_key_env)
        redactor = Redactor([(rule.pattern, rule.replacement) for rule in audit.redact])
        self.telemetry = telemetry or Telemetry.from_env(
            config.telemetry.service_name,
            capture_content=config.telemetry.capture_content,
            reasoning=audit.include_reasoning,
            redactor=redactor,
            digest=digest,
        )
        self.audit = AuditLog(
            audit.path,
            digest=digest,
            redactor=redactor,
            reasoning=audit.include_reasoning,
            capture_content=audit.capture_content,
        )
        header = config.tenants.header
        self._tenant_header = _folded(header.encode("latin-1")) if header else b""
        self._decoders = ThreadPoolExecutor(_DECODERS, thread_name_prefix="guard-media")
        self._fetcher = (
            Fetcher(allow=frozenset(config.images.allow), limits=config.limits) if config.images.fetch else None
        )
        given = {**({} if guard is None else {DEFAULT_GUARD: guard}), **(guards or {})}
        places = {name: at for name, at in config.guards_in_use().items() if name not in given}
        self.workers = Workers({name: at for name, at in places.items() if at.weights is None})
        #: by name, the guards whose weights can change
        self.weights = {name: self._follower(name, at, at.weights) for name, at in places.items() if at.weights}
        self.caches = Caches(config, {**given, **self.workers.clients, **self.weights}, self.telemetry)
        for name, client in self.workers.clients.items():
            client.on_lost = self.caches.guards[name].unknown
        for name, follower in self.weights.items():
            cached = self.caches.guards[name]
            follower.on_serving, follower.on_unknown = cached.serving, cached.unknown

    @property
    def worker(self) -> WorkerProcess | None:
        """The process of the worker in the section ``worker``, where it is ours."""
        return self.workers.processes.get(DEFAULT_GUARD)

    def guard(self, rules: SourcePolicy) -> Guard:
        """Whoever answers the questions of one source of a policy, from what is known where that is enough."""
        if rules.ensemble is None:
            return self.caches.guards[DEFAULT_GUARD]
        return EnsembleGuard(rules, self.caches.guards)

    async def start(self, *, wait: bool = False) -> None:
        """Starts the workers that are ours; ``wait`` returns when all can moderate, or raises ``GuardError``."""
        await self.workers.start()
        for follower in self.weights.values():
            await follower.start()
        if wait:
            await self.workers.wait_ready()
            for follower in self.weights.values():
                await follower.wait_ready()

    async def ready(self) -> bool:
        """Whether a request could be moderated now."""
        return await self.workers.ready() and all([await follower.ready() for follower in self.weights.values()])

    async def aclose(self) -> None:
        """Ends the workers and writes what telemetry and the log still hold."""
        await self.caches.aclose()
        await self.workers.aclose()
        for follower in self.weights.values():
            await follower.aclose()
        if self._fetcher is not None:
            self._fetcher.close()
        self._decoders.shutdown(wait=False, cancel_futures=True)
        await self.telemetry.aclose()
        await self.audit.aclose()

    def public_headers(self, headers: Headers) -> Headers:
        """Without the tenant header, which is between the operator's auth layer and us, however it is spelt."""
        return tuple(pair for pair in headers if _folded(pair[0]) != self._tenant_header)

    async def image(self, uri: str) -> Blob:
        """The canonical image at a ``data:`` or http(s) URL, decoded in a thread unless these very bytes were before.

        Raises ``RequestRejected``.
        """
        limits = self.config.limits
        sent: bytes | str = await self.fetch(uri) if classify(uri) == "http" else uri

        def decode() -> Blob:
            return canonicalise(decode_data_url(sent, limits) if isinstance(sent, str) else sent, limits)

        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._decoders, self.caches.images.get, sent, decode)

    async def fetch(self, url: str) -> bytes:
        """The bytes of an image at a public URL; raises ``RequestRejected``."""
        if self._fetcher is None:
            raise RequestRejected(RejectKind.FORBIDDEN_URL, "image URLs are not fetched here; send a data: URL")
        return await self._fetcher.fetch(url)

    def _follower(self, name: str, place: Worker, section: Weights) -> Follower:
        config = self.config
        applied = {config.default_policy, *(rule.policy for rule in config.routes)}
        applied |= {rule.policy for rule in config.tenants.match}
        sources: list[tuple[Source, SourcePolicy]] = []
        for key in sorted(applied):
            sources += [("input", config.policies[key].input), ("output", config.policies[key].output)]
        askings = [
            golden.Asking(source, rules.judging, rules.threshold, rules.reader)
            for source, rules in sources
            if rules.moderate and name in (rules.ensemble.of if rules.ensemble else (DEFAULT_GUARD,))
        ]
        askings = list(dict.fromkeys(askings))
        trials = Trials(
            cases=golden.load(Path(section.golden) if section.golden else golden.BUNDLED, askings),
            share=section.shadow,
            keep=section.keep,
        )

        def told(entry: Entry) -> None:
            self.telemetry.weights(entry.what)
            self.audit.note("guard_middleware.weights/1", {"guard": name, **asdict(entry)})

        def compared(found: Compared) -> None:
            self.telemetry.shadow(found.result, found.source)
            self.audit.note("guard_middleware.shadow/1", {"guard": name, **found.told()})

        follower = Follower(
            WeightsDirectory(section.directory, place.model),
            trials,
            lambda model, socket: worker_command(model, socket, threads=place.threads, options=place.options),
            on_entry=told,
            on_compared=compared,
        )
        follower.switch.askings = askings
        return follower


def _folded(name: bytes) -> bytes:
    return name.lower().replace(b"_", b"-")  # as CGI-style servers read it
