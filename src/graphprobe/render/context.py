"""What the picture of a divergence holds: the region of a finding, and how much of each graph around it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from graphprobe.records import VERDICTS, Finding, RegionRow, Report
from graphprobe.render.folding import Group, fold, singles
from graphprobe.render.numbers import error, share, size
from graphprobe.render.wiring import CALLS, Wiring
from graphprobe.render.wording import worst

LIMIT = 60  # boxes of the whole picture
ABOVE, BELOW = 2, 1  # levels of context
_GRAVE = VERDICTS[VERDICTS.index("quantization") + 1 :]
PASSED_ON = 3.0  # below a finding, a total this many times what an operation introduced came from above


@dataclass(frozen=True)
class Focus:
    """What the picture is about: a finding, or the region with the largest error where there is none."""

    before: frozenset[str]
    after: frozenset[str]
    outputs: tuple[str, str]
    frontier: tuple[tuple[str, str], ...]
    module: str
    culprit: str
    introduced: float | None
    exact: float | None
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Side:
    """One graph's half of the picture."""

    name: str  # before, after
    wiring: Wiring
    region: frozenset[str]
    groups: list[Group]
    rows: dict[str, RegionRow]
    partners: dict[str, str]  # claimed operations of this graph -> of the other
    tainted: frozenset[str]  # what lies below a finding


def focus_of(report: Report, finding: Finding | None, before: Wiring, after: Wiring) -> Focus:
    """Return what to draw of a report."""
    chosen = finding or report.first or next(iter(worst(report.findings)), None)
    if chosen is not None:
        figures = (
            f"introduced {error(chosen.introduced)}, total {error(chosen.total)}, exact {error(chosen.exact)}, "
            f"rounding floor {error(chosen.floor)}, cures {share(chosen.cures)}"
        )
        where = ", ".join(
            word for word in (chosen.source, f"transform {chosen.transform}" * bool(chosen.transform)) if word
        )
        return Focus(
            frozenset(chosen.before),
            frozenset(chosen.after),
            chosen.outputs,
            chosen.frontier,
            chosen.module_path,
            chosen.culprit,
            chosen.introduced,
            chosen.exact,
            (figures, where, chosen.hint),
        )
    rows = [row for row in report.regions if row.before in before.order and row.after in after.order]
    if not rows:
        return Focus(frozenset(), frozenset(), ("", ""), (), "", "", None, None, ("no region was judged",))
    row = max(rows, key=lambda r: size(r.introduced))
    stops = ({r.before for r in rows}, {r.after for r in rows})
    return Focus(
        _cone(before, row.before, stops[0]),
        _cone(after, row.after, stops[1]),
        (row.before, row.after),
        (),
        row.module_path,
        "",
        row.introduced,
        row.exact,
        (f"nothing diverges; this region introduces the most: {error(row.introduced)}, floor {error(row.floor)}",),
    )


def _cone(wiring: Wiring, name: str, stops: set[str]) -> frozenset[str]:
    """Return `name` and what lies above it, down from the next claimed operations."""
    found, todo = set[str](), [name]
    while todo and len(found) < LIMIT:
        current = todo.pop()
        found.add(current)
        above = (i for i in wiring.inputs(current) if i not in stops and wiring.node(i).op in CALLS)
        todo.extend(i for i in above if i not in found)
    return frozenset(found)


def side_of(
    name: str,
    wiring: Wiring,
    focus: Focus,
    rows: dict[str, RegionRow],
    partners: dict[str, str],
    limit: int,
    tainted: frozenset[str] = frozenset(),
) -> Side:
    """Choose what to show of one graph, `before` or `after`, in at most about `limit` boxes."""
    which = 0 if name == "before" else 1
    known = frozenset(wiring.shown) & (focus.before, focus.after)[which]
    seeds = known or frozenset(n for n in (focus.outputs[which],) if n in wiring.order)
    opening = [pair[which] for pair in focus.frontier if pair[which] in wiring.order]
    # what the region hands on is its output; a mask or table inside it may serve every layer of the model
    closing = seeds & {focus.outputs[which]} or seeds
    for levels in (ABOVE, 1):
        context = (_above(wiring, seeds, levels) | _below(wiring, closing, BELOW) | set(opening)) - seeds
        names = sorted((seeds | context) - wiring.weights | seeds, key=wiring.order.__getitem__)
        groups = singles(wiring, names)
        if len(groups) <= limit:
            return Side(name, wiring, seeds, groups, rows, partners, tainted)
    keep = {focus.culprit, *focus.outputs, *opening}
    rest = [n for n in names if n not in keep]
    groups = singles(wiring, [n for n in names if n in keep]) + fold(wiring, rest, max(4, limit - len(keep)))
    order = wiring.order
    groups.sort(key=lambda g: order[g.members[0]])
    return Side(name, wiring, seeds, groups, rows, partners, tainted)


def tainted_by(report: Report, after: Wiring) -> frozenset[str]:
    """Return every operation of after that lies below the output of a finding, or of another region as grave."""
    found: set[str] = set()
    standing = [f for f in report.findings if not f.accepted and f.kind not in ("identical", "rounding")]
    todo = [f.outputs[1] or f.after[-1] for f in standing if f.outputs[1] or f.after]
    if standing:
        todo += [row.after for row in report.regions if row.verdict in _GRAVE]  # "pardoned" is no verdict
    todo = [name for name in todo if name in after.order]
    while todo:
        below = [user for user in after.users[todo.pop()] if user not in found]
        found.update(below)
        todo.extend(below)
    return frozenset(found)


def was_passed_on(row: RegionRow | None, below: Collection[str]) -> bool:
    """Whether what is wrong at a region came from above: it lies `below` a finding and makes little of its total."""
    return row is not None and row.after in below and size(row.total) > PASSED_ON * max(size(row.introduced), 0.0)


def _above(wiring: Wiring, seeds: frozenset[str], levels: int) -> set[str]:
    return _reach(seeds, levels, wiring, wiring.inputs)


def _below(wiring: Wiring, seeds: frozenset[str], levels: int) -> set[str]:
    shown = set(wiring.shown)
    return _reach(seeds, levels, wiring, lambda name: tuple(u for u in wiring.users[name] if u in shown))


def _reach(seeds: Iterable[str], levels: int, wiring: Wiring, step: Callable[[str], tuple[str, ...]]) -> set[str]:
    """Return what lies within so many operations of the seeds; views count for nothing."""
    found: set[str] = set()
    edge = list(seeds)
    for _ in range(levels):
        reached: list[str] = []
        todo = [n for name in edge for n in step(name)]
        while todo:
            name = todo.pop()
            if name in found:
                continue
            found.add(name)
            if wiring.node(name).is_view:
                todo.extend(step(name))
            else:
                reached.append(name)
        edge = reached
    return found
