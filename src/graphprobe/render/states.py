"""Hidden states of two versions of a model, layer by layer and token by token, as figures to print and to draw."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from graphprobe.errors import RenderError
from graphprobe.render.numbers import count, error, wrap

_BINS = 80
#: A block whose step is so much smaller than the other side's, or than anything, adds nothing.
_FLAT_SHARE, _FLAT = 1e-3, 1e-7
_PARTED = 0.1  # relative error from which two states are called parted


@dataclass(frozen=True)
class LayerStates:
    """What two hidden states [tokens, hidden] have in common; one number for each token unless said otherwise."""

    name: str
    rms_before: tuple[float, ...]
    rms_after: tuple[float, ...]
    error: tuple[float, ...]  # relative L2 difference
    correlation: tuple[float | None, ...]  # Pearson; None where a state is constant
    step_before: tuple[float, ...]  # relative L2 change from the layer above; empty for the first
    step_after: tuple[float, ...]
    edges: tuple[float, ...]  # of the histogram's bins
    counts_before: tuple[int, ...]
    counts_after: tuple[int, ...]

    @property
    def adds_nothing(self) -> str:
        """Say 'before', 'after' or 'both' where the block leaves its input as it was, else ''."""
        if not self.step_before:
            return ""
        before, after = statistics.median(self.step_before), statistics.median(self.step_after)
        flat = [side for side, own, other in (("before", before, after), ("after", after, before)) if _flat(own, other)]
        return "both" if len(flat) == 2 else "".join(flat)


@dataclass(frozen=True)
class States:
    """All layers of a comparison, in graph order."""

    layers: tuple[LayerStates, ...]
    tokens: tuple[str, ...] = ()  # the text of each token, where known


def _flat(own: float, other: float) -> bool:
    return own <= _FLAT or own < _FLAT_SHARE * other


def compare_states(
    names: Sequence[str], before: Sequence[Any], after: Sequence[Any], tokens: Sequence[str] = ()
) -> States:
    """Compare the hidden states of each layer.

    `before` and `after` hold one array [..., tokens, hidden] for each name, anything numpy reads; computed in float64.
    Raises RenderError where numbers or shapes of arrays do not fit.
    """
    numpy = _numpy()
    if not len(names) == len(before) == len(after):
        raise RenderError(f"{len(names)} layers, {len(before)} states before and {len(after)} after: give one each")
    layers: list[LayerStates] = []
    last: tuple[Any, Any] | None = None
    for name, x, y in zip(names, before, after, strict=True):
        x, y = (numpy.asarray(state, dtype=numpy.float64) for state in (x, y))
        if x.shape != y.shape or x.ndim < 2:
            raise RenderError(
                f"the states of {name} are {x.shape} before and {y.shape} after, not [tokens, hidden] twice"
            )
        x, y = (state.reshape(-1, state.shape[-1]) for state in (x, y))
        with numpy.errstate(all="ignore"):  # NaN and infinities in a state are an answer here
            layers.append(_layer(name, x, y, last))
        last = (x, y)
    return States(tuple(layers), tuple(tokens))


def _layer(name: str, x: Any, y: Any, above: tuple[Any, Any] | None) -> LayerStates:
    numpy = _numpy()
    norms = [numpy.linalg.norm(state, axis=1) for state in (x, y)]
    root = math.sqrt(x.shape[1])
    steps: list[tuple[float, ...]] = [(), ()]
    if above is not None and above[0].shape == x.shape:
        steps = [
            _floats(_ratio(numpy.linalg.norm(s - a, axis=1), numpy.linalg.norm(a, axis=1)))
            for s, a in zip((x, y), above, strict=True)
        ]
    # bins on an asinh scale: a few outliers of hidden states would flatten a linear histogram
    spread = numpy.arcsinh(numpy.concatenate([x.ravel(), y.ravel()]))
    spread = spread[numpy.isfinite(spread)]
    ends = (float(spread.min()), float(spread.max())) if spread.size else (0.0, 1.0)
    edges = numpy.sinh(numpy.linspace(ends[0], ends[1] if ends[1] > ends[0] else ends[0] + 1.0, _BINS + 1))
    counts = [tuple(int(n) for n in numpy.histogram(state, edges)[0]) for state in (x, y)]
    return LayerStates(
        name,
        _floats(norms[0] / root),
        _floats(norms[1] / root),
        _floats(_ratio(numpy.linalg.norm(y - x, axis=1), norms[0])),
        tuple(_correlation(p, q) for p, q in zip(x, y, strict=True)),
        steps[0],
        steps[1],
        _floats(edges),
        counts[0],
        counts[1],
    )


def _ratio(part: Any, whole: Any) -> Any:
    # 0 / 0 is no difference, x / 0 is infinite
    return _numpy().where(part == 0, 0.0, part / whole)


def _correlation(x: Any, y: Any) -> float | None:
    x, y = x - x.mean(), y - y.mean()
    scale = math.sqrt(float(x @ x) * float(y @ y))
    return float(x @ y) / scale if scale > 0 and math.isfinite(scale) else None


def _floats(values: Any) -> tuple[float, ...]:
    return tuple(float(value) for value in values)


def states_text(states: States) -> str:
    """Return in words what the plots show, at most 100 columns; the first line says what matters."""
    if not states.layers:
        return "no layers to compare"
    lines: list[str] = []
    for layer in states.layers:
        side = layer.adds_nothing
        if side in ("before", "after"):
            other = layer.step_before if side == "after" else layer.step_after
            own = layer.step_after if side == "after" else layer.step_before
            lines += wrap(
                f"{layer.name} adds nothing in {side}: it changes the state by {error(statistics.median(own))}, "
                f"in the other version by {error(statistics.median(other))}. Is everything masked there?"
            )
        elif side == "both":
            lines += wrap(f"{layer.name} adds nothing in either version.")
    worst = max(states.layers, key=lambda layer: _largest(layer.error))
    first = parted(states)
    size = f"the largest relative error is {error(_largest(worst.error))}, in {worst.name}, at {_token(states, worst)}"
    if first is None:
        lines += wrap(f"the hidden states of {count(len(states.layers), 'layer')} agree: {size}")
    else:
        lines += wrap(f"the hidden states part in {first.name}, at {_token(states, first)}; {size}")
    return "\n".join(lines)


def parted(states: States) -> LayerStates | None:
    """Return the first layer in which the states of some token differ by a tenth or more."""
    return next((layer for layer in states.layers if not _largest(layer.error) < _PARTED), None)


def _largest(values: Sequence[float]) -> float:
    return max((math.inf if math.isnan(value) else value for value in values), default=0.0)


def _token(states: States, layer: LayerStates) -> str:
    at = max(range(len(layer.error)), key=lambda i: math.inf if math.isnan(layer.error[i]) else layer.error[i])
    said = f" {states.tokens[at]!r}" if at < len(states.tokens) else ""
    return f"token {at}{said}"


def _numpy() -> Any:
    try:
        import numpy
    except ImportError as problem:
        raise RenderError("plots need numpy and matplotlib: pip install 'graphprobe[plots]'") from problem
    return numpy
