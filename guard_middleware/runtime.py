"""What the requests of one process share: policies, the guard and its worker, the fetcher, telemetry, the log."""

from __future__ import annotations

import asyncio
import logging
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from guard_middleware import media
from guard_middleware.audit import AuditLog
from guard_middleware.caches import Caches
from guard_middleware.config import Config
from guard_middleware.dialects.base import Headers, Options
from guard_middleware.errors import GuardError, GuardErrorKind, RejectKind, RequestRejected
from guard_middleware.evidence import ContentDigest, Redactor
from guard_middleware.fetch import Fetcher
from guard_middleware.guard.client import GuardClient
from guard_middleware.guard.supervisor import WorkerEvent, WorkerProcess, worker_command
from guard_middleware.policy import PolicySet
from guard_middleware.telemetry import Telemetry
from guard_middleware.types import Blob, Verdict
from guard_middleware.wire import ModerationRequest

logger = logging.getLogger(__name__)

#: how long a host's start waits for the worker, its own or another's; past it the start fails
READY_SECONDS = 300.0
#: images decoded at once: the worst allowed one costs about 1 s of a core and 320 MB while it lasts
_DECODERS = 2


class Guard(Protocol):
    """Whatever answers the transaction's questions."""

    async def moderate(self, request: ModerationRequest) -> Verdict | GuardError:
        """Total, and no later than ``request.deadline`` seconds from now."""


class Runtime:
    """Built once per process from a ``Config``; ``guard`` replaces the worker that it would start.

    Raises ``ConfigError`` for what cannot work. ``remote`` says that the wrapped application is an upstream
    elsewhere.
    """

    def __init__(
        self,
        config: Config,
        *,
        guard: Guard | None = None,
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
        self.worker: WorkerProcess | None = None
        self._directory: tempfile.TemporaryDirectory[str] | None = None
        self._client: GuardClient | None = None
        if guard is None:
            guard = self._client = GuardClient(self._worker_address())
            self._started = False
        else:
            self._started = True
        self.caches = Caches(config, guard, self.telemetry)
        #: answers the transaction's questions, from what is known where that is enough
        self.guard: Guard = self.caches.guard
        self._starting = asyncio.Lock()

    async def start(self, *, wait: bool = False) -> None:
        """Starts the worker where it is ours; ``wait`` returns when it can moderate, or raises ``GuardError``."""
        if not self._started:
            async with self._starting:
                if not self._started and self.worker is not None:
                    await self.worker.start()
                self._started = True
        if wait and self.worker is not None:
            await self.worker.wait_ready(READY_SECONDS)
        elif wait:
            await self._wait_for_other()

    async def ready(self) -> bool:
        """Whether a request could be moderated now."""
        return self._client is None or await self._client.ready()

    async def aclose(self) -> None:
        """Ends the worker and writes what telemetry and the log still hold."""
        await self.caches.aclose()
        if self._client is not None:
            await self._client.aclose()
        if self.worker is not None:
            await self.worker.stop()
        if self._fetcher is not None:
            self._fetcher.close()
        self._decoders.shutdown(wait=False, cancel_futures=True)
        await self.telemetry.aclose()
        await self.audit.aclose()
        if self._directory is not None:
            self._directory.cleanup()

    def public_headers(self, headers: Headers) -> Headers:
        """Without the tenant header, which is between the operator's auth layer and us, however it is spelt."""
        return tuple(pair for pair in headers if _folded(pair[0]) != self._tenant_header)

    async def image(self, uri: str) -> Blob:
        """The canonical image at a ``data:`` or http(s) URL, decoded in a thread unless these very bytes were before.

        Raises ``RequestRejected``.
        """
        limits = self.config.limits
        sent: bytes | str = await self.fetch(uri) if media.classify(uri) == "http" else uri

        def decode() -> Blob:
            return media.canonicalise(media.decode_data_url(sent, limits) if isinstance(sent, str) else sent, limits)

        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._decoders, self.caches.images.get, sent, decode)

    async def fetch(self, url: str) -> bytes:
        """The bytes of an image at a public URL; raises ``RequestRejected``."""
        if self._fetcher is None:
            raise RequestRejected(RejectKind.FORBIDDEN_URL, "image URLs are not fetched here; send a data: URL")
        return await self._fetcher.fetch(url)

    async def _wait_for_other(self) -> None:
        """Until the worker that somebody else starts can moderate; raises ``GuardError``."""
        worker = self.config.worker
        where, pause = worker.url or worker.socket, 0.05
        try:
            async with asyncio.timeout(READY_SECONDS):
                while not await self.ready():
                    if pause == 0.05:
                        logger.warning("waiting for the guard worker at %s", where)
                    await asyncio.sleep(pause)
                    pause = min(pause * 2, 1.0)
        except TimeoutError:
            raise GuardError(
                GuardErrorKind.UNAVAILABLE,
                f"no guard worker was ready at {where} within {READY_SECONDS:g} s; start `guard-gateway worker` there",
            ) from None

    def _worker_address(self) -> str:
        worker = self.config.worker
        if worker.url is not None:
            return worker.url
        if worker.socket is not None:
            address = worker.socket
        else:
            self._directory = tempfile.TemporaryDirectory(prefix="guard-")  # mode 0700
            address = str(Path(self._directory.name) / "worker.sock")
        if worker.managed:
            argv = worker_command(worker.model, address, threads=worker.threads)
            self.worker = WorkerProcess(argv, address, on_event=_log)
        return address


def _folded(name: bytes) -> bytes:
    return name.lower().replace(b"_", b"-")  # as CGI-style servers read it


def _log(event: WorkerEvent) -> None:
    if event.kind == "log":
        logger.info("worker %d: %s", event.pid, event.line)
    elif event.kind == "exited" and event.delay is not None:
        logger.error("worker %d exited with %s, restarted in %g s", event.pid, event.returncode, event.delay)
    else:
        logger.info("worker %d %s", event.pid, event.kind)
