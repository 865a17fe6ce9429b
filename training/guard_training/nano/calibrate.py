"""Moves the operating point of a trained guard without training it again.

The tied output has no bias. But the hidden states from which a decision is written share a strong common direction,
so moving the two decision tokens' embeddings along it, apart, adds nearly the same number to the margin between them
for every row. The embeddings move by a small part of their length, so what is read back of them hardly changes.
"""

from __future__ import annotations

from typing import Any

import torch

from guard_training.nano.trainer import GuardSFTTrainer


def shift_decision(trainer: GuardSFTTrainer, *, harmful: int, unharmful: int, shift: float, batches: int = 10) -> float:
    """Adds ``shift`` (in logits, negative for fewer harmful verdicts) to the margin of token ``harmful`` over
    ``unharmful``, in place.

    The direction comes from the first ``batches`` batches of 32 training rows. Returns the spread of what was added
    over them (standard deviation over mean).
    """
    model: Any = trainer.model
    rows: Any = trainer.train_dataset
    model.eval()
    with torch.no_grad():
        states = []
        for start in range(0, min(len(rows), 32 * batches), 32):
            batch = trainer.data_collator([rows[n] for n in range(start, min(start + 32, len(rows)))])
            hidden = trainer.hidden(model, batch)[:, :-1]
            labels = batch["labels"][:, -hidden.shape[1] :]
            states.append(hidden[torch.isin(labels, torch.tensor([harmful, unharmful]))])
        found = torch.cat(states)
        mean = found.mean(0)
        direction = mean / mean.square().sum()
        weight = model.get_output_embeddings().weight
        weight[harmful] += 0.5 * shift * direction
        weight[unharmful] -= 0.5 * shift * direction
        added = found @ direction
        return float(added.std() / added.mean())
