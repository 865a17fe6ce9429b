"""Reasoning SFT on TRL's SFTTrainer, made cheap enough for two CPU cores.

Five changes to the stock trainer. The model runs in bfloat16 where the processor has it (``cpu.has_bfloat16``; weights
and loss stay fp32). The opening of every prompt (the system turn, half of a short row) is the same
tokens in every row, so it runs once per batch and its keys and values are expanded, with gradients. The vocabulary's
logits are computed at labelled positions only, and over the ids that the batch writes, all phrases, and a draw of
other ids (a sampled softmax). Each labelled token has a weight, so that a decision counts for more than the phrase
round it. And a row may carry what a sentence encoder says of its text: the odds of harm as a soft target at its last
decision (about the request, or about the answer), and its embedding, which a linear map of the hidden state there has
to match (one map for requests, one for answers; they are thrown away after training). Rows come in an order fixed
beforehand, in batches of like length.
"""

# ruff: noqa: S311 - the draws must repeat for a seed, not resist guessing
from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Features, List, Value
from PIL import Image
from torch import Tensor
from transformers import DynamicCache, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from guard_middleware.guard.prompt import PromptEncoder, Transcript, expand_images
from guard_training.nano.cpu import ATTENTION, has_bfloat16, register_attention, trim
from guard_training.nano.teacher import Kind, Stretch
from guard_training.tuning.run import ResumingTrainer

IGNORED = -100
_COLUMNS = Features(
    {
        "input_ids": List(Value("int32")),
        "labels": List(Value("int32")),
        "loss_weights": List(Value("float32")),
        "picture": Value("string"),
        "chances": List(Value("float32")),
        "meaning": Value("int32"),
        "answered": Value("bool"),
    }
)
#: the linear maps to the encoder's embeddings, beside a checkpoint's weights
_MAPS = "maps.pt"


@dataclass(frozen=True, slots=True)
class Example:
    """One row as ids. ``weights`` has one number per completion token; ``picture`` is the path of its only image.

    ``chance`` is the encoder's probability of harm, which replaces the label at the completion's token ``decided``;
    ``meaning`` is the row of the encoder's embedding of what is decided there in the trainer's table, and ``answered``
    says that this is an answer.
    """

    prompt: list[int]
    completion: list[int]
    weights: list[float]
    picture: str | None = None
    chance: float | None = None
    decided: int = 0
    meaning: int | None = None
    answered: bool = False


def encode_example(
    transcript: Transcript,
    stretches: Sequence[Stretch],
    weights: Mapping[Kind, float],
    encoder: PromptEncoder,
    tokenizer: PreTrainedTokenizerFast,
    picture: Path | None = None,
    *,
    chance: float | None = None,
    meaning: int | None = None,
    closed: bool = True,
) -> Example:
    """A case as the worker would encode it, and what the guard should write; not ``closed`` is only a beginning."""
    ids: list[int] = []
    values: list[float] = []
    decided, answered = 0, False
    for stretch in stretches:
        piece = tokenizer.encode(stretch.text, add_special_tokens=False)
        if stretch.kind in (Kind.REQUEST, Kind.RESPONSE):
            decided, answered = len(ids), stretch.kind is Kind.RESPONSE
        ids += piece
        values += [weights[stretch.kind]] * len(piece)
    if closed:
        ids.append(encoder.im_end)
        values.append(weights[Kind.TEMPLATE])
    shown = str(picture) if picture else None
    return Example(encoder.encode(transcript).ids, ids, values, shown, chance, decided, meaning, answered)


def in_batches(examples: Sequence[Example], size: int, seed: int) -> list[Example]:
    """The examples in batches of like length, batches in random order; the last, short batch is left out."""
    rng = random.Random(seed)
    order = list(range(len(examples)))
    rng.shuffle(order)
    pool = size * 50
    batches: list[list[int]] = []
    for start in range(0, len(order), pool):
        near = sorted(order[start : start + pool], key=lambda i: len(examples[i].prompt) + len(examples[i].completion))
        batches += [near[at : at + size] for at in range(0, len(near), size)]
    batches = [batch for batch in batches if len(batch) == size]
    rng.shuffle(batches)
    return [examples[i] for batch in batches for i in batch]


def to_dataset(examples: Sequence[Example]) -> Dataset:
    """Columns: ``input_ids`` (prompt and completion), ``labels`` (prompt ignored), ``loss_weights``, ``picture``."""
    return Dataset.from_dict(
        {
            "input_ids": [e.prompt + e.completion for e in examples],
            "labels": [[IGNORED] * len(e.prompt) + e.completion for e in examples],
            "loss_weights": [[0.0] * len(e.prompt) + e.weights for e in examples],
            "picture": [e.picture or "" for e in examples],
            "chances": [_chances(e) for e in examples],
            "meaning": [-1 if e.meaning is None else e.meaning for e in examples],
            "answered": [e.answered for e in examples],
        },
        features=_COLUMNS,
    )


