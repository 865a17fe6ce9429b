"""The calibration of a guard's scores: ``calibration.json`` beside the weights, as ``guard-train calibrate`` writes it.

    {"method": "temperature", "revision": REVISION,
     "reason": {"request": {"temperature": 1.7, ...}, "response": null},
     "label": {"request": {"temperature": 1.2, "shift": -0.4, ...}, ...}}

A calibrated score is sigmoid((logit(score) + shift) / temperature), for each kind of verdict (with reasoning, without)
and side by its own numbers; null, and a kind that is not there, leave scores as they are. The order of scores stays.
Only verdicts without reasoning may have a shift, which brings them to the operating point of those with it; their
label is then the side of one half on which the calibrated score lies. A label with reasoning never changes.

Refuses (``ConfigError``): a file of another form, a temperature that is no positive number, a shift that is no number
or stands beside reasoning, a calibration of other weights than those beside it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from guard_middleware.errors import ConfigError
from guard_middleware.types import Label
from guard_middleware.worker.windows import Judgement

FILE, METHOD = "calibration.json", "temperature"
KINDS, SIDES = ("reason", "label"), ("request", "response")
#: Scores nearer to 0 or 1 than this have no finite logit.
_CLIP = 1e-6
_FAR = 700.0


@dataclass(frozen=True, slots=True)
class Scale:
    temperature: float
    shift: float = 0.0

    def __call__(self, score: float) -> float:
        """The calibrated score."""
        kept = min(max(score, _CLIP), 1 - _CLIP)
        margin = (math.log(kept / (1 - kept)) + self.shift) / self.temperature
        return 1 / (1 + math.exp(-margin)) if margin > -_FAR else 0.0


@dataclass(frozen=True, slots=True)
class Calibration:
    """Scales by (kind, side). ``digest`` names them in the revision of every verdict; empty for none."""

    scales: Mapping[tuple[str, str], Scale] = field(default_factory=dict)
    digest: str = ""

    def of(self, judgement: Judgement, *, thought: bool) -> Judgement:
        """The judgement with calibrated scores."""
        kind = "reason" if thought else "label"
        request, request_score = self._side(kind, "request", judgement.request, judgement.request_score)
        response, response_score = self._side(kind, "response", judgement.response, judgement.response_score)
        assert request is not None
        assert request_score is not None
        return replace(
            judgement, request=request, response=response, request_score=request_score, response_score=response_score
        )

    def revision(self, weights: str) -> str:
        """What a verdict names: these weights, and this calibration where there is one."""
        return f"{weights}+{self.digest}" if self.digest else weights

    def _side(
        self, kind: str, side: str, label: Label | None, score: float | None
    ) -> tuple[Label | None, float | None]:
        scale = self.scales.get((kind, side))
        if scale is None or score is None:
            return label, score
        moved = scale(score)
        return ("harmful" if moved >= 0.5 else "unharmful") if scale.shift else label, moved


def read(folder: Path, revision: str) -> Calibration:
    """The calibration of the weights in a folder, which are ``revision``; nothing where there is none."""
    path = folder / FILE
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return Calibration()
    try:
        stated = json.loads(data)
        if stated["method"] != METHOD or not set(stated) <= {"method", "revision", *KINDS}:
            raise ValueError(stated["method"])
        found = {
            (kind, side): _scale(stated[kind][side], kind)
            for kind in KINDS
            for side in SIDES
            if (stated.get(kind) or {}).get(side) is not None
        }
        of = stated["revision"]
    except (ValueError, LookupError, TypeError, AttributeError):
        raise ConfigError("not a calibration that is read here", path=str(path), remedy=_REMEDY) from None
    if of != revision:
        raise ConfigError(f"a calibration of other weights ({of}) than {revision}", path=str(path), remedy=_REMEDY)
    return Calibration(found, hashlib.sha256(data).hexdigest()[:8])


_REMEDY = "delete it, or make it again with `guard-train calibrate`"


def _scale(side: Any, kind: str) -> Scale:
    temperature, shift = side["temperature"], side.get("shift", 0.0)
    if not {type(temperature), type(shift)} <= {int, float} or not 0.0 < temperature < math.inf:
        raise ValueError(side)
    if not math.isfinite(shift) or (shift and kind == "reason"):
        raise ValueError(side)
    return Scale(float(temperature), float(shift))
