"""Evidence 5, values: run both graphs; nodes that hold the same numbers claim each other.

Every unclaimed value is reduced to a sketch on its device: samples at fixed pseudo-random positions. Two values agree
where their samples agree to a few percent (accumulated rounding stays below, anything else is far above). What is
constant, and what several unrelated nodes hold, is never claimed on values alone.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.fx import Node

from graphprobe import nodes, provenance
from graphprobe.align.claims import Alignment, Claim
from graphprobe.execute import run_program
from graphprobe.program import Program

SAMPLES = 256
AGREE = 0.05  # relative distance of two sketches that counts as equal
TIE = 2.0  # what is less than so many times farther away makes the answer uncertain
SAME = 1.1  # distances that differ by less are one
_FLOOR = 1e-6


def claim(before: Program, after: Program, alignment: Alignment, bound: Mapping[str, Any]) -> None:
    """Claim unclaimed nodes of equal shape by what they hold when both graphs run on the same inputs."""
    xs = [n for n in before.live if nodes.makes_values(n) and not alignment.of_before.get(n)]
    ys = [n for n in after.live if nodes.makes_values(n) and not alignment.of_after.get(n)]
    if not xs and not ys:
        return
    # a part of a fused value (a slice of q, k and v) may be what stands as a value of its own on the other side
    xs_parts = [n for n in before.live if is_part(n) and not alignment.of_before.get(n)]
    ys_parts = [n for n in after.live if is_part(n) and not alignment.of_after.get(n)]
    parts = {*xs_parts, *ys_parts}
    left, right = sketches(before, bound, [*xs, *xs_parts]), sketches(after, bound, [*ys, *ys_parts])
    groups: dict[Any, tuple[list[Node], list[Node]]] = defaultdict(lambda: ([], []))
    for column, known in ((0, left), (1, right)):
        for node, sketch in known.items():
            groups[nodes.shape(node), sketch.shape][column].append(node)
    for mine, theirs in groups.values():
        if mine and theirs:
            for x, y in _pairs(mine, theirs, left, right):
                if x in parts and y in parts:
                    continue
                alignment.add(Claim(x, y, "value", certain=False))


def is_part(node: Node) -> bool:
    """Whether the node cuts a part out of another value: a slice, or one output of a split."""
    if node.target is operator.getitem:
        return isinstance(node.args[0], Node) and nodes.is_view(node.args[0])
    return nodes.schema_name(node) in ("aten::slice", "aten::select", "aten::narrow")


def _pairs(
    xs: list[Node], ys: list[Node], left: dict[Node, torch.Tensor], right: dict[Node, torch.Tensor]
) -> list[tuple[Node, Node]]:
    """Pair nodes that hold the same numbers; what is nearest on one side must be nearest on the other, too."""
    a, b = torch.stack([left[x] for x in xs]), torch.stack([right[y] for y in ys])
    norms = torch.linalg.vector_norm(b, dim=1, keepdim=True)
    distance = torch.cdist(b, a, compute_mode="donot_use_mm_for_euclid_dist") / norms  # [ys, xs]
    nearest_y = distance.amin(0)
    pairs = []
    for row, y in enumerate(ys):
        found = _best(y, distance[row], xs)
        if (
            found is not None
            and float(distance[row, xs.index(found)]) <= float(nearest_y[xs.index(found)]) * SAME + _FLOOR
        ):
            pairs.append((found, y))
    return pairs


def _best(y: Node, distance: torch.Tensor, xs: list[Node]) -> Node | None:
    """Return the before node that holds the same numbers, or None where there is none or it cannot be told."""
    best = float(distance.amin())
    if best > AGREE:
        return None
    same = [x for x, d in zip(xs, distance.tolist(), strict=True) if d <= best * SAME + _FLOOR]
    near = [x for x, d in zip(xs, distance.tolist(), strict=True) if d <= max(best, _FLOOR) * TIE]
    if len(near) > len(same):  # others are almost as near: it cannot be told
        return None
    same_operator = [x for x in same if provenance.target_name(x) == provenance.target_name(y)]
    same = same_operator or same
    if len(same) == 1:
        return same[0]
    # a value that is handed on unchanged: the last of the chain
    return max(same, key=lambda n: len(_ancestors(n, same))) if _is_chain(same) else None


def _is_chain(group: list[Node]) -> bool:
    """Whether every member but one is computed from another member: a value that is handed on unchanged."""
    heads = [n for n in group if not _ancestors(n, group)]
    return len(heads) == 1


def _ancestors(node: Node, group: list[Node]) -> set[Node]:
    """Return the members of the group above a node, at most a few steps away."""
    found: set[Node] = set()
    stack, depth = [(node, 0)], 6
    while stack:
        current, steps = stack.pop()
        for operand in current.all_input_nodes:
            if operand in group and operand is not node:
                found.add(operand)
            if steps < depth:
                stack.append((operand, steps + 1))
    return found


def sketches(
    program: Program,
    bound: Mapping[str, Any],
    wanted: list[Node],
    observe: Callable[[Any], torch.Tensor | None] | None = None,
) -> dict[Node, torch.Tensor]:
    """Return the sketch of each wanted node that is neither constant nor too small to tell; one synchronisation."""
    try:
        raw = run_program(program, bound, wanted, observe=observe or _sample)
    except RuntimeError:  # an operator that raises is found out by the lanes, which say where; here it has no values
        return {}
    kept = [n for n, s in raw.items() if s is not None]
    if not kept:
        return {}
    sizes = [raw[n].numel() for n in kept]
    read = torch.split(torch.cat([raw[n] for n in kept]).cpu(), sizes)  # one synchronisation for all
    return {n: s for n, s in zip(kept, read, strict=True) if _tells(s)}


def _sample(value: Any) -> torch.Tensor | None:
    if not isinstance(value, torch.Tensor) or value.numel() < 8 or value.dtype.itemsize == 0:
        return None
    flat = value.detach().reshape(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat).reshape(-1)
    count = flat.numel()
    # a fixed low-discrepancy walk (golden ratio) over the elements: the same positions on both sides
    where = (torch.arange(min(SAMPLES, count), device=flat.device, dtype=torch.float64) * 0.6180339887498949) % 1.0
    picked = flat[(where * count).long()] if count > SAMPLES else flat
    return torch.nan_to_num(picked.float(), nan=-1e30, posinf=1e30, neginf=-1e30).clamp(-1e30, 1e30)


def _tells(sketch: torch.Tensor) -> bool:
    # masks and other two-valued tensors repeat all over a graph
    return int(torch.unique(sketch).numel()) > 4 and bool(torch.linalg.vector_norm(sketch) < 1e29)
