"""sweep.png: the held-out loss of each trial over each swept field."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..files.commit import replaced
from .sweep import Axis, Trial

PICTURE_FILE = "sweep.png"
_TRIAL, _BEST, _INK, _FAINT = "#2a78d6", "#c2410c", "#2b2f36", "#d9dce1"


def draw(folder: Path, trials: Sequence[Trial], axes: Sequence[Axis]) -> Path | None:
    """Draws the trials, the best first, into `folder`; None where none has a loss."""
    measured = [trial for trial in trials if trial.loss is not None]
    if not measured:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    figure = Figure(figsize=(1.5 + 3.5 * len(axes), 4), dpi=110, layout="constrained")
    canvas: Any = FigureCanvasAgg(figure)
    for i, (axis, plot) in enumerate(zip(axes, np.atleast_1d(figure.subplots(1, len(axes), sharey=True)), strict=True)):
        _draw(plot, axis, measured)
        if i == 0:
            plot.set_ylabel("held-out loss", color=_INK)
    figure.suptitle(f"{len(measured)} trials; the best in orange: {measured[0].loss:.4f}", color=_INK, fontsize=11)
    canvas.draw()
    picture = folder / PICTURE_FILE
    with replaced(picture) as file:
        Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3]).quantize(64).save(file, "png", optimize=True)
    return picture


def _draw(plot: Any, axis: Axis, trials: Sequence[Trial]) -> None:
    losses = [trial.loss for trial in trials]
    values = [trial.values[axis.name] for trial in trials]
    numbers = all(isinstance(value, (int, float)) for value in values)
    places = values if numbers else [axis.choices.index(value) for value in values]
    plot.scatter(places[1:], losses[1:], color=_TRIAL, s=36)
    plot.scatter(places[:1], losses[:1], color=_BEST, s=64, zorder=3)
    if numbers:
        plot.set_xscale("log", base=10 if axis.name == "lr" else 2)
        if axis.choices:
            plot.set_xticks(sorted(axis.choices), [f"{value:g}" for value in sorted(axis.choices)])
            plot.minorticks_off()
    else:
        plot.set_xticks(range(len(axis.choices)), [text.replace("+", "\n") for text in axis.choices])
        plot.set_xlim(-0.5, len(axis.choices) - 0.5)
    plot.set_xlabel(axis.name, color=_INK)
    plot.grid(color=_FAINT, linewidth=0.6)
    plot.set_axisbelow(True)
    plot.tick_params(colors=_INK, labelsize=9)
    plot.spines[["top", "right"]].set_visible(False)
