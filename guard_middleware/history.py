"""What was said before an answer that a client continues by its id (``previous_response_id``).

The upstream keeps such conversations itself, so a follow-up holds only the new words, and the guard would judge those
alone. Each answer that was released is therefore remembered with its conversation, under its id and who asked, bounded
by count, bytes and age. A follow-up is judged after all that, or refused: an id that is not known here, that belongs to
somebody else or whose conversation is gone is refused in the same words.

Images are kept once each, however many turns show them.

Refuses: ids of answers that did not pass here (``invalid_request``). Nothing that a client sends can stand for the
history: only what this gateway released does.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import secrets
from collections.abc import Callable
from dataclasses import replace

from guard_middleware.errors import RejectKind, RequestRejected
from guard_middleware.policy import CREDENTIALS
from guard_middleware.stores import Store
from guard_middleware.types import Blob, Conversation, Message, Part
from guard_middleware.wire import ModerationRequest, WireError, decode_request, encode_request

logger = logging.getLogger(__name__)

#: a longer id is no id of an answer
_MAX_ID = 512


class History:
    """Conversations by answer. ``store`` None remembers nothing, so that every continuation is refused.

    ``max_bytes`` bounds one conversation, its images included.
    """

    def __init__(self, store: Store | None, *, max_bytes: int) -> None:
        self._store, self._max = store, max_bytes

    async def remember(self, scope: str, answer_id: str, conversation: Conversation) -> None:
        """Keeps a conversation that ends with the answer ``answer_id``. Never raises."""
        if self._store is None or len(answer_id) > _MAX_ID:
            return
        images = {blob.digest: blob for blob in conversation.blobs()}
        try:
            entry = encode_request(ModerationRequest("", _each(conversation, _thin), "input", 1.0))
        except WireError:
            return
        if len(entry) + sum(len(blob.data) for blob in images.values()) > self._max:
            logger.info("a conversation of more than %d bytes is not remembered", self._max)
            return
        keys = [_image_key(scope, digest) for digest in images]
        present = await self._store.touch(keys)
        missing = [(k, blob) for k, blob, there in zip(keys, images.values(), present, strict=True) if not there]
        await self._store.put({**{key: blob.data for key, blob in missing}, _key(scope, answer_id): entry})

    async def find(self, scope: str, answer_id: str) -> Conversation:
        """The conversation that the answer ended; raises ``RequestRejected`` where it is not known to this caller."""
        unknown = RequestRejected(
            RejectKind.INVALID_REQUEST,
            "No answer with this id is known here: it did not pass this service, was not for you, or is too old. "
            "Send the whole conversation instead.",
            param="previous_response_id",
        )
        if self._store is None or len(answer_id) > _MAX_ID:
            raise unknown
        (entry,) = await self._store.get([_key(scope, answer_id)])
        if entry is None:
            raise unknown
        try:
            conversation = decode_request(entry).conversation
        except WireError:
            raise unknown from None
        digests = list(dict.fromkeys(blob.data.hex() for blob in conversation.blobs()))
        found = dict(zip(digests, await self._store.get([_image_key(scope, d) for d in digests]), strict=True))

        def whole(blob: Blob) -> Blob:
            data = found[blob.data.hex()]
            filled = None if data is None else Blob(blob.mime_type, data)
            if filled is None or filled.digest != blob.data.hex():
                raise unknown
            return filled

        return _each(conversation, whole)

    async def aclose(self) -> None:
        if self._store is not None:
            await self._store.aclose()


class Scopes:
    """Who asked, as a word that tells nothing of it: answers are found again only by the same caller.

    That is the tenant where a trusted peer named one, else whatever the client proves itself with; all who bring
    nothing share one scope. ``key`` makes the words the same in every process that has it.
    """

    HEADERS = (*CREDENTIALS, b"openai-organization", b"openai-project")

    def __init__(self, key: bytes | None = None) -> None:
        self._key = key or secrets.token_bytes(32)

    def of(self, tenant: str | None, headers: tuple[tuple[bytes, bytes], ...]) -> str:
        if tenant is not None:
            parts = [b"tenant", tenant.encode("utf-8", "surrogatepass")]
        else:
            parts = [b"client", *(part for pair in sorted(headers) if pair[0] in self.HEADERS for part in pair)]
        data = b"".join(len(part).to_bytes(4, "big") + part for part in parts)
        return hmac.digest(self._key, b"scope" + data, hashlib.sha256).hex()


def _key(scope: str, answer_id: str) -> bytes:
    return hashlib.sha256(b"answer\0" + scope.encode() + answer_id.encode("utf-8", "surrogatepass")).digest()


def _image_key(scope: str, digest: str) -> bytes:
    return hashlib.sha256(b"image\0" + scope.encode() + digest.encode()).digest()


def _thin(blob: Blob) -> Blob:
    """The digest in place of the bytes."""
    return Blob(blob.mime_type, bytes.fromhex(blob.digest))


def _each(conversation: Conversation, change: Callable[[Blob], Blob]) -> Conversation:
    def message(one: Message) -> Message:
        parts: tuple[Part, ...] = tuple(change(part) if isinstance(part, Blob) else part for part in one.parts)
        return replace(one, parts=parts)

    answer = conversation.answer
    return replace(
        conversation,
        messages=tuple(map(message, conversation.messages)),
        answer=None if answer is None else message(answer),
    )
