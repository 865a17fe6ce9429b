"""A guard's tokenizer, as its folder holds it, without transformers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from guard_middleware.guard.prompt import PromptEncoder


@dataclass(frozen=True, slots=True)
class _FileTokenizer:
    backend_tokenizer: Tokenizer


def read_tokenizer(folder: Path) -> tuple[Tokenizer, PromptEncoder]:
    """The tokenizer of ``tokenizer.json``, and the encoder of prompts that speaks it. Raises whatever it raises."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return tokenizer, PromptEncoder(_FileTokenizer(tokenizer))
