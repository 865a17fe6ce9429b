"""Online RL of the guard (paper, section 4): GRPO without KL, on hard rows, from the weights of R-SFT.

``train`` is the whole run: rows to prompts, TRL's trainer, the guard's folder at the end. A run that was stopped goes
on from its last checkpoint, which is always at the end of a rollout; the bound of dynamic clipping and the state of
the alarms follow from the step and from the log.

Refuses: rows without any label or longer than ``prompt_tokens`` (left out, and said), fewer rows than one rollout,
sizes that do not divide, one update per rollout while clipping is on (it would do nothing), a trained vision tower
under FSDP or ZeRO-3 with rows of both modalities (ranks without images would wait for ever).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState
from datasets import Dataset
from rich.console import Console
from rich.progress import track
from transformers import TrainerCallback
from trl import GRPOConfig

from guard_middleware.errors import GuardError
from guard_training.corpus.conversation import conversation
from guard_training.corpus.rows import CorpusError, Row, Skipped
from guard_training.nano.cpu import hasten
from guard_training.nano.drawn import DrawnText, Read
from guard_training.rowfile import digest
from guard_training.tuning.alarms import Limits, StopWhenHacked, Watch, measure
from guard_training.tuning.clipping import FLOOR, DynamicClipping
from guard_training.tuning.contract import Contract, load_contract, load_model, pictures
from guard_training.tuning.reward import Shape
from guard_training.tuning.rollout import GuardGRPOTrainer, RowProcessor, key
from guard_training.tuning.run import (
    Bar,
    Meter,
    adapters,
    begin_once,
    curves,
    freeze,
    last_checkpoint,
    peak_memory,
    save_guard,
)
from guard_training.tuning.scoring import SafetyReward
from guard_training.tuning.settings import LoraSettings, RecipeError

#: ``source`` of the rows that ``guard-train augment`` makes.
MIXED = "concatenation"


@dataclass(frozen=True, slots=True)
class GrpoSettings:
    """See ``recipes/grpo-3b.yaml`` for what each constant does and where it comes from.

    ``rollout_prompts`` and ``update_prompts`` are prompts over all devices, ``batch_per_device`` completions per
    micro-batch, ``prompt_tokens`` and ``max_new_tokens`` tokens, ``max_pixels`` the area of one image, ``save_every``
    rollouts. ``vllm`` goes to ``GRPOConfig`` as it stands, each key with ``vllm_`` before it.
    """

    seed: int
    model: str
    architecture: str | None
    epochs: int
    rollout_prompts: int
    update_prompts: int
    group: int
    temperature: float
    top_p: float
    prompt_tokens: int
    max_new_tokens: int
    learning_rate: float
    weight_decay: float
    max_grad_norm: float
    epsilon: float
    dynamic_clipping: bool
    reward: Shape
    alarms: Limits
    rows: Literal["all", "text", "image"]
    mixed_rows: bool
    batch_per_device: int
    max_pixels: int | None
    reader: bool
    precision: Literal["bf16", "fp32"]
    gradient_checkpointing: bool
    freeze_vision: bool
    lora: LoraSettings | None
    rollouts: Literal["transformers", "vllm_colocate", "vllm_server"]
    save_every: int
    clip_floor: float = FLOOR
    vllm: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        sizes = ("epochs", "rollout_prompts", "update_prompts", "prompt_tokens", "max_new_tokens", "batch_per_device")
        for name in (*sizes, "temperature", "learning_rate", "epsilon", "save_every"):
            if not getattr(self, name) > 0:
                raise RecipeError(f"{name} must be above 0")
        if self.group < 2:
            raise RecipeError("group must be at least 2: the advantage is relative to the group")
        if self.rollout_prompts % self.update_prompts:
            raise RecipeError("rollout_prompts must be a multiple of update_prompts")
        if self.dynamic_clipping and self.updates_per_rollout == 1:
            raise RecipeError(
                "with one update per rollout every probability ratio is 1 and clipping does nothing; make "
                "update_prompts smaller than rollout_prompts, or set dynamic_clipping to false"
            )

    @property
    def updates_per_rollout(self) -> int:
        return self.rollout_prompts // self.update_prompts

    def rollouts_for(self, rows: int) -> int:
        """Rollouts of a run over so many rows; raises ``RecipeError`` for fewer than one rollout needs."""
        if rows < self.rollout_prompts:
            raise RecipeError(
                f"{rows} usable rows are fewer than one rollout of {self.rollout_prompts} prompts; give more rows, or "
                "lower rollout_prompts and update_prompts"
            )
        return self.epochs * (rows // self.rollout_prompts)


def arguments(recipe: GrpoSettings, output: Path, rows: int, *, cpu: bool) -> GRPOConfig:
    """TRL's configuration of a run over so many rows on the devices at hand; raises ``RecipeError``."""
    devices = PartialState(cpu=cpu).num_processes
    step = recipe.batch_per_device * devices
    if (recipe.update_prompts * recipe.group) % step:
        raise RecipeError(
            f"an update of {recipe.update_prompts} x {recipe.group} completions is no multiple of "
            f"{recipe.batch_per_device} on {devices} devices; change batch_per_device, which does not change training"
        )
    unknown = sorted({f"vllm_{name}" for name in recipe.vllm} - {known.name for known in fields(GRPOConfig)})
    if unknown:
        raise RecipeError(f"vllm: TRL's GRPOConfig has no {', '.join(unknown)}")
    backend = {} if recipe.rollouts == "transformers" else {"vllm_mode": recipe.rollouts.removeprefix("vllm_")}
    return GRPOConfig(
        output_dir=str(output),
        max_steps=recipe.rollouts_for(rows) * recipe.updates_per_rollout,
        per_device_train_batch_size=recipe.batch_per_device,
        generation_batch_size=recipe.rollout_prompts * recipe.group,
        gradient_accumulation_steps=recipe.update_prompts * recipe.group // step,
        num_generations=recipe.group,
        temperature=recipe.temperature,
        top_p=recipe.top_p,
        max_completion_length=recipe.max_new_tokens,
        beta=0.0,
        epsilon=recipe.epsilon,
        loss_type="grpo",
        scale_rewards="group",
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="constant",
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        use_vllm=bool(backend),
        **backend,
        **{f"vllm_{name}": value for name, value in recipe.vllm.items() if backend},
        use_cpu=cpu,
        bf16=recipe.precision == "bf16",
        gradient_checkpointing=recipe.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if recipe.gradient_checkpointing else None,
        dataloader_pin_memory=False,
        shuffle_dataset=False,  # ``prompts`` has the order
        save_steps=recipe.save_every * recipe.updates_per_rollout,
        save_total_limit=2,
        logging_steps=1,
        report_to="tensorboard",
        seed=recipe.seed,
        data_seed=recipe.seed,
    )


