"""What a claim must say: which nodes of two graphs hold the same numbers in exact arithmetic, for two draws of them."""

from __future__ import annotations

import bisect
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from corpus import mutations
from corpus.rewrites import Pair
from graphprobe import inputs, nodes
from graphprobe.align import Alignment, Claim
from graphprobe.align.steps import step_of
from graphprobe.execute import target_of
from graphprobe.lanes import exact
from graphprobe.lanes.regions import SMALL, regions_of
from graphprobe.program import Program, program

EQUAL = 3e-7  # constants computed ahead are rounded to float32; an epsilon of 1e-6 that is missing is another value
Values = dict[Node, torch.Tensor]
Names = dict[Node, tuple[str, int]]


@dataclass(frozen=True)
class Truth:
    """For every node of `after`, named by label and occurrence, the labels of what it may claim in `before`."""

    partners: dict[tuple[str, int], set[tuple[str, int]]]
    values: tuple[dict[tuple[str, int], torch.Tensor], ...]  # of before, one for each draw
    values_after: tuple[dict[tuple[str, int], torch.Tensor], ...]
    makers: dict[tuple[str, int], tuple[str, int]]  # of after: which node made what this one hands on as it is


@dataclass
class Score:
    """What one alignment is worth. Sums of scores are scores."""

    claims: int = 0
    wrong: int = 0
    making: int = 0  # value-making nodes of after
    wanted: int = 0  # value-making nodes of either side that have a partner
    found: int = 0
    resolved: int = 0
    said: list[str] = field(default_factory=list)  # the wrong claims
    missed: list[str] = field(default_factory=list)

    def __add__(self, other: Score) -> Score:
        return Score(
            self.claims + other.claims,
            self.wrong + other.wrong,
            self.making + other.making,
            self.wanted + other.wanted,
            self.found + other.found,
            self.resolved + other.resolved,
            self.said + other.said,
            self.missed + other.missed,
        )

    @property
    def precision(self) -> float:
        """Share of the claims that are right."""
        return 1 - self.wrong / self.claims if self.claims else 1.0

    @property
    def recall(self) -> float:
        """Share of the value-making nodes with a partner that are claimed rightly, both sides together."""
        return self.found / self.wanted if self.wanted else 1.0

    @property
    def per_operation(self) -> float:
        """Claims for each value-making operation of after."""
        return self.claims / self.making if self.making else 0.0

    @property
    def resolution(self) -> float:
        """Share of after's value-making operations in a region of at most 16 of them."""
        return self.resolved / self.making if self.making else 1.0


def keys(one: Program) -> dict[Node, tuple[str, int]]:
    """Name every node by its label and how many before it have the same."""
    met: Counter[str] = Counter()
    out = {}
    for node in one.gm.graph.nodes:
        label = one.label(node)
        out[node] = (label, met[label])
        met[label] += 1
    return out


def truth(draws: list[Pair]) -> Truth:
    """Find out what stands for what; each draw is the same pair of graphs with other weights and inputs."""
    left, right = [], []
    makers: dict[tuple[str, int], tuple[str, int]] = {}
    for pair in draws:
        for column, gm in ((left, pair.before), (right, pair.after)):
            one = program(gm, pair.args, pair.kwargs)
            named = keys(one)
            bound = inputs.bind(pair.before, pair.args, pair.kwargs, "before")
            held = exact_values(one, bound)
            column.append({named[n]: v for n, v in held.items()})
            if gm is pair.after:
                makers = {named[n]: named[_maker(n, held)] for n in held}
    near = _Near(left[0])
    partners: dict[tuple[str, int], set[tuple[str, int]]] = {}
    for key, value in right[0].items():
        partners[key] = {
            k
            for k in near.to(value)
            if all(k in b and key in a and equal(b[k], a[key]) for b, a in zip(left, right, strict=True))
        }
    return Truth(partners, tuple(left), tuple(right), makers)


