"""Sketches: every value reduced to a few numbers on its device while the graph runs once.

A sketch holds the value at fixed pseudo-random positions in flat order, so that equal values have equal sketches in
whatever shape they are shown, and behind that its moments, which no permutation changes.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.fx import Node

from graphprobe.execute import call, run_program
from graphprobe.program import Program

SAMPLES = 256
ROW = 4  # numbers that stand for a row
_LARGE = 1e30
_GOLDEN = 0.6180339887498949

Observe = Callable[[Node, Any], torch.Tensor | None]


def sketches(
    program: Program,
    bound: Mapping[str, Any],
    wanted: list[Node],
    given: Mapping[Node, torch.Tensor] | None = None,
) -> dict[Node, torch.Tensor]:
    """Return the sketch of each wanted node that is neither constant nor too small to tell."""
    known = observed(program, bound, wanted, lambda _, value: sample(value), given)
    telling = _telling(known)
    return {n: s for n, s in known.items() if n in telling}


def observed(
    program: Program,
    bound: Mapping[str, Any],
    wanted: list[Node],
    observe: Observe,
    given: Mapping[Node, torch.Tensor] | None = None,
) -> dict[Node, torch.Tensor]:
    """Run once and return, on the CPU, what `observe` makes of each wanted value; one synchronisation.

    What uses a node of `given` goes on with the value given there; observed is what the node itself has made.
    """
    given, asked = given or {}, set(wanted)
    seen: dict[Node, torch.Tensor] = {}

    def keep(node: Node, value: Any) -> None:
        found = observe(node, value) if node in asked else None
        if found is not None:
            seen[node] = found

    def forced(node: Node, value: torch.Tensor) -> Callable[[Mapping[Node, Any]], Any]:
        def made(env: Mapping[Node, Any]) -> Any:
            own = call(program, node, env)
            keep(node, own)
            return value.to(own) if isinstance(own, torch.Tensor) and own.shape == value.shape else own

        return made

    replace = {node: forced(node, value) for node, value in given.items()}
    plain = [n for n in wanted if n not in given]
    with contextlib.suppress(Exception):  # the lanes say what raises and where; what came before it is known
        run_program(program, bound, [*plain, *given], replace, observe=lambda n, v: None if n in given else keep(n, v))
    if not seen:
        return {}
    sizes = [s.numel() for s in seen.values()]
    device = next((s.device for s in seen.values() if s.device.type != "cpu"), torch.device("cpu"))
    flat = [s.reshape(-1).to(device) for s in seen.values()]  # a graph on a GPU may hold a number on the CPU
    read = torch.split(torch.cat(flat).cpu(), sizes)
    return {n: part.reshape(seen[n].shape) for n, part in zip(seen, read, strict=True)}


def sample(value: Any) -> torch.Tensor | None:
    """Take a value at fixed positions in flat order: [up to 256] float32 on its device; None where it cannot tell."""
    if not isinstance(value, torch.Tensor) or value.numel() < 8:
        return None
    flat = value.detach().reshape(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat).reshape(-1)
    count = flat.numel()
    picked = flat[positions(count, flat.device)] if count > SAMPLES else flat
    return unmasked(picked)


def unmasked(values: torch.Tensor) -> torch.Tensor:
    """Let what a mask has put there (an infinity, the lowest number) be zero, float32: it would speak for all else."""
    wide = values.float()
    return torch.where(wide.abs() < _LARGE, wide, 0.0)


def evened(rows: torch.Tensor) -> torch.Tensor:
    """Let a few huge numbers not speak for all: c asinh(x / c), c the median of |x|, for each row of [values, n].

    Trained language models hold one channel of one token a thousand times larger than all others (Sun et al. 2024,
    "Massive activations"): measured by norm, one layer's stream would be that of the next.
    """
    size = rows.double().abs()
    typical = torch.where(size > 0, size, torch.nan).nanmedian(1, keepdim=True).values.nan_to_num(nan=1.0)
    found: torch.Tensor = typical * torch.asinh(rows.double() / typical)
    return found


def moments(_: Node, value: Any) -> torch.Tensor | None:
    """Return what no permutation changes: [6] float32, the means of x, |x|, x^2 and x^3, the extremes."""
    if not isinstance(value, torch.Tensor) or not value.dtype.is_floating_point or not value.numel():
        return None
    x = unmasked(value.detach())
    low, high = torch.aminmax(x)
    means = [x.mean()]
    work = x.abs()  # written over again: fresh memory for every step costs more than the arithmetic
    means.append(work.mean())
    means.append(torch.mul(x, x, out=work).mean())
    means.append(work.mul_(x).mean())
    return torch.stack([*means, high, low])


def rooted(moments: torch.Tensor) -> torch.Tensor:
    """Turn the means of x^2 and x^3 into numbers of the size of x: [values, 6] float64."""
    wide = moments.double()
    square, cube = wide[:, 2], wide[:, 3]
    roots = torch.stack([square.sqrt(), cube.sign() * cube.abs().pow(1 / 3)], dim=1)
    return torch.cat([wide[:, :2], roots, wide[:, 4:]], dim=1)


@functools.lru_cache(maxsize=512)
def positions(count: int, device: torch.device) -> torch.Tensor:
    """Return the places in flat order that are sampled of `count` elements: all of a few, else a fixed walk."""
    if count <= SAMPLES:
        return torch.arange(count, device=device)
    where = (torch.arange(SAMPLES, dtype=torch.float64) * _GOLDEN) % 1.0
    return (where * count).long().to(device)


def _telling(known: Mapping[Node, torch.Tensor]) -> set[Node]:
    """Leave out masks and other values of few different numbers: they repeat all over a graph."""
    groups: dict[int, list[Node]] = {}
    for node, sketch in known.items():
        groups.setdefault(sketch.numel(), []).append(node)
    out: set[Node] = set()
    for members in groups.values():
        ordered = torch.stack([known[n] for n in members]).sort(dim=1).values
        different = (ordered.diff(dim=1) != 0).sum(dim=1) + 1
        out |= {n for n, tells in zip(members, (different > 4).tolist(), strict=True) if tells}
    return out


@functools.lru_cache(maxsize=64)
def directions(width: int) -> torch.Tensor:
    """Return the directions along which a row of that width is measured: [width, 4] float64."""
    drawn = torch.Generator().manual_seed(width)
    found: torch.Tensor = torch.randn(width, ROW, generator=drawn, dtype=torch.float64) * width**-0.5
    return found