def prompts(recipe: GrpoSettings, rows: int) -> list[int]:
    """Numbers of rows in the order of the whole run: every epoch shuffled anew, without what does not fill a rollout.

    Laid out at once, because TRL's sampler forgets on resume how far its generator was: every later epoch of a resumed
    run would take up the order of the first one, and use some rows twice and others never.
    """
    generator = torch.Generator().manual_seed(recipe.seed)
    used = rows - rows % recipe.rollout_prompts
    orders = [torch.randperm(rows, generator=generator).tolist() for _ in range(recipe.epochs)]
    return [number for order in orders for number in order[:used]]


@dataclass(frozen=True, slots=True)
class Chosen:
    """The rows that a run uses, and what the reader found in their images, by the number of the row."""

    rows: list[Row]
    drawn: dict[int, list[str]]


def select(
    recipe: GrpoSettings, contract: Contract, rows: Sequence[Row], skipped: Skipped, read: Read | None = None
) -> Chosen:
    """The rows of a run, in order: labelled, of the wanted modality, short enough. ``read`` reads an image's bytes."""
    chosen = Chosen([], {})
    for row in track(rows, "reading rows", disable=not PartialState().is_main_process):
        if (recipe.rows != "all" and (row.image is not None) != (recipe.rows == "image")) or (
            row.source == MIXED and not recipe.mixed_rows
        ):
            continue
        try:
            if row.request is None and not (row.response and row.response_label):
                raise CorpusError(f"{row.name}: no label, so nothing to reward")
            drawn = [read(blob.data) for blob in conversation(row).blobs()] if read else []
            tokens = len(contract.expand(contract.encode(row, drawn).ids, pictures(row)))
            if tokens > recipe.prompt_tokens:
                raise CorpusError(f"{row.name}: {tokens} tokens, more than prompt_tokens {recipe.prompt_tokens}")
        except CorpusError as error:
            skipped(str(error))
        except GuardError as error:
            skipped(f"{row.name}: {error}")
        else:
            if drawn:
                chosen.drawn[len(chosen.rows)] = drawn
            chosen.rows.append(row)
    return chosen