class _Near:
    """Finds what may be equal to a value without comparing all with all: equal values have nearly equal norms."""

    def __init__(self, values: Mapping[tuple[str, int], torch.Tensor]) -> None:
        found: dict[Any, list[tuple[float, tuple[str, int]]]] = defaultdict(list)
        for key, value in values.items():
            found[tuple(value.shape)].append((_norm(value), key))
        self._by_shape = {shape: sorted(group) for shape, group in found.items()}

    def to(self, value: torch.Tensor) -> list[tuple[str, int]]:
        """List the keys of all values of that shape whose norm is near enough for `equal`."""
        group, norm = self._by_shape.get(tuple(value.shape), []), _norm(value)
        room = 2 * EQUAL * norm
        first = bisect.bisect_left(group, norm - room, key=_first)
        return [key for _, key in group[first : bisect.bisect_right(group, norm + room, key=_first)]]


def _first(pair: tuple[float, Any]) -> float:
    return pair[0]


def _norm(value: torch.Tensor) -> float:
    """Return the norm of what `equal` compares by norm."""
    finite = torch.nan_to_num(value, posinf=1.0, neginf=-1.0)
    return float(finite.masked_fill(finite.abs() > 1e30, 0.0).norm())


def _maker(node: Node, held: Values) -> Node:
    """Follow a node upwards as long as it hands on, element for element, what its operand holds.

    What says in which dtype or shape (`type_as`, `view_as`) is no operand of its values.
    """
    while node.op == "call_function" and (len(node.all_input_nodes) == 1 or step_of(node) is not None):
        above = node.all_input_nodes[0]
        if above not in held or held[above].numel() != held[node].numel():
            break
        if not equal(held[above].reshape(-1), held[node].reshape(-1)):
            break
        node = above
    return node


