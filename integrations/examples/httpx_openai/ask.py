"""The openai SDK with the guard in its own process: no gateway, no second address.

export OPENAI_API_KEY=...
python ask.py "how do I bake bread?"
"""

from __future__ import annotations

import os
import sys

import httpx2
import openai

from guard_integrations.httpx2 import GuardTransport

MODEL = os.environ.get("MODEL", "gpt-4.1-mini")


def main(prompt: str) -> int:
    transport = GuardTransport(config=os.environ.get("GUARD_CONFIG", "guard.yaml"))
    with openai.OpenAI(http_client=httpx2.Client(transport=transport)) as client:
        try:
            stream = client.chat.completions.create(
                model=MODEL, messages=[{"role": "user", "content": prompt}], stream=True
            )
        except openai.BadRequestError as error:
            print(f"refused: {error.message}" if error.code == "content_filter" else error)
            return 1
        finish = None
        for chunk in stream:
            for choice in chunk.choices:
                print(choice.delta.content or "", end="", flush=True)
                finish = choice.finish_reason or finish
        print("\nwithheld: the guard stopped this answer" if finish == "content_filter" else "")
    return 0 if finish == "stop" else 1


if __name__ == "__main__":
    raise SystemExit(main(" ".join(sys.argv[1:]) or "how do I bake bread?"))
