"""A streamed legacy Completions answer; see ``chunk_stream``.

Refuses besides (``UpstreamError``): unknown fields that carry content; text of a choice after its ``finish_reason``.
"""

from __future__ import annotations

from collections.abc import Iterator

from guard_middleware.dialects.base import Frame, Notice, Said
from guard_middleware.dialects.chunk_stream import Choice, ChunkStreamParser, Piece, gather
from guard_middleware.dialects.completions_fields import CHOICE, COMPLETION
from guard_middleware.dialects.completions_response import blocked, spoken
from guard_middleware.dialects.fields import admit, as_word, in_order, invalid
from guard_middleware.strictjson import JSONValue
from guard_middleware.types import Part


class TextStreamParser(ChunkStreamParser[Choice]):
    """``base.StreamParser`` of this API."""

    table = COMPLETION
    identity = ("id", "object", "created", "model", "system_fingerprint")
    prompt_param = "prompt"

    def _new(self) -> Choice:
        return Choice()

    def _said(self, choice: Choice) -> list[Part]:
        return spoken({name: "".join(pieces) for name, pieces in choice.texts.items()})

    def _blocked(self, index: int, notice: Notice, soft: bool) -> dict[str, JSONValue]:
        return blocked(index, notice.message, soft)

    def _read(
        self,
        state: Choice,
        index: int,
        source: dict[str, JSONValue],
        where: str,
        body: dict[str, JSONValue],
        whole: bool,
    ) -> Iterator[Frame]:
        outer = admit(CHOICE, source, where, self._options)
        gather(state.texts, outer.texts)
        gather(state.extras, outer.extras)
        said = tuple(Said(name, text, name == "reasoning") for name, text in outer.texts.items() if text)
        whole = whole or bool(outer.extras)
        if state.finish_reason is not None:
            if said or whole:
                raise invalid(f"{where}.text", "has content after its finish_reason")
            return
        kept = in_order(source, outer.kept | {"index": index})
        kept |= {"text": outer.texts.get("text", ""), "logprobs": None, "finish_reason": None}
        if outer.kept.get("finish_reason"):  # some servers write "" until the end
            state.finish_reason = as_word(outer.kept["finish_reason"], f"{where}.finish_reason")
            rest = {name: item for name, item in kept.items() if name not in outer.texts | outer.extras}
            self._endings[index] = Piece(self._head(body), rest | {"text": "", "finish_reason": state.finish_reason})
        if state.finish_reason is None or said or whole:
            yield Frame(index, Piece(body, kept), said, whole)
