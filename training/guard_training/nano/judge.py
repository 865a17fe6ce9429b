"""A copy of the sentence encoder, trained to judge: it gives nano's soft labels.

The encoder's layers and a linear head on its embedding learn the labels of the prompts by binary cross-entropy; the
embeddings of its words stay. A logistic regression on the encoder as it comes knows less (training/LOG.md), so it only
is where the head starts.

Every ``_SAVE_EVERY`` steps the state is kept, and a run that was stopped goes on from there. It is nano's teacher
alone: none of its weights are shipped.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.progress import Progress
from torch import Tensor

from guard_training.nano.encoder import WIDTH, SentenceEncoder

_LONGEST, _CLIP, _WARMUP, _DECAY, _SURE = 128, 1.0, 50, 0.01, 0.98
_SAVE_EVERY = 100


class Judge(torch.nn.Module):
    """Texts to the logit of harm (texts, 1)."""

    def __init__(self, head: Tensor, bias: float) -> None:
        super().__init__()
        self.encoder = SentenceEncoder()
        self.layers = self.encoder.model
        self.head = torch.nn.Linear(WIDTH, 1)
        with torch.no_grad():
            self.head.weight.copy_(head[None])
            self.head.bias.fill_(bias)

    @torch.inference_mode()
    def logits(self, texts: Sequence[str]) -> Tensor:
        """At most a batch or two; ``Kept`` is for many."""
        found: Tensor = self.head(self.encoder(texts))
        return found

    def loss(self, batch: Sequence[tuple[str, bool]]) -> Tensor:
        """Mean cross-entropy of (text, harmful); labels count as 0.98 and 0.02, because some are wrong."""
        wanted = torch.tensor([_SURE if harmful else 1 - _SURE for _, harmful in batch])
        logits = self.head(self.encoder([text for text, _ in batch], _LONGEST))[:, 0]
        return torch.nn.functional.binary_cross_entropy_with_logits(logits, wanted)


def train_judge(
    judge: Judge,
    batches: Sequence[Sequence[tuple[str, bool]]],
    *,
    learning_rate: float,
    folder: Path,
    progress: Progress,
) -> Judge:
    """One step per batch of (text, harmful), with warm-up and linear decay; continues what ``folder`` holds."""
    folder.mkdir(parents=True, exist_ok=True)
    file, steps, start = folder / "state.pt", len(batches), 0
    for name, parameter in judge.layers.named_parameters():
        parameter.requires_grad_("embeddings" not in name)
    trained = [parameter for parameter in judge.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=_DECAY)
    if file.exists():
        state = torch.load(file, weights_only=True)
        judge.load_state_dict(state["judge"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    task = progress.add_task("training the judge", total=steps, completed=start)
    judge.train()
    for step in range(start, steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min((step + 1) / _WARMUP, 1 - step / steps)
        loss = judge.loss(batches[step])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, _CLIP)
        optimizer.step()
        progress.update(task, advance=1, description=f"training the judge (loss {loss.item():.2f})")
        if (step + 1) % _SAVE_EVERY == 0 or step + 1 == steps:
            part = file.with_suffix(".part")
            torch.save({"judge": judge.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}, part)
            os.replace(part, file)
    return judge.eval()
