"""Defects of a graph that can be seen without running it: each rule is a function, and `RULES` lists them all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from torch.fx import GraphModule

from graphprobe.errors import InputError, nearest
from graphprobe.linting import rules as _rules
from graphprobe.linting.scope import Scope, scopes
from graphprobe.records import Lint

#: Name -> the function that finds the defect in one graph. Graphs nested in control flow are each looked at.
RULES: dict[str, Callable[[Scope], Iterator[Lint]]] = {
    "missing-val": _rules.missing_val,
    "stale-val": _rules.stale_val,
    "python-closure": _rules.python_closure,
    "dead-node": _rules.dead_node,
    "copied-id": _rules.copied_id,
    "orphaned-parameter": _rules.orphaned_parameter,
}


def lint(gm: GraphModule, rules: Sequence[str] | None = None) -> tuple[Lint, ...]:
    """Return the defects of a graph, rule by rule, each in graph order; `rules` chooses among `RULES` (None: all).

    The graph is not changed and nothing is computed on real values. A node inside a control-flow body is named with the
    body's path: "true_graph_0/sin". Raises InputError for a rule that does not exist.
    """
    if not isinstance(gm, GraphModule):
        raise InputError(f"lint takes a GraphModule, not a {type(gm).__name__}: graphprobe.capture or load gives one")
    chosen = list(RULES) if rules is None else list(rules)
    for name in chosen:
        if name not in RULES:
            raise InputError(f"there is no lint rule {name!r}{nearest(name, RULES)}. The rules are {', '.join(RULES)}")
    places = scopes(gm)
    return tuple(found for name in chosen for place in places for found in RULES[name](place))


__all__ = ["RULES", "lint"]
