"""A picture that was shrunk on decoding is, pixel by pixel, what vLLM's processor makes of the whole one.

It runs in the environment of vLLM, for torchvision's sake; no engine is started.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests import vllm_environment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

NANO = Path(__file__).parents[2] / "guard_middleware" / "models" / "nano"
#: least and most pixels: nano's, those of GuardReasoner-VL, two that are next to each other, and two alike
BOUNDS = [(3136, 12544), (3136, 1003520), (12000, 12544), (12544, 12544)]
#: (width, height), mode
CASES = [
    *(((1201, 977), "RGB"), ((2000, 300), "RGB"), ((40, 3000), "RGB"), ((640, 480), "L"), ((640, 481), "P")),
    *(((112, 112), "RGB"), ((60, 90), "RGB"), ((20, 30), "RGB"), ((29, 5000), "RGB")),
]
SCRIPT = """
import asyncio, io, json, sys
import numpy, torch
from PIL import Image
from transformers import AutoProcessor
from guard_middleware.worker.vllm_pictures import Pictures
from guard_middleware.worker.weights import ModelFacts

folder, cases, bounds = json.loads(sys.argv[1])
processor = AutoProcessor.from_pretrained(folder).image_processor

def seen(image, least, most):
    size = {"shortest_edge": least, "longest_edge": most}
    made = processor(images=[image], size=size, return_tensors="pt")
    return made["pixel_values"], made["image_grid_thw"]

async def main():
    for least, most in bounds:
        pictures = Pictures(28, ModelFacts("m", "r", min_pixels=least, max_pixels=most))
        for size, mode in cases:
            noise = numpy.random.default_rng(1).integers(0, 256, (size[1] // 7 + 1, size[0] // 7 + 1, 3), "uint8")
            image, file = Image.fromarray(noise).resize(size, Image.BILINEAR).convert(mode), io.BytesIO()
            image.save(file, "PNG")
            ((shown,), (name,)) = await pictures.shown([file.getvalue()])
            whole, small = seen(image.convert("RGB"), least, most), seen(shown, least, most)
            same = all(map(torch.equal, whole, small))
            print(json.dumps([same, shown.width * shown.height, image.width * image.height, most]))
        pictures.close()

asyncio.run(main())
"""


def test_the_model_sees_the_same_pixels_and_nothing_larger_is_kept() -> None:
    try:
        python = vllm_environment.python()
    except vllm_environment.Missing as error:
        pytest.skip(f"no environment with vLLM: {error}")
    ran = subprocess.run(
        [str(python), "-c", SCRIPT, json.dumps([str(NANO), CASES, BOUNDS])],
        env=dict(vllm_environment.variables()),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    found = [json.loads(line) for line in ran.stdout.splitlines()]
    assert len(found) == len(CASES) * len(BOUNDS)
    assert [row for row in found if not row[0]] == []
    assert all(kept <= whole for _, kept, whole, _ in found)
    assert all(kept <= most for _, kept, _, most in found if most == 1003520)
    assert sum(kept < whole for _, kept, whole, _ in found) >= 5
