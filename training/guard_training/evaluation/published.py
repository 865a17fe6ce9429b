"""What GuardReasoner-VL's paper reports (arXiv 2505.11049, its tables of F1): per cent, harmful is the positive class.

Averages are weighed by the number of labels. A figure that the paper does not give is absent, never guessed.
"""

from __future__ import annotations

from collections.abc import Mapping

from guard_training.evaluation.outcomes import Side

_REQUEST = (
    "ToxicChat", "HarmBenchPrompt", "OpenAIModeration", "AegisSafetyTest", "SimpleSafetyTests", "WildGuardTestPrompt",
    "text", "HarmImageTest", "SPA_VL_Eval", "all",
)  # fmt: skip
_RESPONSE = (
    "HarmBenchResponse", "SafeRLHF", "BeaverTails", "XSTestReponseHarmful", "WildGuardTestResponse",
    "text", "SPA_VL_Eval", "all",
)  # fmt: skip

#: mean tokens of one verdict
TOKENS: Mapping[str, float] = {
    "GuardReasoner-VL 3B": 213.32,
    "GuardReasoner-VL-Eco 3B": 187.30,
    "GuardReasoner-VL 7B": 208.33,
    "GuardReasoner-VL-Eco 7B": 180.08,
}


def _row(names: tuple[str, ...], figures: str) -> dict[str, float]:
    return {name: float(one) for name, one in zip(names, figures.split(), strict=True) if one != "-"}


#: side -> model -> benchmark, or "text" and "all" for the averages -> F1
PUBLISHED: Mapping[Side, Mapping[str, Mapping[str, float]]] = {
    "request": {
        model: _row(_REQUEST, figures)
        for model, figures in {
            "GuardReasoner-VL 7B": "76.51 98.30 70.98 90.13 98.99 88.35 79.88 70.84 85.60 79.07",
            "GuardReasoner-VL 3B": "74.45 89.10 70.83 88.79 99.50 88.92 78.77 70.93 86.47 78.73",
            "GuardReasoner-VL-Eco 7B": "76.26 98.73 70.82 90.34 99.50 88.54 79.82 64.84 85.26 77.49",
            "GuardReasoner-VL-Eco 3B": "73.47 88.58 70.87 89.04 99.50 89.16 78.43 66.79 85.82 77.39",
            "Qwen2.5-VL 7B": "40.99 91.61 57.21 81.58 100 74.77 58.04 43.88 66.02 56.53",
            "Qwen2.5-VL 3B": "- - - - - - - - - 53.53",
            "Llama Guard 3-Vision 11B": "- - - - - - - 0.48 54.86 48.03",
            "Azure Content Safety": "- - - - - - - - - 44.95",
            "OpenAI Moderation": "- - - - - - - - - 44.20",
            "GuardReasoner 8B (text)": "- - - - - - 81.09 - - 41.77",
            "WildGuard": "- - - - - - 77.99 - - -",
        }.items()
    },
    "response": {
        model: _row(_RESPONSE, figures)
        for model, figures in {
            "GuardReasoner-VL 7B": "87.22 66.37 84.76 92.72 79.04 79.42 73.22 77.58",
            "GuardReasoner-VL-Eco 3B": "84.72 66.96 85.39 93.59 77.39 79.31 72.01 77.14",
            "GuardReasoner-VL-Eco 7B": "86.22 66.15 85.51 93.33 78.60 79.51 70.81 76.94",
            "GuardReasoner-VL 3B": "85.76 66.37 85.16 93.08 76.07 78.83 71.19 76.56",
            "Qwen2.5-VL 7B": "65.21 59.73 77.29 47.06 42.21 62.25 60.00 61.58",
            "Qwen2.5-VL 3B": "- - - - - - - 56.51",
            "Llama Guard 3-Vision 11B": "- - - - - - - 54.01",
            "GuardReasoner 8B (text)": "- - - - - 81.22 - -",
        }.items()
    },
}