def _chances(example: Example) -> list[float]:
    """A number per token: the chance of harm where it is given, else -1."""
    chances = [-1.0] * (len(example.prompt) + len(example.completion))
    if example.chance is not None:
        chances[len(example.prompt) + example.decided] = example.chance
    return chances


class Collator:
    """Pads on the right, and makes the images of a batch into pixels and their pads into one id per image token."""

    def __init__(self, image_processor: Any, image_pad: int, pad: int) -> None:
        self._images, self._image_pad, self._pad = image_processor, image_pad, pad

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        pixels, grids, lines = [], [], []
        for row in rows:
            ids, labels, weights, chances = row["input_ids"], row["labels"], row["loss_weights"], row["chances"]
            if row["picture"]:
                with Image.open(row["picture"]) as image:
                    made = self._images(images=[image.convert("RGB")], return_tensors="pt")
                pixels.append(made["pixel_values"])
                grids.append(made["image_grid_thw"])
                extra = int(grids[-1].prod()) // 4 - 1
                ids = expand_images(ids, [extra + 1], self._image_pad)
                labels, weights = [IGNORED] * extra + labels, [0.0] * extra + weights
                chances = [-1.0] * extra + chances
            lines.append((ids, labels, weights, chances))
        longest = max(len(ids) for ids, *_ in lines)

        def padded(column: int, filler: float) -> Tensor:
            return torch.tensor([line[column] + [filler] * (longest - len(line[column])) for line in lines])

        batch = {"input_ids": padded(0, self._pad), "labels": padded(1, IGNORED), "loss_weights": padded(2, 0.0)}
        batch["chances"] = padded(3, -1.0)
        batch["meaning"] = torch.tensor([row["meaning"] for row in rows])
        batch["answered"] = torch.tensor([row["answered"] for row in rows])
        if pixels:
            batch |= {"pixel_values": torch.cat(pixels), "image_grid_thw": torch.cat(grids)}
        return batch


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Ids that the loss treats apart: the shared ``opening``, the image pad, pairs of ``decisions`` (harmful first; the
    first pair decides about the request in reasoning), and ``phrases``, which stand in every softmax beside ``draws``
    other ids (0 takes them all)."""

    opening: Sequence[int]
    image_pad: int
    decisions: Sequence[tuple[int, int]]
    phrases: Sequence[int]
    draws: int = 1024


@dataclass(frozen=True, slots=True)
class Meanings:
    """The encoder's embeddings (texts, dimensions), of unit length, and the weight of matching them in the loss.

    ``maps`` go from hidden states to embeddings, of requests and of answers; a later stage that began with new ones
    would pull the states away from all that the stages before it learnt.
    """

    table: Tensor
    weight: float
    maps: torch.nn.ModuleList | None = None

    def new_maps(self, width: int) -> torch.nn.ModuleList:
        """From states of ``width``. Most of a state is the same in every row; without its mean taken out, a map learns
        that alone."""
        return torch.nn.ModuleList(
            torch.nn.Sequential(torch.nn.BatchNorm1d(width, affine=False), torch.nn.Linear(width, self.table.shape[1]))
            for _ in ("requests", "answers")
        )


class GuardSFTTrainer(ResumingTrainer, SFTTrainer):
    """``meanings`` None trains without embeddings."""

    def __init__(self, *args: Any, vocabulary: Vocabulary, meanings: Meanings | None = None, **kwargs: Any):
        self.meanings = meanings
        self.maps = meanings.maps if meanings else None
        super().__init__(*args, **kwargs)
        self._vocabulary = vocabulary
        self._bfloat16 = has_bfloat16()
        if self._bfloat16:
            register_attention()
            self.model.set_attn_implementation(ATTENTION)
        self._opening = torch.tensor([list(vocabulary.opening)])
        self._decisions = torch.tensor(list(vocabulary.decisions))
        if meanings is not None and self.maps is None:
            self.maps = meanings.new_maps(self.model.get_input_embeddings().weight.shape[1])

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.maps is not None:
            optimizer.add_param_group({"params": list(self.maps.parameters()), "weight_decay": 0.0})
        return optimizer

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        if self.maps is not None:
            self.maps.zero_grad()  # Trainer zeroes the model's gradients, not the optimizer's
        return super().training_step(*args, **kwargs)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean cross-entropy of the labelled tokens, weighted, plus the distance to the encoder's embeddings."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self._bfloat16):
            hidden = self.hidden(model, inputs)[:, :-1].float()
        labels = inputs["labels"][:, self._opening.shape[1] + 1 :]
        weights = inputs["loss_weights"][:, self._opening.shape[1] + 1 :]
        chosen = labels != IGNORED
        wanted, weight = labels[chosen], weights[chosen]
        candidates = self._candidates(wanted, model.config.get_text_config().vocab_size)
        logits = hidden[chosen] @ model.get_output_embeddings().weight[candidates].T
        log_chances = logits.log_softmax(-1)
        at = torch.searchsorted(candidates, wanted)
        losses = -log_chances.gather(1, at[:, None])[:, 0]
        chances = inputs["chances"][:, self._opening.shape[1] + 1 :]
        chance = chances[chosen]
        soft = chance >= 0
        pair = (wanted[:, None, None] == self._decisions).any(2).int().argmax(1)
        sides = torch.searchsorted(candidates, self._decisions)[pair]
        shares = torch.stack((chance[soft], 1 - chance[soft]), 1)
        losses = losses.masked_scatter(soft, -(shares * log_chances[soft].gather(1, sides[soft])).sum(1))
        loss = (losses * weight).sum() / weight.sum().clamp(min=1e-6)
        found: dict[str, Tensor] = {}
        with torch.no_grad():
            deciding = soft | torch.isin(wanted, self._decisions[0])
            sure = deciding & (weight > 0) & ((chance < 0) | ((chance - 0.5).abs() > 0.25))
            right = (logits.gather(1, sides).argmax(1) == (wanted == self._decisions[pair, 1]).int())[sure]
            if len(right):
                found["decision_accuracy"] = right.float().mean()
        if self.maps is not None and self.meanings is not None:
            known = inputs["meaning"] >= 0
            states = hidden[torch.arange(len(hidden)), chances.argmax(1)]
            for name, answered, to_meaning in zip(("", "answer_"), (False, True), self.maps, strict=True):
                rows = known & (inputs["answered"] == answered)
                if int(rows.sum()) < 2:  # one row has no variance
                    continue
                meant = self.meanings.table[inputs["meaning"][rows]].float()
                distances = 1 - torch.nn.functional.cosine_similarity(to_meaning(states[rows]), meant)
                found[f"{name}embedding_distance"] = distances.detach().mean()
                loss = loss + self.meanings.weight * distances.sum() / known.sum()
        for name, value in found.items():
            self._metrics["train" if model.training else "eval"][name].append(value.item())
        return (loss, {"loss": loss}) if return_outputs else loss

    def _candidates(self, wanted: Tensor, size: int) -> Tensor:
        if not self._vocabulary.draws:
            return torch.arange(size)
        draws = torch.randint(size, (self._vocabulary.draws,))
        fixed = torch.tensor(list(self._vocabulary.phrases))
        return torch.unique(torch.cat((wanted, fixed, self._decisions.flatten(), draws)))

    def hidden(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """Last hidden states (rows, tokens after the opening, hidden)."""
        ids, core, start = inputs["input_ids"], model.model, self._opening.shape[1]
        if not bool((ids[:, :start] == self._opening).all()):
            raise ValueError("a row does not begin with the shared opening")
        kinds = (ids == self._vocabulary.image_pad).int()
        images = {key: inputs[key] for key in ("pixel_values", "image_grid_thw") if key in inputs}
        positions, _ = core.get_rope_index(
            ids,
            mm_token_type_ids=kinds,
            image_grid_thw=images.get("image_grid_thw"),
            attention_mask=torch.ones_like(ids),
        )
        cache = DynamicCache(config=model.config.get_text_config())
        core.language_model(
            input_ids=self._opening, position_ids=positions[:, :1, :start], past_key_values=cache, use_cache=True
        )
        cache.batch_repeat_interleave(len(ids))
        hidden: Tensor = core(
            input_ids=ids[:, start:],
            position_ids=positions[:, :, start:],
            past_key_values=cache,
            use_cache=True,
            mm_token_type_ids=kinds[:, start:],
            **images,
        ).last_hidden_state
        return hidden

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.maps is not None:
            self.maps.load_state_dict(torch.load(Path(resume_from_checkpoint) / _MAPS, weights_only=True))

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        if self.maps is not None:
            torch.save(self.maps.state_dict(), Path(output_dir or self.args.output_dir) / _MAPS)
        trim()


def training_arguments(
    output: Path,
    *,
    batch: int,
    steps: int,
    learning_rate: float,
    weight_decay: float,
    warmup: int,
    save_every: int,
    seed: int,
) -> SFTConfig:
    """fp32 weights on the CPU (the trainer itself chooses bfloat16), cosine schedule, two checkpoints kept."""
    return SFTConfig(
        output_dir=str(output),
        per_device_train_batch_size=batch,
        max_steps=steps,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        lr_scheduler_type="cosine",
        warmup_steps=warmup,
        adam_beta2=0.98,
        max_grad_norm=1.0,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
        dataloader_drop_last=True,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        save_steps=save_every,
        save_total_limit=2,
        logging_steps=20,
        report_to="none",
        disable_tqdm=False,
        seed=seed,
        data_seed=seed,
    )
