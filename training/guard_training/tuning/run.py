"""What the trainers of SFT and RL share: adapters, checkpoints that really come back, what a step costs, curves, the
guard's folder at the end.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from peft import LoraConfig, PeftModel
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn
from transformers import PrinterCallback, Trainer, TrainerCallback

from guard_training.rowfile import begin
from guard_training.tuning.contract import Contract, load_model
from guard_training.tuning.settings import LoraSettings

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def adapters(lora: LoraSettings) -> LoraConfig:
    """Adapters on the language model alone: ``all-linear`` would reach into the vision tower."""
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.scale,
        lora_dropout=lora.dropout,
        target_modules=rf".*language_model.*\.({'|'.join(lora.targets)})",
        task_type="CAUSAL_LM",
    )


def freeze(model: Any, *, vision: bool, projector: bool) -> None:
    """Keeps the vision tower's blocks, or what projects them into the language model, as they are."""
    for name, parameter in model.model.visual.named_parameters():
        if projector if name.startswith("merger.") else vision:
            parameter.requires_grad_(False)


def begin_once(output: Path, settings: dict[str, Any]) -> None:
    """Notes what a run is made of, in its folder, before any process goes on."""
    state = PartialState()
    if state.is_main_process:
        begin(output / "run", settings)
    state.wait_for_everyone()


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint: a kill in the middle of saving leaves one without its last file."""
    found = {int(match[1]): path for path in folder.glob("checkpoint-*") if (match := _CHECKPOINT.fullmatch(path.name))}
    return next((found[step] for step in sorted(found, reverse=True) if _whole(found[step])), None)


def _whole(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / "trainer_state.json").read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return True


class ResumingTrainer(Trainer):
    """Mix in before a trainer of Qwen2.5-VL: stock Trainer resumes a full fine-tune with *no weights at all*.

    The saved names are the legacy ones and the load is not strict, so every parameter stays at its start while step,
    schedule and optimiser come back, with a warning at most.
    """

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        model = model or self.model
        if hasattr(model, "peft_config") or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        loaded = type(model).from_pretrained(resume_from_checkpoint, dtype=model.dtype)
        model.load_state_dict(loaded.state_dict())


def save_guard(trainer: Any, contract: Contract, folder: Path) -> Path:
    """The folder that a worker serves; ``guard.json`` is written last. Adapters are merged; ``adapter/`` keeps them."""
    main = PartialState().is_main_process
    if hasattr(trainer.accelerator.unwrap_model(trainer.model), "peft_config"):
        kept = folder.parent / "adapter"
        trainer.save_model(str(kept))
        if main:
            merged = PeftModel.from_pretrained(load_model(contract.folder), kept).merge_and_unload()
            merged.save_pretrained(folder)
    else:
        trainer.save_model(str(folder))
    if main:
        contract.save(folder)
    PartialState().wait_for_everyone()
    return folder


def peak_memory() -> int:
    """Bytes: the most that this process has held on its GPU, or without one in main memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    # kibibytes on Linux, bytes on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class StopAfter(TrainerCallback):
    """Ends a run early on its own schedule, with a checkpoint to go on from."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if state.global_step >= self._step:
            control.should_save = control.should_training_stop = True
        return control


class Meter(TrainerCallback):
    """Seconds per step and peak memory."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self._start)

    def summary(self) -> str:
        """One line for the end of a run."""
        if not self.seconds:
            return "no step was left to do"
        where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        # the first step also allocates the optimiser and warms up the kernels
        later = self.seconds[1:] or self.seconds
        return (
            f"{where}: {len(self.seconds)} steps, the first {self.seconds[0]:.2f} s, then {statistics.mean(later):.2f} "
            f"s each; peak memory {peak_memory() / 2**30:.2f} GiB per device"
        )


class Bar(TrainerCallback):
    """A progress bar with the loss, on the main process; a pipe gets its last state only."""

    @contextlib.contextmanager
    def over(self, trainer: Any) -> Iterator[None]:
        """Shows the trainer's steps, and gives the terminal back however the training ends."""
        columns = (*Progress.get_default_columns()[:-1], MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, disable=not PartialState().is_main_process) as self._progress:
            trainer.remove_callback(PrinterCallback)
            trainer.add_callback(self)
            yield

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._task = self._progress.add_task("training", total=state.max_steps, completed=state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._progress.update(self._task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self._progress.update(self._task, description=f"training (loss {float(logs['loss']):.3f})")


class OtelCurves(TrainerCallback):
    """Each logged number as a gauge ``guard_training.<name>`` with the step as an attribute of the run's stage."""

    def __init__(self, provider: MeterProvider, stage: str) -> None:
        self._provider, self._stage = provider, stage
        self._meter = provider.get_meter("guard_training")
        self._gauges: dict[str, Any] = {}

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        for name, value in {**(logs or {}), "step": state.global_step}.items():
            if isinstance(value, int | float):
                if name not in self._gauges:
                    self._gauges[name] = self._meter.create_gauge(f"guard_training.{name.replace('/', '.')}")
                self._gauges[name].set(value, {"guard_training.stage": self._stage})

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._provider.force_flush()


def curves(stage: str) -> list[TrainerCallback]:
    """OpenTelemetry gauges where ``OTEL_EXPORTER_OTLP_ENDPOINT`` says where to send them."""
    if not (os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT") or os.environ.get("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT")):
        return []
    from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter

    return [OtelCurves(MeterProvider([PeriodicExportingMetricReader(OTLPMetricExporter())]), stage)]
