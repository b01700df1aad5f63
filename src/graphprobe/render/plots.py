"""Plots of hidden states: per token, from layer to layer, as histograms, and as a map of tokens and layers."""

from __future__ import annotations

import io
import math
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from graphprobe.errors import RenderError, nearest
from graphprobe.render.engine import write
from graphprobe.render.labels import clip
from graphprobe.render.states import LayerStates, States, parted

KINDS = ("tokens", "steps", "histogram", "heatmap")
_BEFORE, _AFTER, _THIRD = "#1f65ad", "#d9590b", "#5c6670"
_FLOOR = 1e-9  # the smallest value on a logarithmic scale
_TICKS = 24
_WIDE = 50.0  # sizes of tokens that differ by more are drawn on a logarithmic scale


def plot_states(
    states: States, path: str | os.PathLike[str], *, kinds: Sequence[str] = KINDS, layer: str | None = None
) -> None:
    """Write the plots below one another as ``.png`` or ``.svg``; tokens and histogram are those of `layer`.

    Without `layer` it is the first whose states part, else the one where they differ most. Raises RenderError, also
    where matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as problem:
        raise RenderError("plots need matplotlib: pip install 'graphprobe[plots]'") from problem
    suffix = Path(path).suffix.lower().removeprefix(".")
    if suffix not in ("png", "svg"):
        raise RenderError(f"cannot tell what to write to {path}: name it .png or .svg")
    unknown = [kind for kind in kinds if kind not in _DRAW]
    if unknown or not kinds:
        raise RenderError(f"no plot is called {unknown[0] if unknown else ''!r}: choose of {', '.join(KINDS)}")
    chosen = _choose(states, layer)
    figure = Figure(figsize=(11, 3.6 * len(kinds)), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, kind in zip(figure.subplots(len(kinds), 1, squeeze=False)[:, 0], kinds, strict=True):
        _DRAW[kind](axes, states, chosen)
    data = io.BytesIO()
    figure.savefig(data, format=suffix)
    write(path, data.getvalue())


def _choose(states: States, name: str | None) -> LayerStates:
    if not states.layers:
        raise RenderError("there are no hidden states to plot")
    if name is None:
        return parted(states) or max(states.layers, key=lambda layer: max(map(_finite, layer.error), default=0.0))
    known = {layer.name: layer for layer in states.layers}
    if name not in known:
        raise RenderError(f"no layer {name!r} among the hidden states{nearest(name, known)}")
    return known[name]


def _draw_tokens(axes: Any, states: States, layer: LayerStates) -> None:
    place = range(len(layer.rms_before))
    axes.plot(place, layer.rms_before, color=_BEFORE, label="rms before", linewidth=2.5)
    axes.plot(place, layer.rms_after, color=_AFTER, label="rms after", linestyle="--", marker=".", markersize=4)
    axes.set_title(f"{layer.name}: size of the state of each token, and its correlation", loc="left", fontsize=11)
    axes.set_ylabel("rms")
    sizes = [value for value in (*layer.rms_before, *layer.rms_after) if value > 0 and math.isfinite(value)]
    if sizes and max(sizes) > _WIDE * min(sizes):  # one token that all attend to would flatten the others
        axes.set_yscale("log")
    other = axes.twinx()
    values = [math.nan if value is None else value for value in layer.correlation]
    other.plot(place, values, color=_THIRD, linestyle=":", label="correlation")
    known = [value for value in values if math.isfinite(value)]
    other.set_ylim(min([0.9, *known]) - 0.02, 1.02)
    other.set_ylabel("correlation")
    lines = [*axes.get_lines(), *other.get_lines()]
    axes.legend(lines, [line.get_label() for line in lines], fontsize=9)
    _name_tokens(axes, states, len(layer.rms_before))


def _draw_steps(axes: Any, states: States, layer: LayerStates) -> None:
    layers = [each for each in states.layers if each.step_before]
    axes.set_title("what each layer changes: difference from the state above it, relative", loc="left", fontsize=11)
    if not layers:
        axes.text(0.5, 0.5, "one layer alone has no step", ha="center", transform=axes.transAxes)
        return
    place = range(len(layers))
    for steps, colour, style, label in (
        ([each.step_before for each in layers], _BEFORE, "-", "before"),
        ([each.step_after for each in layers], _AFTER, "--", "after"),
    ):
        middle = [max(statistics.median(map(_finite, step)), _FLOOR) for step in steps]
        axes.plot(place, middle, color=colour, linestyle=style, marker="o", markersize=4, label=f"{label} (median)")
        low, high = ([max(_share(step, share), _FLOOR) for step in steps] for share in (0.1, 0.9))
        axes.fill_between(place, low, high, color=colour, alpha=0.15, label=f"{label} (10 % to 90 % of the tokens)")
    for index, each in enumerate(layers):
        if each.adds_nothing:
            axes.annotate("adds nothing", (index + 0.15, _FLOOR * 3), rotation=90, fontsize=8, va="bottom")
    axes.set_yscale("log")
    axes.legend(fontsize=9)
    _name_layers(axes, [each.name for each in layers])


def _draw_histogram(axes: Any, states: States, layer: LayerStates) -> None:
    axes.set_title(f"{layer.name}: values of the state", loc="left", fontsize=11)
    axes.stairs(layer.counts_before, layer.edges, color=_BEFORE, fill=True, alpha=0.3, label="before")
    axes.stairs(layer.counts_after, layer.edges, color=_AFTER, linestyle="--", linewidth=1.5, label="after")
    axes.set_xscale("asinh", linear_width=1.0)
    low, high = math.asinh(layer.edges[0]), math.asinh(layer.edges[-1])
    ticks = [math.sinh(low + (high - low) * step / 8) for step in range(9)]
    axes.set_xticks(ticks, [f"{tick:.2g}" for tick in ticks], fontsize=8)
    axes.minorticks_off()
    axes.set_yscale("symlog", linthresh=1)
    axes.set_ylabel("elements")
    axes.legend(fontsize=9)


def _draw_heatmap(axes: Any, states: States, layer: LayerStates) -> None:
    from matplotlib.colors import LogNorm

    grid = [[max(_finite(value), _FLOOR) for value in each.error] for each in states.layers]
    width = max(len(row) for row in grid)
    grid = [row + [_FLOOR] * (width - len(row)) for row in grid]
    largest = max(max(row) for row in grid)
    scale = LogNorm(vmin=max(largest * 1e-5, _FLOOR), vmax=max(largest, _FLOOR * 10), clip=True)
    image = axes.imshow(grid, aspect="auto", norm=scale, cmap="cividis", interpolation="nearest")
    axes.set_title("relative error of each token in each layer", loc="left", fontsize=11)
    every = max(1, math.ceil(len(grid) / _TICKS))
    axes.set_yticks(range(0, len(grid), every), [clip(each.name, 22) for each in states.layers[::every]], fontsize=8)
    axes.figure.colorbar(image, ax=axes, label="relative L2")
    _name_tokens(axes, states, width)


_DRAW = {"tokens": _draw_tokens, "steps": _draw_steps, "histogram": _draw_histogram, "heatmap": _draw_heatmap}


def _name_tokens(axes: Any, states: States, size: int) -> None:
    every = max(1, math.ceil(size / _TICKS))
    # matplotlib reads $ as mathematics
    names = [t.replace("$", r"\$") for t in states.tokens] or [str(i) for i in range(size)]
    names += [str(i) for i in range(len(names), size)]
    short = [clip(name.strip() or "_", 12) for name in names[:size:every]]
    axes.set_xticks(range(0, size, every), short, fontsize=8, rotation=40 if states.tokens else 0)
    axes.set_xlabel("token")


def _name_layers(axes: Any, names: Sequence[str]) -> None:
    every = max(1, math.ceil(len(names) / _TICKS))
    short = [name.rpartition(".")[2] if name.rpartition(".")[2].isdigit() else clip(name, 16) for name in names]
    axes.set_xticks(range(0, len(names), every), short[::every], fontsize=8)
    axes.set_xlabel("layer")


def _share(values: Sequence[float], share: float) -> float:
    """Return the value below which so many of the values lie."""
    ranked = sorted(map(_finite, values))
    return ranked[min(len(ranked) - 1, int(share * len(ranked)))]


def _finite(value: float) -> float:
    """Put NaN and infinity at the upper end of a picture, where they are seen."""
    return value if math.isfinite(value) else 1e3
