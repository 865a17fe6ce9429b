"""Proof at the start that LiteLLM calls the guard: a harmless request goes through LiteLLM's own dispatch.

LiteLLM starts and serves without a word when a guardrail is not registered, not dispatched or not asked for, and its
header ``x-litellm-applied-guardrails`` names guardrails that never ran. So the guard asks for itself, and a proxy that
does not call it is stopped. A worker that cannot moderate yet stops nothing: every request fails closed meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from typing import Any

logger = logging.getLogger(__name__)

#: how long LiteLLM may take to register a guardrail that it has just made
_REGISTERED_SECONDS = 60.0
_ANSWER = {
    "id": "guard-self-test",
    "model": "guard-self-test",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "Paris."}, "finish_reason": "stop"}],
}
_running: set[asyncio.Task[None]] = set()


def start(guardrail: Any) -> None:
    """Begins the test where a proxy is starting; in an SDK there is no dispatch to prove."""
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        return
    task = loop.create_task(_run(guardrail))
    _running.add(task)
    task.add_done_callback(_running.discard)


async def _run(guardrail: Any) -> None:
    try:
        fault = await _fault(guardrail)
    except Exception as error:
        logger.exception("guard self-test")
        fault = f"the self-test failed ({type(error).__name__})"
    if fault is not None:
        logger.critical("guard self-test: %s; the proxy is stopped rather than left unguarded", fault)
        os.kill(os.getpid(), signal.SIGTERM)


async def _fault(guardrail: Any) -> str | None:
    """What keeps LiteLLM from calling the guard, or None."""
    import litellm
    from litellm.proxy._types import UserAPIKeyAuth
    from litellm.proxy.proxy_server import proxy_logging_obj

    end = time.monotonic() + _REGISTERED_SECONDS
    while guardrail not in litellm.callbacks:
        if time.monotonic() > end:
            return f"{guardrail.guardrail_name} is not among LiteLLM's callbacks"
        await asyncio.sleep(0.02)
    capabilities = proxy_logging_obj._callback_capabilities()
    if (guardrail, "override") not in capabilities.iterator_overrides:
        return f"LiteLLM does not show streams to {type(guardrail).__name__}"
    await guardrail.runtime.start()
    asked: dict[str, Any] = {
        "model": "guard-self-test",
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "metadata": {"guardrails": [guardrail.guardrail_name]},
    }
    started, before = time.perf_counter(), guardrail.asked
    try:
        await proxy_logging_obj.pre_call_hook(
            user_api_key_dict=UserAPIKeyAuth(), data=asked, call_type="acompletion", guardrails_only=True
        )
    except Exception as error:
        answered = getattr(error, "status_code", None)
        if answered is None:
            raise
        logger.warning("guard self-test: the guard is called, and refuses for now (%s)", error)
        return None
    if guardrail.asked == before:
        return f"LiteLLM does not call {guardrail.guardrail_name} before a request"
    await guardrail.async_post_call_success_hook(asked, UserAPIKeyAuth(), litellm.ModelResponse(**_ANSWER))
    logger.warning(
        "guard self-test passed: %s judges requests, answers and streams (both verdicts took %.0f ms)",
        guardrail.guardrail_name,
        (time.perf_counter() - started) * 1000,
    )
    return None
