"""What is looked at after each transform of a pipeline: an explicit table of checks, each a function that yields lints.

The checks of metadata look at the graph right after a transform, before clean-up and shape propagation can hide what it
left behind; those of tidiness look after the clean-up that the pipeline asks for, because tidying up is its business.
A defect that was there before is not reported again: what is new is the transform's.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.utils._pytree as pytree
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Node

from graphprobe.errors import InputError, nearest
from graphprobe.linting import RULES
from graphprobe.linting.scope import Scope, scopes
from graphprobe.records import Lint

When = Literal["after apply", "after clean-up"]


@dataclass(frozen=True)
class Check:
    """One row of the table."""

    when: When
    find: Callable[[Scope], Iterator[Lint]]


def cannot_run(scope: Scope) -> Iterator[Lint]:
    """Operators that refuse the shapes or dtypes of their inputs: a view with the sizes of yesterday."""
    for node, why in scope.recomputed.failed.items():
        if isinstance(node.target, torch._ops.OpOverload) and not _is_not_its_fault(why):
            message = f"it cannot take its inputs as they are now: {why[:300]}"
            yield scope.issue("cannot-run", node, message, "adapt its arguments where a transform changes its inputs")


def _is_not_its_fault(why: str) -> bool:
    # no shape function, sizes that depend on data, an input without metadata: other rules speak of these
    return any(word in why for word in ("fake impl", "UnsupportedOp", "DynamicOutput", "DataDependent", "KeyError"))


#: Metadata that torch writes itself, which holds no nodes; looking into it for every node would take long.
_PLAIN = {
    "val", "tensor_meta", "stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "from_node", "custom",
    "original_aten", "seq_nr", "example_value", "fwd_nn_module_stack", "fwd_source_fn_stack",
}  # fmt: skip


def hidden_input(scope: Scope) -> Iterator[Lint]:
    """Nodes kept in another node's metadata: data that flows where no edge shows it."""
    for node in scope.gm.graph.nodes:
        for key, value in node.meta.items():
            if key in _PLAIN or not isinstance(value, (Node, list, tuple, dict)):
                continue
            held = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Node) and leaf.graph is node.graph]
            held = [leaf for leaf in held if leaf not in node.all_input_nodes]
            if held:
                message = f"its meta[{key!r}] holds {held[0].name}, which is none of its inputs: no edge keeps it alive"
                yield scope.issue("hidden-input", node, message, "make what the operator reads an argument of it")


def foreign_fake_mode(scope: Scope) -> Iterator[Lint]:
    """Values made in another FakeTensorMode than the graph's inputs: the next operator to see both raises."""
    modes = [(node, mode) for node in scope.gm.graph.nodes if (mode := _mode(node)) is not None]
    own = next((mode for node, mode in modes if node.op == "placeholder"), None)
    for node, mode in modes:
        if own is not None and mode is not own:
            message = 'its meta["val"] belongs to another FakeTensorMode than the inputs of the graph'
            fix = "compute it under the mode of an input's val, node.meta['val'].fake_mode"
            yield scope.issue("foreign-fake-mode", node, message, fix)


def _mode(node: Node) -> Any:
    leaves = pytree.tree_leaves(node.meta.get("val"))
    return next((leaf.fake_mode for leaf in leaves if isinstance(leaf, FakeTensor)), None)


#: Name -> what is looked at, and when. `diff` and `total` compare numbers and are asked for by name.
CHECKS: dict[str, Check] = {
    "missing-val": Check("after apply", RULES["missing-val"]),
    "stale-val": Check("after apply", RULES["stale-val"]),
    "cannot-run": Check("after apply", cannot_run),
    "hidden-input": Check("after apply", hidden_input),
    "foreign-fake-mode": Check("after apply", foreign_fake_mode),
    "python-closure": Check("after apply", RULES["python-closure"]),
    "copied-id": Check("after apply", RULES["copied-id"]),
    "dead-node": Check("after clean-up", RULES["dead-node"]),
    "orphaned-parameter": Check("after clean-up", RULES["orphaned-parameter"]),
}
WEIGHT_WRITTEN = "weight-written"
COMPARISONS = ("diff", "total")
#: All that can be asked for; `weight-written` compares two moments and so is no row of the table above.
NAMES = (*CHECKS, WEIGHT_WRITTEN, *COMPARISONS)
DEFAULT = tuple(name for name in NAMES if name not in COMPARISONS)


