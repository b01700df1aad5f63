"""Evidence 5, values in another layout: [batch, heads, tokens, dim] here is [batch, tokens, heads, dim] there.

A claim that carries a view is made plain in the graph: behind node y of `after` its view in before's layout is
inserted, and behind that the view back, for all that consumes y. The first of the two is what is claimed. Nothing else
changes, so lanes and judge need to know nothing of layouts.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import Node

from graphprobe import nodes
from graphprobe.align.claims import Alignment, Claim
from graphprobe.align.values import AGREE, sketches
from graphprobe.execute import run_program
from graphprobe.program import Program

Permutation = tuple[int, ...]
_MOST = 64  # full values are fetched for at most so many candidate pairs at once


def claim(before: Program, after: Program, alignment: Alignment, bound: Mapping[str, Any]) -> None:
    """Claim values that agree up to a permutation of dimensions. `after` must be a copy that may be changed."""
    candidates = _candidates(before, after, alignment, bound)
    for start in range(0, len(candidates), _MOST):
        chunk = candidates[start : start + _MOST]
        left = run_program(before, bound, [x for x, _ in chunk])
        right = run_program(after, bound, [y for _, y in chunk])
        for x, y in chunk:
            order = _permutation(left[x], right[y])
            if order is not None and not alignment.of_before.get(x) and not alignment.of_after.get(y):
                shown = _insert(after, y, order)
                alignment.add(Claim(x, shown, "layout", certain=False))


def _candidates(
    before: Program, after: Program, alignment: Alignment, bound: Mapping[str, Any]
) -> list[tuple[Node, Node]]:
    """Pair unclaimed values with the same dimensions in another order and the same moments."""
    xs = [n for n in before.live if nodes.makes_values(n) and not alignment.of_before.get(n)]
    ys = [n for n in after.live if nodes.makes_values(n) and not alignment.of_after.get(n)]
    if not xs or not ys:
        return []
    left, right = sketches(before, bound, xs, moments), sketches(after, bound, ys, moments)
    by_size: dict[Any, list[Node]] = defaultdict(list)
    for x in left:
        by_size[_dimensions(x)].append(x)
    pairs = []
    for y, mine in right.items():
        near = [
            x for x in by_size.get(_dimensions(y), ()) if _close(left[x], mine) and nodes.shape(x) != nodes.shape(y)
        ]
        if len(near) == 1:  # values that several nodes hold are not claimed on moments
            pairs.append((near[0], y))
    return pairs


def _dimensions(node: Node) -> tuple[int, ...]:
    return tuple(sorted(int(d) for d in nodes.shape(node) or ()))


def moments(value: Any) -> torch.Tensor | None:
    """Reduce a floating tensor to what no permutation changes: mean, absolute mean, rms, skew, extremes."""
    if not isinstance(value, torch.Tensor) or not value.dtype.is_floating_point or value.numel() < 8 or value.dim() < 3:
        return None
    x = value.detach().double()
    rms = x.square().mean().sqrt()
    numbers = (
        x.mean(),
        x.abs().mean(),
        rms,
        x.pow(3).mean().sign() * x.pow(3).mean().abs().pow(1 / 3),
        x.amax(),
        x.amin(),
    )
    return torch.nan_to_num(torch.stack(numbers), nan=1e30, posinf=1e30, neginf=-1e30).float()


def _close(mine: torch.Tensor, theirs: torch.Tensor) -> bool:
    scale = float(mine[2])  # the rms
    return scale > 0 and bool(((mine - theirs).abs() <= 2 * AGREE * scale + 1e-12).all())


def _permutation(x: torch.Tensor, y: torch.Tensor) -> Permutation | None:
    """Return the order of y's dimensions in which it equals x, if there is exactly one."""
    found = []
    norm = torch.linalg.vector_norm(x.double())
    for order in itertools.permutations(range(y.dim())):
        if tuple(y.shape[d] for d in order) != tuple(x.shape):
            continue
        distance = torch.linalg.vector_norm(y.permute(order).double() - x.double()) / norm
        if float(distance) <= AGREE:
            found.append(order)
    return found[0] if len(found) == 1 and found[0] != tuple(range(y.dim())) else None


def _insert(after: Program, y: Node, order: Permutation) -> Node:
    """Insert y's view in before's layout and the view back; all users of y read the latter. Returns the former."""
    permute = torch.ops.aten.permute.default
    back = tuple(order.index(d) for d in range(len(order)))
    users = list(y.users)
    graph = after.gm.graph
    with graph.inserting_after(y):
        shown = graph.call_function(permute, (y, list(order)))
    with graph.inserting_after(shown):
        again = graph.call_function(permute, (shown, list(back)))
    value = nodes.tensor_val(y)
    for node, shape in ((shown, order), (again, None)):
        node.meta = {k: v for k, v in y.meta.items() if k != "custom"}
        if value is not None and shape is not None:
            node.meta["val"] = value.permute(shape)
        after.labels[node] = after.label(y)
    for user in users:
        user.replace_input_with(y, again)
    after.refresh()
    return shown
