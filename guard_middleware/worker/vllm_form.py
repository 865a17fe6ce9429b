"""Fills in forms (``worker.form``) inside vLLM: a logits processor of its first model runner.

It runs in vLLM's engine process, which loads it by name. A request with
``extra_args={"guard_form": [answered]}`` may at each step write only what its form leaves open, and its end when
the form is complete; others pass untouched. The processor chooses the token itself, from the model's scores, and leaves
vLLM's sampler no other.

A step may be computed and thrown away (the last chunk of a prompt but one), and a request may be taken out of the batch
and put back (preemption), so a choice is tentative until it stands among the request's output tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from guard_middleware.worker import weights
from guard_middleware.worker.form import Form, Tentative
from guard_middleware.worker.tokens import read_tokenizer


class FormProcessor(LogitsProcessor):  # type: ignore[misc]  # vLLM is not there where this is checked
    """See the module. Raises ``ConfigError`` for a model without a form."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        folder = Path(vllm_config.model_config.model)
        facts = weights.load(folder, name=folder.name).facts
        tokenizer, encoder = read_tokenizer(folder)
        self._form = Form(facts.form or {}, tokenizer)
        self._frame = slice(len(encoder.opening), -len(encoder.closing))
        self._end = encoder.im_end
        self._rows: dict[int, Tentative] = {}

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        process_dict_updates(self._rows, batch_update, self._row)

    def _row(self, params: SamplingParams, prompt: list[int] | None, written: list[int]) -> Tentative | None:
        stated = (params.extra_args or {}).get("guard_form")
        if stated is None:
            return None
        return Tentative(self._form.start((prompt or [])[self._frame], answered=stated[0]), written)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        for index, row in self._rows.items():
            chosen = row.choose(logits[index])
            chosen = self._end if chosen is None else chosen
            kept = logits[index, chosen].item()
            logits[index] = float("-inf")
            logits[index, chosen] = kept
        return logits