def chosen(check: Sequence[str]) -> tuple[str, ...]:
    """Return the names of the checks asked for; "all" and "lint" stand for several. Raises InputError."""
    out: list[str] = []
    for name in (check,) if isinstance(check, str) else check:
        if name not in (*NAMES, "all", "lint"):
            known = ("all", "lint", *NAMES)
            raise InputError(f"there is no check {name!r}{nearest(name, known)}. The checks are {', '.join(known)}")
        out += NAMES if name == "all" else DEFAULT if name == "lint" else (name,)
    return tuple(dict.fromkeys(out))


@dataclass
class Watchman:
    """Remembers what was wrong with one graph already, and names what is new."""

    names: tuple[str, ...]
    changed: bool = False  # whether the last transform, with what tidied up after it, left another graph than it found
    written: tuple[str, ...] = ()  # the weights that it wrote into
    _seen: set[tuple[str, str]] = field(default_factory=set)
    _state: list[tuple[Any, ...]] = field(default_factory=list)
    _applied: list[tuple[Any, ...]] = field(default_factory=list)  # the state right after the last transform
    _sums: dict[str, tuple[Any, ...]] = field(default_factory=dict)

    def start(self, gm: GraphModule) -> None:
        """Take the graph as it stands for granted; again only where it has changed since it was last looked at."""
        if not self._state or not _same(self._state, _state(gm)):
            self._seen = {_key(lint) for when in ("after apply", "after clean-up") for lint in self._find(gm, when)}
            self._state = _state(gm)
        if WEIGHT_WRITTEN in self.names:
            self._sums = _sums(gm, self._sums)

    def after_apply(self, gm: GraphModule, transform: str) -> tuple[Lint, ...]:
        """Return the new defects of metadata and weights, in the transform's name."""
        found = list(self._written(gm)) if WEIGHT_WRITTEN in self.names else []
        self.written = tuple(lint.node for lint in found)
        self._applied = _state(gm)
        if not _same(self._state, self._applied):
            found += self._news(gm, "after apply", touched(self._state, self._applied))
        return tuple(dataclasses.replace(lint, transform=transform) for lint in found)

    def after_clean_up(self, gm: GraphModule, transform: str) -> tuple[Lint, ...]:
        """Return the new defects of tidiness, in the transform's name."""
        state = _state(gm)
        self.changed = not _same(self._state, state)
        if not self.changed:
            return ()
        found = self._news(gm, "after clean-up")
        if not _values(state) <= _values(self._applied):  # shape propagation has computed some anew
            self._news(gm, "after apply", touched(self._applied, state))
        self._state = state
        return tuple(dataclasses.replace(lint, transform=transform) for lint in found)

    def _news(self, gm: GraphModule, when: When, only: frozenset[Node] | None = None) -> list[Lint]:
        """Return what was not seen before; with `only`, values are computed again for these nodes alone."""
        found = self._find(gm, when, only)
        news = [lint for lint in found if _key(lint) not in self._seen]
        rules = {name for name, check in CHECKS.items() if check.when == when}
        names = None if only is None else {node.name for node in only}
        # what was not looked at again is as wrong as it was
        kept = {key for key in self._seen if key[0] not in rules or (names is not None and _last(key[1]) not in names)}
        self._seen = kept | {_key(lint) for lint in found}
        return news

    def _find(self, gm: GraphModule, when: str, only: frozenset[Node] | None = None) -> list[Lint]:
        rows = [check.find for name, check in CHECKS.items() if name in self.names and check.when == when]
        places = scopes(gm, only) if rows else []
        return [lint for find in rows for place in places for lint in find(place)]

    def _written(self, gm: GraphModule) -> Iterator[Lint]:
        now = _sums(gm, {})
        for path, (tensor, *rest) in self._sums.items():
            if path in now and now[path][0] is tensor and list(now[path][1:]) != rest:
                yield Lint(
                    rule=WEIGHT_WRITTEN,
                    node=path,
                    message="it wrote into this weight, which the graph it was given shares: that one has changed, too",
                    fix="register a new Parameter under this or another path in place of writing into the old one",
                    target=path,
                    module_path=path.rpartition(".")[0],
                )
        self._sums = now