class WatchedTrainer(GuardGRPOTrainer):
    """Measures every rollout for the alarms. ``safety``, ``watch`` and ``meter`` are set after it is made."""

    safety: SafetyReward
    watch: Watch
    meter: Meter

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        output = super()._generate_and_score_completions(inputs)
        metrics = self._metrics["train"]
        values = measure(self.safety.samples)
        if drift := metrics.get("sampling/sampling_logp_difference/mean"):
            values["drift"] = drift[-1]
        for name, value in self.watch(values).items():
            metrics[name].append(value)
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Also the bound that the loss clipped with, and what the update cost."""
        if "loss" in logs:
            logs |= {"clip_bound": self.epsilon_high, "seconds_per_update": self.meter.seconds[-1]}
            logs["peak_memory_gib"] = peak_memory() / 2**30
        super().log(logs, start_time)


def build(
    recipe: GrpoSettings,
    contract: Contract,
    chosen: Chosen,
    args: GRPOConfig,
    *,
    model: Any,
    raw: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
) -> tuple[WatchedTrainer, StopWhenHacked]:
    """The trainer of a run and its alarm. ``raw`` writes the completions' texts into their log."""
    rows = chosen.rows
    freeze(model, vision=recipe.freeze_vision, projector=recipe.freeze_vision)
    ends = [contract.encoder.im_end, contract.tokenizer.eos_token_id]
    log = Path(args.output_dir) / "completions" if PartialState().is_main_process else None
    safety = SafetyReward(rows, recipe.reward, ends, log, raw=raw)
    trainer = WatchedTrainer(
        model=model,
        args=args,
        processing_class=RowProcessor.of(contract, rows, chosen.drawn),
        reward_funcs=[safety],
        train_dataset=Dataset.from_dict({"prompt": [key(number) for number in prompts(recipe, len(rows))]}),
        peft_config=adapters(recipe.lora) if recipe.lora else None,
    )
    sharded = trainer.is_fsdp_enabled or (trainer.is_deepspeed_enabled and args.deepspeed_plugin.zero_stage == 3)
    if sharded and not recipe.freeze_vision and len({row.image is None for row in rows}) == 2:
        raise RecipeError(
            "FSDP and ZeRO-3 gather the vision tower on every rank, and one whose micro-batch has no image never "
            "does; set freeze_vision to true, train one modality (rows), or use DDP"
        )
    trainer.safety, trainer.watch, trainer.meter = safety, Watch(recipe.alarms), Meter()
    stop = StopWhenHacked(trainer.watch, recipe.updates_per_rollout)
    clipping = DynamicClipping(
        trainer,
        recipe.updates_per_rollout,
        epsilon=recipe.epsilon,
        floor=recipe.clip_floor,
        dynamic=recipe.dynamic_clipping,
    )
    for callback in (trainer.meter, clipping, stop, *callbacks):
        trainer.add_callback(callback)
    return trainer, stop


def train(
    recipe: GrpoSettings,
    guard: str,
    data: Path,
    rows: Sequence[Row],
    output: Path,
    skipped: Skipped,
    *,
    console: Console,
    read: Read | None = None,
    raw: bool = False,
    cpu: bool = False,
) -> Path:
    """Trains ``guard`` (nano, a folder or a hub id) on the rows of ``data``; returns the new one's, ``output/model``.

    ``read`` reads an image's bytes, for a recipe with ``reader``. Raises ``RewardHacked`` where an alarm stopped it,
    ``OutputError`` for a folder that was begun with another recipe, other data or other weights.
    """
    if recipe.rollouts != "transformers" and importlib.util.find_spec("vllm") is None:
        raise RecipeError(
            f"rollouts {recipe.rollouts} needs vLLM here: `pip install 'vllm>=0.32,<0.33'`, or --set "
            "rollouts=transformers"
        )
    contract = load_contract(guard, max_pixels=recipe.max_pixels)
    # the alarms may change: a run that one stopped goes on with another limit
    settings = {key: value for key, value in asdict(recipe).items() if key != "alarms"}
    settings |= {"model": contract.facts.revision, "data": digest(data)}
    begin_once(output, settings)
    folder, last = output / "model", last_checkpoint(output)
    if (folder / "guard.json").is_file():
        console.print(f"{folder} is finished", markup=False)
        return folder
    # what the main process has read stands in the file when the others come
    with PartialState().main_process_first():
        reader = DrawnText(output / "drawn.jsonl", read) if recipe.reader and read else None
        chosen = select(recipe, contract, rows, skipped, reader)
    args = arguments(recipe, output, len(chosen.rows), cpu=cpu)
    args.disable_tqdm = True
    model = load_model(contract.folder)
    if args.bf16 and args.device.type == "cpu":
        hasten(model)
    trainer, stop = build(recipe, contract, chosen, args, model=model, raw=raw, callbacks=curves("grpo"))
    with Bar().over(trainer):
        trainer.train(resume_from_checkpoint=str(last) if last else None)
    console.print(trainer.meter.summary(), highlight=False)
    stop.raise_if_over(str(last_checkpoint(output)))
    return save_guard(trainer, contract, folder)
