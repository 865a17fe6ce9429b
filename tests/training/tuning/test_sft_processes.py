"""R-SFT on two processes (gloo, CPU): the command under DDP, and a sharded vision tower."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from guard_training.corpus.rows import Row, row_to_json
from guard_training.process import LAUNCH
from guard_training.tuning.contract import load_model

pytestmark = pytest.mark.slow

SECONDS = 200.0
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}

#: Two ranks, every block of both towers sharded; rank 0 has text only. Argument: the guard's folder.
SHARDED = """
import os, sys
import torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from PIL import Image
from guard_training.corpus.rows import Row, Skipped
from guard_training.tuning.contract import load_contract, load_model
from guard_training.tuning.sft import Collator, encode_rows, to_dataset

folder, picture, always = sys.argv[1], sys.argv[2], sys.argv[3] == "always"
dist.init_process_group("gloo")
rank = dist.get_rank()
contract = load_contract(folder)
row = Row("r", "made", "bread", "harmful", image=picture and rank and __import__("pathlib").Path(picture) or None,
          rationale="why")
data = to_dataset(encode_rows(contract, [row], 10_000, Skipped()))
batch = Collator(contract, always_image=always)([data[0]])
model = load_model(contract.folder)
mesh = dist.init_device_mesh("cpu", (2,))
for block in [*model.model.visual.blocks, model.model.visual.merger, *model.model.language_model.layers]:
    fully_shard(block, mesh=mesh)
fully_shard(model, mesh=mesh)
for _ in range(2):
    loss = model(**batch).loss
    loss.backward()
assert all(p.grad is not None for p in model.parameters())
dist.barrier()
print("done", rank, float(loss.detach()), flush=True)
dist.barrier()
os._exit(0)  # gloo may abort while it is taken down, after all that is asked here
"""


def _launch(*arguments: object, seconds: float = SECONDS) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return subprocess.run(
        [*command, *map(str, arguments)], env=ENVIRONMENT, timeout=seconds, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight rows in an order that gives most micro-batches of one row no image."""
    here = tmp_path_factory.mktemp("data")
    Image.new("RGB", (60, 60), (9, 9, 200)).save(here / "a.png")
    rows = [
        Row(f"r{n}", "made", f"bake bread {n}", "harmful", image=here / "a.png" if n == 3 else None, rationale="why")
        for n in range(8)
    ]
    file = here / "rows.jsonl"
    file.write_text("".join(json.dumps(row_to_json(row, here)) + "\n" for row in rows))
    return file


def test_two_processes_train_what_one_trains(folder: Path, data: Path, tmp_path: Path) -> None:
    value = yaml.safe_load(Path("training/recipes/sft-nano.yaml").read_text())
    value |= dict(model=str(folder), reader=False, epochs=1, global_batch=4, batch_per_device=1, learning_rate=1e-3,
                  cutoff=900, max_pixels=None, freeze_vision=False, log_every=1)  # fmt: skip
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(yaml.safe_dump(value))
    command = ("sft", "--recipe", recipe, "--data", data, "--cpu", "--output")
    two = _launch("-m", "guard_training", *command, tmp_path / "two")
    assert two.returncode == 0, two.stderr[-3000:]
    assert "8 rows" in two.stdout
    one = subprocess.run(
        [*LAUNCH, *map(str, command), str(tmp_path / "one")],
        env=ENVIRONMENT, timeout=SECONDS, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert one.returncode == 0, one.stderr[-3000:]
    losses = [_losses(tmp_path / name) for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    left, right = (load_model(tmp_path / name / "model").state_dict() for name in ("one", "two"))
    for name in left:
        assert torch.allclose(left[name], right[name], atol=5e-4), name


def _losses(output: Path, step: int = 2) -> list[float]:
    state = json.loads((output / "checkpoints" / f"checkpoint-{step}" / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


def test_a_sharded_tower_does_not_wait_for_a_rank_without_images(folder: Path, data: Path, tmp_path: Path) -> None:
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED)
    picture = data.parent / "a.png"
    done = _launch(script, folder, picture, "always")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("done") == 2
    # what the image behind the end prevents: without it the ranks run other collectives, and hang or fail
    try:
        broken = _launch(script, folder, picture, "never", seconds=40.0)
    except subprocess.TimeoutExpired:
        return
    assert broken.returncode != 0


def test_a_run_killed_for_good_goes_on_with_the_same_losses(folder: Path, data: Path, tmp_path: Path) -> None:
    value = yaml.safe_load(Path("training/recipes/sft-nano.yaml").read_text())
    value |= dict(model=str(folder), reader=False, epochs=20, global_batch=4, batch_per_device=4, save_every=1,
                  cutoff=900, max_pixels=None, log_every=1, keep_checkpoints=3)  # fmt: skip
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(value))
    command = [*LAUNCH, "sft", "--recipe", str(tmp_path / "tiny.yaml"), "--data",
               str(data), "--cpu", "--output"]  # fmt: skip
    run = subprocess.Popen([*command, str(tmp_path / "cut")], env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    checkpoints = tmp_path / "cut" / "checkpoints"
    end = time.monotonic() + SECONDS
    while not (checkpoints / "checkpoint-3" / "trainer_state.json").is_file():
        assert run.poll() is None
        assert time.monotonic() < end
        time.sleep(0.02)
    run.kill()
    run.wait()
    for output in ("cut", "whole"):
        subprocess.run([*command, str(tmp_path / output)], env=ENVIRONMENT, timeout=SECONDS, check=True)
    cut, whole = (_losses(tmp_path / output, 40) for output in ("cut", "whole"))
    assert len(whole) == 40
    assert cut == pytest.approx(whole, rel=1e-4)