def _key(lint: Lint) -> tuple[str, str]:
    return lint.rule, lint.node


def _state(gm: GraphModule) -> list[tuple[Any, ...]]:
    """What the rules look at, node by node; the objects themselves, so that a comparison is one of identity."""
    rows = []
    for _, one in gm.named_modules():
        if isinstance(one, GraphModule):
            rows += [_row(node) for node in one.graph.nodes]
    return [*rows, *gm.named_parameters(), *gm.named_buffers()]


def _row(node: Node) -> tuple[Any, ...]:
    return node, node.target, node.args, node.kwargs, "val" in node.meta, node.meta.get("val"), *node.meta.values()


def _last(node: str) -> str:
    """Return the node's own name: in the body of a control-flow operator it stands behind the body's path."""
    return node.rpartition("/")[2]


def touched(was: list[tuple[Any, ...]], now: list[tuple[Any, ...]]) -> frozenset[Node]:
    """Return the nodes that a transform made or changed, what reads a weight that it changed, and the users of both."""
    known = {_identity(row) for row in was}
    fresh = [row for row in now if _identity(row) not in known]
    paths = {row[0] for row in fresh if not isinstance(row[0], Node)}
    reads = {row[0] for row in now if isinstance(row[0], Node) and row[0].op == "get_attr" and row[0].target in paths}
    changed = {row[0] for row in fresh if isinstance(row[0], Node)} | reads
    return frozenset(changed | {user for node in changed for user in node.users})


def _identity(row: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(part if isinstance(part, (str, bool)) else id(part) for part in row)


def _values(state: list[tuple[Any, ...]]) -> set[tuple[int, int]]:
    """Return (node, val) of every node, by identity; rows of parameters are shorter and have no val."""
    return {(id(row[0]), id(row[5])) for row in state if isinstance(row[0], Node)}


def _same(one: list[tuple[Any, ...]], other: list[tuple[Any, ...]]) -> bool:
    return len(one) == len(other) and all(
        len(x) == len(y) and all(p is q or (isinstance(p, (str, bool)) and p == q) for p, q in zip(x, y, strict=True))
        for x, y in zip(one, other, strict=True)
    )


def _sums(gm: GraphModule, known: dict[str, tuple[Any, ...]]) -> dict[str, tuple[Any, ...]]:
    """Map each weight to (itself, its version, sums of its bytes); writing through ``.data`` changes the sums alone."""
    out: dict[str, tuple[Any, ...]] = {}
    for path, tensor in [*gm.named_parameters(), *gm.named_buffers()]:
        was = known.get(path)
        version = 0 if tensor.is_inference() else tensor._version
        out[path] = was if was is not None and was[0] is tensor else (tensor, version, _sum(tensor))
    return out


def _sum(tensor: torch.Tensor) -> int:
    if tensor.device.type == "meta" or tensor.layout is not torch.strided or not tensor.numel():
        return 0
    flat = tensor.detach().reshape(-1).view(torch.uint8)
    whole = flat.numel() % 8 == 0 and flat.storage_offset() % 8 == 0
    words = flat.view(torch.int64) if whole else flat.to(torch.int64)
    side = math.isqrt(words.numel())
    square, rest = words[: words.numel() // side * side].view(-1, side), words[words.numel() // side * side :]
    # along both sides: elements that change places change one of the two
    return hash((*square.sum(0).tolist(), *square.sum(1).tolist(), int(rest.sum())))
