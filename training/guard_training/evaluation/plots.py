"""The report's plots as SVG, each a ``data:`` address: a page that holds them needs nothing from outside.

The same outcomes give the same bytes. No pyplot: it keeps global state.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from guard_training.evaluation import curves
from guard_training.evaluation.metrics import groups, scored
from guard_training.evaluation.outcomes import Outcome, Side
from guard_training.evaluation.stats import percentile

#: Okabe and Ito's colours, told apart without red and green
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_STYLE: Any = {
    "svg.hashsalt": "guard", "font.size": 9, "axes.grid": True, "grid.color": "#dddddd", "grid.linewidth": 0.6,
    "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
    "figure.constrained_layout.use": True,
}  # fmt: skip

Models = Mapping[str, Sequence[Outcome]]


def rates(
    summaries: Mapping[str, Mapping[str, Any]],
    figures: tuple[tuple[str, str], tuple[str, str]] = (
        ("recall", "recall"),
        ("false_positive_rate", "false positives"),
    ),
) -> str:
    """Two rates (key and title) of every source and side with their intervals, one colour per model."""
    names = list(dict.fromkeys((e["source"], e["side"]) for s in summaries.values() for e in s["sources"]))
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(9, 1 + 0.32 * max(2, len(names))))
        panels = figure.subplots(1, 2, sharey=True)
        for panel, (key, title) in zip(panels, figures, strict=True):
            for shift, (model, colour) in enumerate(zip(summaries, _colours(), strict=False)):
                offset = 0.5 * ((shift + 0.5) / len(summaries) - 0.5)
                _dots(panel, summaries[model]["sources"], key, names, offset, colour, model)
            panel.set(title=f"{title}, per cent with 95 % interval", xlim=(-2, 102))
        panels[0].set_yticks(range(len(names)), [f"{source} ({side})" if side else source for source, side in names])
        panels[0].invert_yaxis()
        if len(summaries) > 1:
            panels[1].legend(loc="upper right")
        return _address(figure)


def _dots(
    panel: Axes, entries: Sequence[Any], key: str, names: Sequence[Any], offset: float, colour: str, model: str
) -> None:
    found = [(names.index((one["source"], one["side"])) + offset, one[key]) for one in entries if one[key] is not None]
    if not found:
        return
    values = [100 * one["value"] for _, one in found]
    spread = _spread(values, [(100 * one["interval"][0], 100 * one["interval"][1]) for _, one in found])
    panel.errorbar(values, [y for y, _ in found], xerr=spread, fmt="o", ms=3.5, lw=1, color=colour, label=model)


def _spread(values: Sequence[float], bounds: Sequence[tuple[float, float]]) -> list[list[float]]:
    """Distances below and above; rounding may put a bound a hair on the wrong side of its value."""
    pairs = list(zip(values, bounds, strict=True))
    return [
        [max(0.0, value - low) for value, (low, _) in pairs],
        [max(0.0, high - value) for value, (_, high) in pairs],
    ]


def score_curves(models: Models, side: Side) -> str | None:
    """ROC, and precision against recall: each model over all sources (each source weighs the same), and thin lines for
    the first model's sources with both classes. None without scores."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(9, 4.2))
        left, right = figure.subplots(1, 2)
        drawn = 0
        for number, ((model, outcomes), colour) in enumerate(zip(models.items(), _colours(), strict=False)):
            truth, scores, sources = scored(outcomes, side)
            curve = curves.curve(truth, scores, curves.even_weights(truth, sources)) if len(set(scores)) > 1 else None
            if curve is None:
                continue
            drawn += 1
            left.plot(
                curve.false_positive_rate,
                curve.recall,
                color=colour,
                lw=2,
                label=f"{model} {curve.area:.3f}",
            )
            name = f"{model} {curve.average_precision:.3f}"
            right.step(curve.recall, curve.precision, where="pre", color=colour, lw=2, label=name)
            if number == 0:
                _thin(left, right, outcomes, side)
        if not drawn:
            return None
        left.plot([0, 1], [0, 1], color="#999999", lw=0.8, ls=":")
        left.set(title="ROC (area)", xlabel="false-positive rate", ylabel="recall", xlim=(0, 1), ylim=(0, 1.01))
        right.set(
            title="precision and recall (average)", xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.01)
        )
        left.legend(loc="lower right", fontsize=7)
        right.legend(loc="lower left", fontsize=7)
        return _address(figure)


