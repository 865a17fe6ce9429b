"""Lets PyPI's torchvision be imported beside a torch without CUDA; for the environment of the vLLM tests.

Its compiled operators link against CUDA and do not load there, and then its import fails over two names that nobody
has defined. A ``.pth`` file imports this module at the interpreter's start; torch is imported where torchvision is.
"""

from __future__ import annotations

import importlib.abc
import sys
from typing import Any

_kept: list[Any] = []


class _BeforeTorchvision(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any, target: Any = None) -> None:
        if name != "torchvision":
            return
        sys.meta_path.remove(self)
        import torch

        if torch.version.cuda is None:
            library = torch.library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            _kept.append(library)


sys.meta_path.insert(0, _BeforeTorchvision())
