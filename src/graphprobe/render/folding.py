"""Which operations share a box: chains of views, whole modules, runs of operations. Keeps every picture small."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from graphprobe.render.roles import module_role
from graphprobe.render.wiring import Wiring

_RUN = 64  # operations of one module that are folded together at least
_FEW = 8  # of one that does little else
_LOOSE = 6  # so few operations beside a module's parts (residual additions) are worth seeing at once


@dataclass(frozen=True)
class Group:
    """The operations behind one box; a run holds operations of one module without its parts."""

    id: str
    kind: str  # op, views, module, run
    members: tuple[str, ...]
    path: str  # module path: the module itself for kind module, else the one the operations lie in


@dataclass
class _Module:
    path: str
    own: list[str] = field(default_factory=list)
    parts: dict[str, _Module] = field(default_factory=dict)

    def names(self) -> list[str]:
        found = list(self.own)
        for part in self.parts.values():
            found.extend(part.names())
        return found


def singles(wiring: Wiring, names: Sequence[str]) -> list[Group]:
    """Put each operation into a group of its own, chains of views into one."""
    return _chain_views(wiring, [_op(wiring, name) for name in names])


def fold(wiring: Wiring, names: Sequence[str], limit: int, depth: int | None = None, loose: int = 1) -> list[Group]:
    """Group `names` into at most about `limit` boxes by folding modules; modules of `depth` names are never unfolded.

    Modules that differ in their numbers only (the layers of a model) are unfolded together or not at all. Norms, and
    the loose operations between modules, are unfolded only where everything else is: they say little. A model that is
    written without modules has nothing to be folded by: up to `loose` times as many boxes are better than none.
    Linear in the number of operations times the depth of the module tree.
    """
    levels = [_top(wiring, names, limit, loose)]
    total = len(levels[0])
    final: list[Group | _Module] = []
    later: list[list[Group | _Module]] = []
    while levels or later:
        last = not levels
        if last and any(isinstance(item, _Module) for item in final):
            break
        groups = later if last else _alike(levels.pop(0))
        later = [] if last else later
        below: list[Group | _Module] = []
        for items in groups:
            opened = [part for item in items for part in _open(wiring, item, limit)]
            if all(isinstance(item, Group) and item.kind != "run" for item in items):
                final.extend(items)
            elif not last and _says_little(wiring, items[0]):
                later.append(items)
            elif total - len(items) + len(opened) <= limit and _within(items, depth):
                total += len(opened) - len(items)
                below.extend(opened)
            else:
                final.extend(items)
        if below:
            levels.append(below)
    final.extend(item for items in later for item in items)
    groups_made = [item if isinstance(item, Group) else _closed(wiring, item) for item in final]
    order = wiring.order
    return _chain_views(wiring, sorted(groups_made, key=lambda g: order[g.members[0]]))


def _says_little(wiring: Wiring, item: Group | _Module) -> bool:
    return item.kind == "run" if isinstance(item, Group) else module_role(wiring, item.path) == "norm"


def _top(wiring: Wiring, names: Sequence[str], limit: int, loose: int) -> list[Group | _Module]:
    root = _Module("")
    for name in names:
        here = root
        path = wiring.place[name]
        parts = path.split(".") if path else []
        for depth, part in enumerate(parts):
            here = here.parts.setdefault(part, _Module(".".join(parts[: depth + 1])))
        here.own.append(name)
    # a common prefix such as 'model' says nothing: start below it
    while len(root.parts) == 1 and not root.own:
        root = next(iter(root.parts.values()))
    return _open(wiring, root, limit, whole=len(root.own) <= loose * limit)


def _open(wiring: Wiring, item: Group | _Module, limit: int, whole: bool = True) -> list[Group | _Module]:
    if isinstance(item, Group):
        return [_op(wiring, name) for name in item.members]
    parts = [_skip(part) for part in item.parts.values()]
    ends = [name for name in item.own if wiring.node(name).op in ("placeholder", "output")]
    own = [name for name in item.own if wiring.node(name).op not in ("placeholder", "output")]
    inner = sum(len(part.members if isinstance(part, Group) else part.names()) for part in parts)
    # what a module does itself is shown whole; beside the layers of a stack it is a preparation
    whole = len(own) <= _LOOSE or (whole and len(own) >= inner)
    loose: list[Group | _Module] = [_op(wiring, name) for name in (*ends, *(own if whole else ()))]
    return [*loose, *(() if whole else _runs(own, item.path, limit, flat=len(own) >= inner)), *parts]


def _skip(module: _Module) -> Group | _Module:
    # a module that only holds another one is no level of its own
    while not module.own and len(module.parts) == 1:
        module = next(iter(module.parts.values()))
    return module


def _runs(names: Sequence[str], path: str, limit: int, flat: bool) -> list[Group]:
    """Fold a module's own operations: where they are most of what it does (`flat`), into half of the boxes."""
    size = max(_FEW if flat else _RUN, math.ceil(len(names) / max(1, limit // (2 if flat else 4))))
    chunks = [tuple(names[i : i + size]) for i in range(0, len(names), size)]
    return [Group(f"run {chunk[0]}", "run", chunk, path) for chunk in chunks]


def _alike(level: Sequence[Group | _Module]) -> list[list[Group | _Module]]:
    found: dict[str, list[Group | _Module]] = {}
    for item in level:
        key = item.path if isinstance(item, _Module) else f"{item.kind}:{item.path}"
        found.setdefault(re.sub(r"\d+", "*", key), []).append(item)
    return list(found.values())


def _within(items: Sequence[Group | _Module], depth: int | None) -> bool:
    return depth is None or all(isinstance(item, Group) or item.path.count(".") + 1 < depth for item in items)


def _closed(wiring: Wiring, module: _Module) -> Group:
    names = sorted(module.names(), key=lambda n: wiring.order[n])
    if len(names) == 1:
        return _op(wiring, names[0])
    return Group(f"module {module.path}", "module", tuple(names), module.path)


def _op(wiring: Wiring, name: str) -> Group:
    return Group(name, "op", (name,), wiring.place[name])


def _chain_views(wiring: Wiring, groups: Sequence[Group]) -> list[Group]:
    """Join views that follow one another and have no other user."""
    alone = {g.members[0]: g for g in groups if g.kind == "op"}
    chain_of: dict[str, list[str]] = {}
    out: list[Group | list[str]] = []
    for group in groups:
        name = group.members[0]
        node = wiring.node(name)
        if group.kind != "op" or not node.is_view or not node.has_val:
            out.append(group)
            continue
        sources = wiring.inputs(name)
        above = chain_of.get(sources[0]) if len(sources) == 1 else None
        fits = above is not None and above[-1] == sources[0] and _only_user(wiring, sources[0], alone)
        if above is not None and fits and wiring.place[above[0]] == wiring.place[name]:
            above.append(name)
            chain_of[name] = above
        else:
            chain_of[name] = [name]
            out.append(chain_of[name])
    return [item if isinstance(item, Group) else _views(wiring, item) for item in out]


def _views(wiring: Wiring, names: Sequence[str]) -> Group:
    if len(names) == 1:
        return _op(wiring, names[0])
    return Group(names[-1], "views", tuple(names), wiring.place[names[0]])


def _only_user(wiring: Wiring, name: str, shown: Collection[str]) -> bool:
    users = wiring.users[name]
    return len(users) == 1 and users[0] in shown


def group_of(groups: Sequence[Group]) -> dict[str, Group]:
    """Map each operation to its group."""
    return {name: group for group in groups for name in group.members}