def _thin(left: Axes, right: Axes, outcomes: Sequence[Outcome], side: Side) -> None:
    shades = iter(("#777777", "#999999", "#555555", "#aaaaaa") * 20)
    styles = iter(("-", "--", "-.", ":") * 20)
    for (source, given), rows in groups(outcomes).items():
        truth, scores, _ = scored(rows, side)
        curve = curves.curve(truth, scores) if given == side else None
        if curve is not None:
            look: dict[str, Any] = {"color": next(shades), "ls": next(styles), "lw": 0.9}
            left.plot(curve.false_positive_rate, curve.recall, label=f"{source} {curve.area:.3f}", **look)
            right.step(curve.recall, curve.precision, where="pre", **look)


def calibration(models: Models, side: Side) -> str | None:
    """Share of harmful rows against score, and how often each score is given. None without scores."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(9, 3.8))
        left, right = figure.subplots(1, 2)
        first = True
        for (model, outcomes), colour in zip(models.items(), _colours(), strict=False):
            truth, scores, _ = scored(outcomes, side)
            if len(set(scores)) < 2:
                continue
            bins = [one for one in curves.reliability(truth, scores) if one.mean_score is not None]
            at, share = [one.mean_score for one in bins], [one.harmful.value or 0.0 for one in bins]
            error = curves.calibration_error(bins) or 0.0
            bounds = [one.harmful.interval or (0.0, 1.0) for one in bins]
            spread = _spread(share, bounds)
            left.errorbar(at, share, spread, fmt="o-", ms=4, lw=1.2, color=colour, label=f"{model}, ECE {error:.3f}")
            if first:
                kinds = [[s for s, is_ in zip(scores, truth, strict=True) if is_ is kind] for kind in (True, False)]
                right.hist(
                    kinds, bins=20, range=(0, 1), stacked=True, label=("harmful", "unharmful"), color=COLOURS[1:3]
                )
                right.set(title=f"scores of {model}", xlabel="score", ylabel="rows", xlim=(0, 1))
                right.legend()
                first = False
        if first:
            return None
        left.plot([0, 1], [0, 1], color="#999999", lw=0.8, ls=":")
        left.set(
            title="reliability", xlabel="mean score of the bin", ylabel="share harmful", xlim=(0, 1), ylim=(0, 1.01)
        )
        left.legend(loc="upper left", fontsize=7)
        return _address(figure)


def costs(models: Models) -> str | None:
    """Histograms of seconds and of tokens per verdict. None where nobody measured any."""
    known: dict[str, dict[str, list[float]]] = {}
    for title, name in (
        ("seconds per answer, under load", "seconds"),
        ("completion tokens", "completion_tokens"),
        ("reasoning tokens", "reasoning_tokens"),
    ):
        found = {
            model: [v for one in given if (v := getattr(one, name)) is not None] for model, given in models.items()
        }
        if any(found.values()):
            known[title] = found
    if not known:
        return None
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(3.3 * len(known) + 0.5, 2.8))
        for panel, (title, by_model) in zip(
            figure.subplots(1, len(known), squeeze=False)[0], known.items(), strict=True
        ):
            every = [value for values in by_model.values() for value in values]
            top = 1.05 * (percentile(every, 0.99) or 0.0) or 1.0
            for (model, values), colour in zip(by_model.items(), _colours(), strict=False):
                if values:
                    # one long answer must not press all others into the first bar
                    cut = [min(value, top) for value in values]
                    look: dict[str, Any] = {"histtype": "stepfilled", "alpha": 0.55, "color": colour}
                    panel.hist(cut, bins=30, range=(0, top), label=model, **look)
            panel.set(xlabel=f"{title} (last bar: and more)", ylabel="rows", xlim=(0, None))
            if len(by_model) > 1:
                panel.legend(fontsize=7)
        return _address(figure)


def _colours() -> tuple[str, ...]:
    return COLOURS * math.ceil(20 / len(COLOURS))


def _address(figure: Figure) -> str:
    out = io.BytesIO()
    # no metadata: it holds the date and addresses of vocabularies
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return "data:image/svg+xml;base64," + base64.b64encode(out.getvalue()).decode()
