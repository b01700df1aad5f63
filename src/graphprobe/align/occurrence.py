"""Evidence 3, modules: the k-th operator of its kind in a module, and what a module hands on."""

from __future__ import annotations

from collections import defaultdict

from torch.fx import Node

from graphprobe import nodes, provenance
from graphprobe.align.matching import Matching
from graphprobe.align.moved import Moved
from graphprobe.program import Program

Key = tuple[str, str, tuple[int | str, ...] | None]


def claim_single(matching: Matching) -> None:
    """Claim by (module path, operator, shape) what is there once on each side."""
    _claim(matching, most=1)


def claim(matching: Matching) -> None:
    """Claim by (module path, operator, shape, occurrence), where both sides hold the same number of them."""
    _claim(matching, most=None)


def _claim(matching: Matching, most: int | None) -> None:
    left = _groups(matching.unclaimed_before(), Moved())
    right = _groups(matching.unclaimed_after(), matching.moved())
    for key, ys in right.items():
        xs = left.get(key, [])
        if len(xs) == len(ys) and (most is None or len(ys) <= most):
            for x, y in zip(xs, ys, strict=True):
                matching.add(x, y, "occurrence")


def _groups(unclaimed: list[Node], moved: Moved) -> dict[Key, list[Node]]:
    found: dict[Key, list[Node]] = defaultdict(list)
    for node in unclaimed:
        path = moved.path(provenance.module_path(node))
        if path:  # at the root, or where nothing is known of modules, "the k-th" says too little
            found[path, provenance.target_name(node), nodes.shape(node)].append(node)
    return found


def claim_handed_on(matching: Matching) -> None:
    """Claim the only value of its shape that a module hands on to what is outside of it."""
    left, right = _handed_on(matching.before), _handed_on(matching.after)
    moved = matching.moved()
    for (path, shape), ys in right.items():
        place = moved.path(path)
        xs = left.get((place, shape), []) if place is not None else []
        if len(xs) == len(ys) == 1:
            x, y = xs[0], ys[0]
            if not matching.alignment.of_before.get(x) and not matching.alignment.of_after.get(y):
                matching.add(x, y, "module")


def _handed_on(program: Program) -> dict[tuple[str, tuple[int | str, ...] | None], list[Node]]:
    """Map (module call, shape) to the value-making nodes in it that are used outside, seen through views."""
    calls = {node: [key for key, path in provenance.module_calls(node) if path] for node in program.live}
    paths = {node: dict(provenance.module_calls(node)) for node in program.live}
    found: dict[tuple[str, tuple[int | str, ...] | None], list[Node]] = defaultdict(list)
    met: dict[str, set[str]] = defaultdict(set)  # module path -> its calls
    for node in program.live:
        for call in calls[node]:
            met[paths[node][call]].add(call)
        if not nodes.makes_values(node) or not calls[node]:
            continue
        users = _users(node)
        for call in calls[node]:
            if any(user.op == "output" or call not in calls.get(user, ()) for user in users):
                found[paths[node][call], nodes.shape(node)].append(node)
    return {key: made for key, made in found.items() if len(met[key[0]]) == 1}


def _users(node: Node) -> list[Node]:
    out, stack, seen = [], list(node.users), set()
    while stack:
        user = stack.pop()
        if user in seen:
            continue
        seen.add(user)
        if nodes.is_view(user):
            stack.extend(user.users)
        else:
            out.append(user)
    return out
