"""What changed from one dump to another: operators, collectives, nodes, weights, metadata."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from graphprobe.dumps.reading import Entry
from graphprobe.foreign.autodeploy import Line, operator

_COLLECTIVE = re.compile(
    r"all_?reduce|all_?gather|reduce_?scatter|all_?to_?all|broadcast_(?!tensors)|_dist_|^dist\.|c10d", re.IGNORECASE
)


@dataclass(frozen=True)
class Change:
    """What lies between two dumps. Nodes bear the name of their section where it is not the root."""

    operators: dict[str, int] = field(default_factory=dict)  # how many more (+) or fewer (-)
    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    rewritten: tuple[str, ...] = ()  # of the same name, with another operator, other arguments, shapes or dtypes
    weights_added: tuple[str, ...] = ()
    weights_removed: tuple[str, ...] = ()
    weights_changed: tuple[str, ...] = ()  # of the same name, with another shape or dtype
    lost: tuple[str, ...] = ()  # nodes without metadata that had some, or were not there

    def __bool__(self) -> bool:
        return bool(self.added or self.removed or self.rewritten or self.weights_changed)

    @property
    def collectives(self) -> dict[str, int]:
        """The part of the operators that communicates between devices."""
        return {name: count for name, count in self.operators.items() if is_collective(name)}


def is_collective(name: str) -> bool:
    """Whether an operator communicates between devices."""
    return bool(_COLLECTIVE.search(name))


def operators(entry: Entry) -> Counter[str]:
    """Count the operators of a dump, memory addresses left out."""
    return Counter(operator(line) for line in entry.lines.values() if line.target not in ("", "output"))


def missing(entry: Entry) -> tuple[str, ...]:
    """Return the nodes without metadata, also weights that are read and whose shape nobody knows."""
    nodes = [name for name, line in entry.lines.items() if line.lacks_val]
    return (*nodes, *(name for name, typed in entry.weights.items() if typed.endswith(": unknown")))


def change(before: Entry, after: Entry) -> Change:
    """Compare two dumps of one run."""
    was, now = before.lines, after.lines
    count = operators(after)
    count.subtract(operators(before))
    had, have = before.weights, after.weights
    return Change(
        operators={name: number for name, number in sorted(count.items()) if number},
        added=tuple(name for name in now if name not in was),
        removed=tuple(name for name in was if name not in now),
        rewritten=tuple(name for name in now if name in was and not _same(was[name], now[name])),
        weights_added=tuple(name for name in have if name not in had),
        weights_removed=tuple(name for name in had if name not in have),
        weights_changed=tuple(n for n in have if n in had and had[n] and have[n] and had[n] != have[n]),
        lost=tuple(sorted(set(missing(after)) - set(missing(before)))),
    )


def _same(one: Line, other: Line) -> bool:
    """Whether two lines say the same, apart from memory addresses and from the names of their inputs."""
    return (
        operator(one) == operator(other)
        and (one.shape, one.dtype) == (other.shape, other.dtype)
        and [_own(arg) for arg in one.args] == [_own(arg) for arg in other.args]
    )


def _own(arg: str) -> str:
    # which node an input is may change because that one was replaced: then it is that one that changed
    return arg.partition(" : ")[2] or "%" if arg.startswith("%") else re.sub(r" at 0x[0-9a-f]+", "", arg)


def lines(before: Entry, after: Entry) -> Iterator[str]:
    """Yield the difference of two dumps as ``- old``, ``+ new`` lines in the order of the graphs, marked by section."""
    was, now = before.lines, after.lines
    changed = {name for name in now if name in was and was[name].text != now[name].text}
    gone = [name for name in was if name not in now]
    order = {name: i for i, name in enumerate(was)}
    for name, line in now.items():
        if name in order:
            while gone and order[gone[0]] < order[name]:
                yield f"- {was[gone.pop(0)].text}"
        if name in changed:
            yield f"- {was[name].text}"
        if name in changed or name not in was:
            yield f"+ {line.text}"
    for name in gone:
        yield f"- {was[name].text}"
