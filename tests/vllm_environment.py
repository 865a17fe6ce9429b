"""The environment in which the tests run the real vLLM: its CPU build, exact versions, in ``.clients/vllm/``.

Made once (two minutes and 3 GB with a warm cache of pip) and reused while ``vllm-requirements.txt`` is unchanged.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from tests.clients import environments
from tests.support.virtualenv import Missing, made

__all__ = ["Missing", "python", "serve", "variables"]

_ROOT = Path(__file__).parents[1]
_SHIM = Path(__file__).parent / "support" / "torchvision_without_cuda.py"
#: ``vllm serve`` asks for the version of ``vllm``; the CPU build on PyPI has another name
_METADATA = "Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n"


def python() -> Path:
    """The environment's interpreter; raises ``Missing`` where it cannot be made."""
    return made("vllm", Path(__file__).with_name("vllm-requirements.txt"), _finish)


def serve() -> list[str]:
    """``vllm serve``, as its users type it."""
    return [str(python().with_name("vllm")), "serve"]


def variables(**more: str) -> Mapping[str, str]:
    """What a vLLM process gets: this repository's packages, no hub, and a small share of the machine."""
    return {
        **environments.variables(),
        "PYTHONPATH": f"{_ROOT}:{_ROOT / 'integrations'}",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        **more,
    }


def _finish(packages: Path) -> None:
    shutil.copy(_SHIM, packages)
    (packages / "torchvision_without_cuda.pth").write_text(f"import {_SHIM.stem}\n")
    alias = packages / "vllm-0.32.0+cpu.dist-info"
    alias.mkdir()
    (alias / "METADATA").write_text(_METADATA)
