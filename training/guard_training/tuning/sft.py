"""Reasoning SFT (paper, section 3): the guard learns to write a teacher's rationale and then the row's labels.

``train`` is the whole run: rows to ids through the guard's contract, TRL's SFTTrainer with the loss on the answer
only, the guard's folder at the end. A run that was stopped goes on from its last whole checkpoint.

Where several processes train, a micro-batch of texts gets one 56 x 56 image behind its end (labels ignored, and what
comes last changes nothing before it): FSDP and ZeRO-3 gather the vision tower's weights on all ranks together, so a
rank that has no image would leave the others waiting, and DDP would miss the gradients of a trained tower.

Left out, and counted: rows without rationale or request label, with an unreadable image, or longer than the cutoff.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from PIL import Image
from rich.console import Console
from rich.progress import track
from torch import Tensor
from trl import SFTConfig, SFTTrainer

from guard_middleware.errors import GuardError
from guard_middleware.guard.prompt import ImageSlot, expand_images
from guard_training.corpus.conversation import conversation
from guard_training.corpus.rows import CorpusError, Row, Skipped
from guard_training.nano.drawn import DrawnText, Read
from guard_training.rowfile import digest
from guard_training.tuning.contract import Contract, load_contract, load_model, open_image, pictures, target
from guard_training.tuning.run import (
    Bar,
    Meter,
    ResumingTrainer,
    StopAfter,
    adapters,
    begin_once,
    curves,
    freeze,
    last_checkpoint,
    save_guard,
)
from guard_training.tuning.settings import RecipeError, SftSettings

IGNORED = -100
#: Processes that decode images beside a GPU.
_LOADERS = 4


@dataclass(frozen=True, slots=True)
class Example:
    """One row as ids, one pad per image. ``tokens`` counts all, image tokens included."""

    prompt: list[int]
    answer: list[int]
    picture: str
    tokens: int


def encode_row(contract: Contract, row: Row, cutoff: int, drawn_text: Sequence[str] = ()) -> Example:
    """A row as the worker would encode it, and what the guard should write. Raises ``CorpusError``."""
    answer = contract.encode_target(target(row, row.rationale or ""))
    prompt = contract.encode(row, drawn_text).ids
    tokens = len(contract.expand(prompt, pictures(row))) + len(answer)
    if tokens > cutoff:
        raise CorpusError(f"{row.name}: {tokens} tokens, more than the cutoff of {cutoff}")
    return Example(prompt, answer, str(row.image or ""), tokens)


def encode_rows(
    contract: Contract, rows: Sequence[Row], cutoff: int, skipped: Skipped, read: Read | None = None
) -> list[Example]:
    """The rows that can be trained on, in order. ``read`` reads an image's bytes, for a guard served with a reader."""
    examples = []
    for row in track(rows, "encoding rows", disable=not PartialState().is_main_process):
        try:
            drawn = [read(blob.data) for blob in conversation(row).blobs()] if read else []
            examples.append(encode_row(contract, row, cutoff, drawn))
        except CorpusError as error:
            skipped(str(error))
        except GuardError as error:
            skipped(f"{row.name}: {error}")
    return examples


def to_dataset(examples: Sequence[Example]) -> Dataset:
    """Columns ``input_ids``, ``labels`` (prompt ignored) and ``picture`` (a path, or empty)."""
    return Dataset.from_dict(
        {
            "input_ids": [e.prompt + e.answer for e in examples],
            "labels": [[IGNORED] * len(e.prompt) + e.answer for e in examples],
            "picture": [e.picture for e in examples],
        }
    )


class Collator:
    """Pads on the right; pictures become pixels, and their pads one id per image token.

    ``always_image`` puts a small image behind a micro-batch that has none (see the module's text).
    """

    def __init__(self, contract: Contract, *, always_image: bool = False) -> None:
        self.always_image = always_image
        self._images, self._encoder = contract.images, contract.encoder
        self._pad = contract.tokenizer.pad_token_id
        self._slot = [id for piece in contract.encoder.pieces([ImageSlot(0)]) for id in piece.ids]

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        lines, seen = [], []
        for row in rows:
            ids, labels, counts = row["input_ids"], row["labels"], []
            if row["picture"]:
                seen.append(self._pixels(open_image(Path(row["picture"]).read_bytes())))
                counts = [self._tokens(seen[-1])]
            lines.append((self._expand(ids, counts), [IGNORED] * (sum(counts) - len(counts)) + labels))
        if self.always_image and not seen:
            side = self._images.patch_size * self._images.merge_size * 2
            seen.append(self._pixels(Image.new("RGB", (side, side))))
            ids, labels = lines[-1]
            extra = self._expand(self._slot, [self._tokens(seen[-1])])
            lines[-1] = (ids + extra, labels + [IGNORED] * len(extra))
        longest = max(len(ids) for ids, _ in lines)

        def padded(column: int, filler: int) -> Tensor:
            return torch.tensor([line[column] + [filler] * (longest - len(line[column])) for line in lines])

        ids = padded(0, self._pad)
        mask = torch.tensor([[1] * len(line[0]) + [0] * (longest - len(line[0])) for line in lines])
        batch = {"input_ids": ids, "attention_mask": mask, "labels": padded(1, IGNORED)}
        batch["mm_token_type_ids"] = (ids == self._encoder.image_pad).int()
        if seen:
            batch["pixel_values"] = torch.cat([made["pixel_values"] for made in seen])
            batch["image_grid_thw"] = torch.cat([made["image_grid_thw"] for made in seen])
        return batch

    def _pixels(self, picture: Image.Image) -> Any:
        return self._images(images=[picture], return_tensors="pt")

    def _tokens(self, made: Any) -> int:
        return int(made["image_grid_thw"].prod()) // self._images.merge_size**2

    def _expand(self, ids: list[int], counts: list[int]) -> list[int]:
        return expand_images(ids, counts, self._encoder.image_pad)


