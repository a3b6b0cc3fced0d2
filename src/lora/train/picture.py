"""loss.png: the losses of a run and its learning rate, from metrics.jsonl."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..files.commit import replaced
from .metrics import METRICS_FILE, read

PICTURE_FILE = "loss.png"
_TRAIN, _EVAL, _RATE, _INK, _FAINT = "#2a78d6", "#c2410c", "#5b6470", "#2b2f36", "#d9dce1"
_FEW = 40  # steps, up to which each gets a dot of its own


def draw(folder: Path) -> Path | None:
    """Draws what metrics.jsonl in `folder` holds beside it; None where it holds no step with a loss."""
    lines = read(folder / METRICS_FILE)
    steps = [line for line in lines if line.get("loss") is not None]
    evaluations = [line for line in lines if line.get("eval_loss") is not None]
    if not steps:
        return None
    # Not pyplot, which keeps figures in a table of the process and asks for a window.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    figure = Figure(figsize=(8, 5), dpi=110, layout="constrained")
    canvas: Any = FigureCanvasAgg(figure)
    losses, rates = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    _draw_losses(losses, steps, evaluations)
    rates.plot([line["step"] for line in steps], [line["lr"] for line in steps], color=_RATE, linewidth=1.5)
    rates.set_ylim(bottom=0)
    rates.set_ylabel("learning rate", color=_INK)
    rates.set_xlabel("optimizer step", color=_INK)
    rates.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
    for axes in (losses, rates):
        axes.grid(color=_FAINT, linewidth=0.6)
        axes.tick_params(colors=_INK, labelsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(_FAINT)
    picture = folder / PICTURE_FILE
    canvas.draw()
    with replaced(picture) as file:  # in 128 colours, which no eye tells from all of them: a third of the bytes
        Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3]).quantize(128).save(file, "png", optimize=True)
    return picture


def _draw_losses(axes: Any, steps: Sequence[dict[str, Any]], evaluations: Sequence[dict[str, Any]]) -> None:
    numbers, values = [line["step"] for line in steps], [float(line["loss"]) for line in steps]
    dots = {"marker": "o", "markersize": 3} if len(steps) <= _FEW else {}
    width = max(1, len(steps) // 20)
    if width > 1:
        axes.plot(numbers, values, color=_TRAIN, alpha=0.3, linewidth=0.8, label="training, each step")
        weights = [float(line.get("trained") or 1) for line in steps]
        label = f"training, mean over the tokens of {width} steps"
        axes.plot(numbers, smoothed(values, weights, width), color=_TRAIN, linewidth=2, label=label)
    else:
        axes.plot(numbers, values, color=_TRAIN, linewidth=2, label="training, each step", **dots)
    if evaluations:
        places = [line["step"] for line in evaluations]
        found = [float(line["eval_loss"]) for line in evaluations]
        best = min(range(len(found)), key=found.__getitem__)  # in the legend: beside its point it would cover others
        label = f"held-out rows (best {found[best]:.3f}, step {places[best]:,})"
        axes.plot(places, found, color=_EVAL, linewidth=1.2, marker="D", markersize=5, label=label)
    axes.set_ylabel("loss (mean over trained tokens)", color=_INK)
    axes.legend(frameon=False, fontsize=9, labelcolor=_INK)


def smoothed(values: Sequence[float], weights: Sequence[float], width: int) -> list[float]:
    """At each place, the weighted mean of the last `width` values; of those that there are, at the start."""
    means = []
    total = weight = 0.0
    for place, (value, share) in enumerate(zip(values, weights, strict=True)):
        total, weight = total + value * share, weight + share
        if place >= width:
            total, weight = total - values[place - width] * weights[place - width], weight - weights[place - width]
        means.append(total / weight)
    return means
