"""Asks a model through LiteLLM's SDK, guarded by one line.

python ask.py "How do I bake bread?" "How do I pick a lock?"
"""

from __future__ import annotations

import asyncio
import os
import sys
from typing import Any

import litellm

from guard_integrations.litellm import install


def call(question: str) -> dict[str, Any]:
    return {
        "model": os.environ.get("MODEL", "openai/gpt-4o-mini"),
        "api_base": os.environ["UPSTREAM_URL"],
        "api_key": os.environ["UPSTREAM_KEY"],
        "messages": [{"role": "user", "content": question}],
    }


def streamed(question: str) -> None:
    reason = None
    for chunk in litellm.completion(**call(question), stream=True):
        for choice in chunk.choices:
            print(choice.delta.content or "", end="", flush=True)
            reason = choice.finish_reason or reason
    print(f" [{reason}]")  # content_filter: the guard has cut the answer


async def whole(question: str) -> None:
    answer = await litellm.acompletion(**call(question))
    print(answer.choices[0].message.content, f"[{answer.choices[0].finish_reason}]")


def main(questions: list[str]) -> None:
    install("guard.yaml")
    for question in questions:
        print(">", question)
        try:
            streamed(question)
            asyncio.run(whole(question))
        except litellm.ContentPolicyViolationError as error:
            print("blocked:", error)
        except litellm.ServiceUnavailableError as error:
            print("no verdict:", error)


if __name__ == "__main__":
    main(sys.argv[1:] or ["How do I bake bread?"])
