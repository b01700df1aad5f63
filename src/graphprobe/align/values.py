"""Evidence 5, values: run both graphs; nodes that hold the same numbers claim each other.

Every unclaimed value is reduced to a sketch on its device: samples at fixed pseudo-random positions. Two values agree
where their samples agree to a few percent (accumulated rounding stays below, anything else is far above). What is
constant, and what several unrelated nodes hold, is never claimed on values alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import Node

from graphprobe import nodes, provenance
from graphprobe.align.claims import Alignment, Claim
from graphprobe.execute import run_program
from graphprobe.program import Program

SAMPLES = 256
AGREE = 0.05  # relative distance of two sketches that counts as equal
TIE = 4.0  # the next best must be so many times farther away
_FLOOR = 1e-6


def claim(before: Program, after: Program, alignment: Alignment, bound: Mapping[str, Any]) -> None:
    """Claim unclaimed nodes of equal shape by what they hold when both graphs run on the same inputs."""
    xs = [n for n in before.live if nodes.makes_values(n) and not alignment.of_before.get(n)]
    ys = [n for n in after.live if nodes.makes_values(n) and not alignment.of_after.get(n)]
    if not xs or not ys:
        return
    try:
        left = _sketches(before, bound, xs)
        right = _sketches(after, bound, ys)
    except Exception:  # a graph that raises is found out by the lanes, which say where
        return
    by_shape: dict[Any, list[Node]] = defaultdict(list)
    for x in xs:
        if x in left:
            by_shape[nodes.shape(x), left[x].shape].append(x)
    for y in ys:
        if y in right:
            found = _best(y, right[y], by_shape.get((nodes.shape(y), right[y].shape), []), left)
            if found is not None:
                alignment.add(Claim(found, y, "value", certain=False))


def _best(y: Node, mine: torch.Tensor, xs: list[Node], left: dict[Node, torch.Tensor]) -> Node | None:
    """Return the before node that holds the same numbers, or None where there is none or it cannot be told."""
    if not xs:
        return None
    stack = torch.stack([left[x] for x in xs])
    norm = torch.linalg.vector_norm(mine)
    distance = torch.linalg.vector_norm(stack - mine, dim=1) / norm
    order = torch.argsort(distance)
    best = float(distance[order[0]])
    if best > AGREE:
        return None
    near = [xs[int(i)] for i in order if float(distance[i]) <= max(best, _FLOOR) * TIE]
    same_operator = [x for x in near if provenance.target_name(x) == provenance.target_name(y)]
    near = same_operator or near
    if len(near) == 1 or _is_chain(near):
        return near[-1] if len(near) == 1 else max(near, key=lambda n: len(_ancestors(n, near)))
    return None


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


def _sketches(program: Program, bound: Mapping[str, Any], wanted: list[Node]) -> dict[Node, torch.Tensor]:
    """Return the sketch of each wanted node that is neither constant nor too small to tell."""
    raw = run_program(program, bound, wanted, observe=_sample)
    kept = [n for n, s in raw.items() if s is not None]
    if not kept:
        return {}
    sizes = [raw[n].numel() for n in kept]
    read = torch.cat([raw[n] for n in kept]).cpu().split(sizes)  # one synchronisation for all
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