class GuardSFTTrainer(ResumingTrainer, SFTTrainer):
    """TRL's trainer on ids that are ready; the data collator must be a ``Collator``."""


def arguments(recipe: SftSettings, output: Path, *, cpu: bool) -> SFTConfig:
    """TRL's configuration on the devices at hand. Raises ``RecipeError`` where the batch cannot be made of them."""
    devices = PartialState(cpu=cpu).num_processes
    return SFTConfig(
        output_dir=str(output),
        per_device_train_batch_size=recipe.batch_per_device,
        gradient_accumulation_steps=recipe.accumulation(devices),
        num_train_epochs=recipe.epochs,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type=recipe.scheduler,
        warmup_steps=recipe.warmup_steps,
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        optim="adamw_torch",
        use_cpu=cpu,
        bf16=recipe.precision == "bf16",
        gradient_checkpointing=recipe.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if recipe.gradient_checkpointing else None,
        dataloader_pin_memory=not cpu,
        dataloader_num_workers=0 if cpu else _LOADERS,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        packing=False,
        save_steps=recipe.save_every,
        save_total_limit=recipe.keep_checkpoints,
        logging_steps=recipe.log_every,
        logging_first_step=True,
        report_to="tensorboard",
        disable_tqdm=True,
        seed=recipe.seed,
        data_seed=recipe.seed,
    )


def build(
    recipe: SftSettings, contract: Contract, examples: Sequence[Example], args: SFTConfig, *, model: Any
) -> GuardSFTTrainer:
    """The trainer of a run."""
    if not examples:
        raise RecipeError("no row to train on: each needs a rationale (see `guard-train synthesize`) and a label")
    freeze(model, vision=recipe.freeze_vision, projector=recipe.freeze_projector)
    collator = Collator(contract, always_image=PartialState().num_processes > 1)
    trainer = GuardSFTTrainer(
        model=model,
        args=args,
        train_dataset=to_dataset(examples),
        processing_class=contract.tokenizer,
        data_collator=collator,
        peft_config=adapters(recipe.lora) if recipe.lora else None,
        callbacks=curves("sft"),
    )
    return trainer


def train(
    recipe: SftSettings,
    data: Path,
    rows: Sequence[Row],
    output: Path,
    skipped: Skipped,
    *,
    console: Console,
    read: Read | None = None,
    steps: int | None = None,
    cpu: bool = False,
    contract: Contract | None = None,
) -> Path | None:
    """Trains on the rows of ``data`` and returns the guard's folder, ``output/model``; None where ``steps`` ended it.

    ``read`` reads an image's bytes, for a recipe with ``reader``; ``contract`` is the guard's own unless given.
    Raises ``OutputError`` for a folder that was begun with another recipe, other data or other weights.
    """
    contract = contract or load_contract(recipe.model, max_pixels=recipe.max_pixels)
    begin_once(output, {"data": digest(data), **asdict(recipe), "model": contract.facts.revision})
    folder, checkpoints = output / "model", output / "checkpoints"
    if (folder / "guard.json").is_file():
        console.print(f"{folder} is finished", markup=False, highlight=False)
        return folder
    # what the main process has read stands in the file when the others come
    with PartialState().main_process_first():
        reader = DrawnText(output / "drawn.jsonl", read) if recipe.reader and read else None
        examples = encode_rows(contract, rows, recipe.cutoff, skipped, reader)
    # before the weights: ZeRO-3 shards them while they load, and learns that it is on from the arguments
    args = arguments(recipe, checkpoints, cpu=cpu)
    trainer = build(recipe, contract, examples, args, model=load_model(contract.folder))
    meter = Meter()
    trainer.add_callback(meter)
    if steps is not None:
        trainer.add_callback(StopAfter(steps))
    tokens = sum(example.tokens for example in examples) / len(examples)
    console.print(f"{len(examples)} rows, {tokens:.0f} tokens each; {len(skipped.reasons)} left out", highlight=False)
    last = last_checkpoint(checkpoints)
    with Bar().over(trainer):
        done = trainer.train(resume_from_checkpoint=str(last) if last else None)
    console.print(meter.summary(), highlight=False)
    if done.global_step < trainer.state.max_steps:
        return None
    return save_guard(trainer, contract, folder)
