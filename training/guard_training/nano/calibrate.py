"""Moves the operating point of a trained guard without training it again.

The tied output has no bias. But the hidden states from which a decision is written share a strong common direction,
so moving the two decision tokens' embeddings along it, apart, adds nearly the same number to the margin between them
for every row. The embeddings move by a small part of their length, so what is read back of them hardly changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from guard_training.nano.trainer import Example, GuardSFTTrainer, to_dataset


def margins(trainer: GuardSFTTrainer, examples: Sequence[Example], *, harmful: int, unharmful: int) -> Tensor:
    """By how much token ``harmful`` is ahead of ``unharmful`` where each example decides, in logits (examples,)."""
    model: Any = trainer.model
    weight = model.get_output_embeddings().weight
    direction = weight[harmful] - weight[unharmful]
    model.eval()
    with torch.no_grad():
        return torch.cat([state @ direction for state in _states(trainer, to_dataset(examples), harmful, unharmful)])


def shift_for(benign: Tensor, rate: float) -> float:
    """The shift that leaves ``rate`` of the benign margins above zero; never a positive one."""
    return min(0.0, -float(benign.quantile(1 - rate)))


def _states(
    trainer: GuardSFTTrainer, rows: Any, harmful: int, unharmful: int, count: int | None = None
) -> list[Tensor]:
    """Hidden states where the decision is written, in batches of 32 rows."""
    states = []
    for start in range(0, min(len(rows), count or len(rows)), 32):
        batch = trainer.data_collator([rows[n] for n in range(start, min(start + 32, len(rows)))])
        hidden = trainer.hidden(trainer.model, batch)[:, :-1]
        labels = batch["labels"][:, -hidden.shape[1] :]
        states.append(hidden[torch.isin(labels, torch.tensor([harmful, unharmful]))])
    return states


def shift_decision(trainer: GuardSFTTrainer, *, harmful: int, unharmful: int, shift: float) -> float:
    """Adds ``shift`` (in logits, negative for fewer harmful verdicts) to the margin of token ``harmful`` over
    ``unharmful``, in place.

    The direction comes from the first 320 training rows. Returns the spread of what was added
    over them (standard deviation over mean).
    """
    model: Any = trainer.model
    model.eval()
    with torch.no_grad():
        found = torch.cat(_states(trainer, trainer.train_dataset, harmful, unharmful, 320))
        mean = found.mean(0)
        direction = mean / mean.square().sum()
        weight = model.get_output_embeddings().weight
        weight[harmful] += 0.5 * shift * direction
        weight[unharmful] -= 0.5 * shift * direction
        added = found @ direction
        return float(added.std() / added.mean())