def equal(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether two values are the same but for float64 rounding and constants rounded ahead."""
    if x.shape != y.shape or not torch.equal(x.isfinite(), y.isfinite()):
        return False
    x, y = (torch.nan_to_num(v, posinf=1.0, neginf=-1.0) for v in (x, y))
    big = x.abs() > 1e30
    if bool((big != (y.abs() > 1e30)).any()):
        return False
    x, y = x.masked_fill(big, 0.0), y.masked_fill(big, 0.0)
    return float((x - y).norm()) <= EQUAL * float(x.norm())


def exact_values(one: Program, bound: Mapping[str, Any]) -> Values:
    """Run in exact arithmetic and keep every tensor, as float64."""
    env: dict[Node, Any] = {n: exact.lift(bound[path]) for path, n in one.inputs.items() if path in bound}
    with torch.no_grad():
        for node in one.live:
            if node.op == "get_attr":
                env[node] = exact.lift(one.attribute(node))
            elif node.op == "call_function":
                args, kwargs = (torch.fx.map_arg(v, env.__getitem__) for v in (node.args, node.kwargs))
                target, args, kwargs = exact.lifted_call(node, args, kwargs)
                env[node] = (target_of(node) if target is node.target else target)(*args, **kwargs)
    return {n: v.double() for n, v in env.items() if isinstance(v, torch.Tensor) and not v.is_complex()}


def score(
    true: Truth,
    before: Program,
    after: Program,
    alignment: Alignment,
    mutant: mutations.Mutant | None = None,
    renamed: Mapping[str, str] | None = None,
) -> Score:
    """Score one alignment of `before` with `after`, a stripped and maybe mutated form of what the truth knows.

    `renamed` maps the labels of `after` to those of the graph the truth was found for.
    """
    named_before: Names = keys(before)
    named_after: Names = {}
    for node, (label, count) in keys(after).items():
        named_after[node] = ((renamed or {}).get(label, label), count)
    touched = set(mutant.nodes) if mutant else set()
    out = Score()
    right_before, right_after = set(), set()
    for claim in alignment.claims:
        key, x = named_after.get(claim.after), named_before[claim.before]
        if key is None or key[0] in touched or claim.after.op == "placeholder" or claim.evidence == "output":
            continue  # outputs stand for each other by definition, also where a bug has taken their operation away
        if key in true.partners:
            right = x in true.partners[key]
        elif any(_underlying(n) is not n for n in (claim.before, claim.after)):
            right = _shown_right(true, claim, (named_before, named_after))
        else:
            continue
        out.claims += 1
        if right:
            right_before.add(x)
            right_after.add(key)
            if key not in true.partners:
                right_after.add(named_after[_underlying(claim.after)])
        else:
            out.wrong += 1
            said = f"{x[0]} = {key[0]} by {claim.evidence}"
            out.said.append(said)
    names = named_before, named_after
    _recall(out, true, before, after, names, touched, (right_before, right_after))
    resolved = set()
    for region in regions_of(before, after, alignment):
        if region.size("after") <= SMALL:
            resolved |= set(region.after)
    out.resolved = sum(n in resolved for n in after.live if nodes.makes_values(n) and n in named_after)
    return out


def _recall(
    out: Score,
    true: Truth,
    before: Program,
    after: Program,
    names: tuple[Names, Names],
    touched: set[str],
    right: tuple[set[tuple[str, int]], set[tuple[str, int]]],
) -> None:
    """Count what should be claimed: value-making nodes of either side that stand for something on the other."""
    making_after = [n for n in after.live if nodes.makes_values(n) and n in names[1]]
    making_before = {names[0][n] for n in before.live if nodes.makes_values(n)}
    called = {
        names[1][n] for n in after.live if n in names[1] and n.op == "call_function"
    }  # constants are no operations
    # what only hands on the value of the operation with the bug stands for no more than that operation does
    asked = {key for key in called if not {key[0], true.makers.get(key, key)[0]} & touched}
    partnered = {k for key in asked for k in true.partners.get(key, ())}
    wanted_after = {names[1][n] for n in making_after if true.partners.get(names[1][n], set()) & making_before}
    wanted_after = {k for k in wanted_after if k[0] not in touched}
    wanted_before = partnered & making_before
    out.making = len(making_after)
    # what holds the same value as something that is claimed is met there
    found_after = {k for k in wanted_after if k in right[1] or true.partners[k] & right[0]}
    found_before = right[0] | {k for key in right[1] for k in true.partners.get(key, ())}
    out.wanted = len(wanted_after) + len(wanted_before)
    out.found = len(found_after) + len(wanted_before & found_before)
    out.missed = [f"after {key[0]}" for key in sorted(wanted_after - found_after)]
    out.missed += [f"before {key[0]}" for key in sorted(wanted_before - found_before)]


def _underlying(node: Node) -> Node:
    """Step over the views that alignment inserted behind a node."""
    while node.meta.get(nodes.INSERTED) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


Keys = Mapping[tuple[str, int], torch.Tensor]


def _shown_right(true: Truth, claim: Claim, names: tuple[Names, Names]) -> bool:
    """Whether both sides hold the same as alignment shows them. Rows are picked for the input of the first draw."""
    both = zip(true.values, true.values_after, strict=True)
    draws = list(both)[: 1 if _picks(claim.before) or _picks(claim.after) else None]
    for before, after in draws:
        x, y = _shown(claim.before, before, names[0]), _shown(claim.after, after, names[1])
        if x is None or y is None or not equal(x, y):
            return False
    return True


def _chain(node: Node) -> list[Node]:
    """Return the views that alignment inserted behind a node, the last one first."""
    chain = []
    while node.meta.get(nodes.INSERTED) and node.all_input_nodes:
        chain.append(node)
        node = node.all_input_nodes[0]
    return chain


def _picks(node: Node) -> bool:
    return any(step.target is torch.ops.aten.index_select.default for step in _chain(node))


def _shown(node: Node, values: Keys, names: Names) -> torch.Tensor | None:
    value: Any = values.get(names[_underlying(node)])
    if value is None:
        return None
    for step in reversed(_chain(node)):
        args = torch.fx.map_arg(step.args[1:], _constant)
        value = step.target(value, *args)  # type: ignore[operator]
    return value


def _constant(node: Node) -> Any:
    return getattr(node.graph.owning_module, str(node.target))
