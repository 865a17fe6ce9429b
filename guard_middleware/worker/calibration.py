"""The calibration of a guard's scores: ``calibration.json`` beside the weights, as ``guard-train calibrate`` writes it.

    {"method": "temperature", "revision": REVISION,
     "reason": {"request": {"temperature": 1.7, ...}, "response": null}, "label": {...}}

A calibrated score is sigmoid(logit(score) / temperature), for each kind of verdict (with reasoning, without) and side
by its own temperature; null, and a kind that is not there, leave scores as they are. So the order of scores stays, and
one half stays where it is: a label and its score never part.

Refuses (``ConfigError``): a file of another form, a temperature that is no positive number, a calibration of other
weights than those beside it.
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
from guard_middleware.worker.windows import Judgement

FILE, METHOD = "calibration.json", "temperature"
KINDS, SIDES = ("reason", "label"), ("request", "response")
#: Scores nearer to 0 or 1 than this have no finite logit.
_CLIP = 1e-6


def scaled(score: float, temperature: float) -> float:
    """A calibrated score."""
    kept = min(max(score, _CLIP), 1 - _CLIP)
    odds: float = ((1 - kept) / kept) ** (1 / temperature)
    return 1 / (1 + odds)


@dataclass(frozen=True, slots=True)
class Calibration:
    """Temperatures by (kind, side). ``digest`` names them in the revision of every verdict; empty for none."""

    temperatures: Mapping[tuple[str, str], float] = field(default_factory=dict)
    digest: str = ""

    def of(self, judgement: Judgement, *, thought: bool) -> Judgement:
        """The judgement with calibrated scores."""
        kind = "reason" if thought else "label"
        request = self._score(judgement.request_score, kind, "request")
        response = judgement.response_score
        if response is not None:
            response = self._score(response, kind, "response")
        return replace(judgement, request_score=request, response_score=response)

    def revision(self, weights: str) -> str:
        """What a verdict names: these weights, and this calibration where there is one."""
        return f"{weights}+{self.digest}" if self.digest else weights

    def _score(self, score: float, kind: str, side: str) -> float:
        temperature = self.temperatures.get((kind, side))
        return score if temperature is None else scaled(score, temperature)


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
            (kind, side): _temperature(stated[kind][side])
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


def _temperature(side: Any) -> float:
    value = side["temperature"]
    if type(value) not in (int, float) or not 0.0 < value < math.inf:
        raise ValueError(value)
    return float(value)
