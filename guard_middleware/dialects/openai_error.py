"""The error body that every OpenAI-shaped API shares; also the answer where no dialect is known."""

from __future__ import annotations

from guard_middleware.dialects.answer_shared import JSON_TYPE
from guard_middleware.dialects.base import PublicError, Reply
from guard_middleware.strictjson import JSONValue, dumps


def openai_error(error: PublicError, prompt_param: str | None = None) -> Reply:
    """``error`` is an object, because SDKs read ``code`` from nothing else.

    ``prompt_param`` is the field that holds the prompt in the dialect, named where the error is about it.
    """
    inner: dict[str, JSONValue] = {
        "message": error.message,
        "type": error.type,
        "param": prompt_param if error.about_prompt else error.param,
        "code": error.code,
    }
    if error.detail is not None:
        inner["innererror"] = error.detail
    return Reply(error.status, ((b"content-type", JSON_TYPE), *error.headers), dumps({"error": inner}))
