"""A logits processor that makes vLLM write what a test scripts: the prompt that says ``case N`` writes text N.

It adds to the scripted token's score, so that what a request does not allow stays forbidden.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from tokenizers import Tokenizer
from vllm.v1.sample.logits_processor import LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

#: JSON: a list of texts
VARIABLE = "GUARD_TEST_SCRIPTS"
_FAR = 1e4


class Script(LogitsProcessor):
    def __init__(self, vllm_config, device, is_pin_memory) -> None:
        folder = Path(vllm_config.model_config.model)
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        end = self._tokenizer.token_to_id("<|im_end|>")
        self._opening = self._tokenizer.encode("<|im_start|>assistant\n", add_special_tokens=False).ids
        texts = json.loads(os.environ[VARIABLE])
        self._scripts = [[*self._tokenizer.encode(text, add_special_tokens=False).ids, end] for text in texts]
        self._rows: dict[int, tuple[list[int], int, list[int]]] = {}

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update) -> None:
        process_dict_updates(self._rows, batch_update, self._row)

    def _row(self, params, prompt, written):
        found = re.search(r"case (\d+)", self._tokenizer.decode(prompt))
        if found is None:
            return None
        length = len(self._opening)
        starts = [n for n in range(len(prompt)) if prompt[n : n + length] == self._opening]
        return self._scripts[int(found[1])], len(prompt) - starts[-1] - length, written

    def apply(self, logits):
        for index, (script, given, written) in self._rows.items():
            place = given + len(written)
            if place < len(script):
                logits[index, script[place]] += _FAR
        return logits
