"""A second look: evaluate single regions again, on before's values, with noise or with other values at the frontier.

One forward run of `before`, as far as it is needed, collects the values at the frontiers; then each region is a handful
of operators.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.fx import Node

from graphprobe import nodes
from graphprobe.execute import Values, call, run_program
from graphprobe.lanes import control, elements, exact
from graphprobe.lanes.noise import U64, Jitter, Noise
from graphprobe.lanes.plan import Plan
from graphprobe.lanes.regions import Region
from graphprobe.lanes.relaxed import relaxed_call
from graphprobe.lanes.remembered import Remembered


class Replay:
    """Evaluates regions natively and exactly on before's values."""

    def __init__(
        self,
        plan: Plan,
        inputs: Mapping[str, Any],
        redrawn: Mapping[str, Any] | None = None,
        known: Values | None = None,
    ) -> None:
        """`known` are values of before that the lanes left behind (see `lanes.waypoints`)."""
        self.plan, self.inputs, self.redrawn = plan, inputs, redrawn
        self._start = dict(known or {})
        self.values: Values = dict(self._start)  # before's at the frontiers so far, and what a run goes on from
        self._masks: dict[tuple[Node, Node], torch.Tensor] = {}
        self._known: Remembered | None = None

    def fetch(self, wanted: Iterable[Node]) -> None:
        """Make before's values of these nodes available; runs what of `before` lies between them and what is known."""
        missing = [n for n in wanted if n not in self.values]
        if missing:
            found = run_program(self.plan.before, self.inputs, missing, known=self.values, resumable=True)
            self.values.update(found)

    def fetch_frontiers(self, regions: Iterable[Region]) -> None:
        """Make all frontier values of the regions available."""
        self.fetch(n for r in regions for n in [*(p for p, _ in r.frontier), *r.loose_before])

    def forget(self, beyond: int = 0) -> None:
        """Free what was fetched, if that is more than so many bytes."""
        fetched = [v for n, v in self.values.items() if n not in self._start and isinstance(v, torch.Tensor)]
        if sum(v.numel() * v.element_size() for v in fetched) > beyond:
            self.values = dict(self._start)

    @contextlib.contextmanager
    def remembering(self) -> Iterator[None]:
        """Evaluate no node twice in exact arithmetic that many regions hold, as far as memory allows."""
        self._known = Remembered()
        try:
            yield
        finally:
            self._known = None

    def mask(self, x: Node, y: Node) -> torch.Tensor | None:
        """Return where the values of x and y move when padding is drawn anew: nobody cares about them there."""
        return self._masks.get((x, y))

    def leave_out(self, x: Node, y: Node, where: torch.Tensor) -> None:
        """Leave elements of the claimed pair out of every further measure."""
        known = self._masks.get((x, y))
        self._masks[x, y] = where if known is None or known.shape != where.shape else known | where

    def fetch_masks(self, pairs: Iterable[tuple[Node, Node]]) -> None:
        """Make the don't-care masks of these pairs available: four forward runs, none where nothing is padded."""
        if self.redrawn is None:
            return
        missing = [pair for pair in pairs if pair not in self._masks]
        if not missing:
            return
        both = []
        sides = ((self.plan.before, 0), (self.plan.after, 1))
        for program, column in sides[:1] if self.plan.redraw == "before" else sides:
            wanted = [pair[column] for pair in missing]
            runs = [run_program(program, i, wanted, skip=self.plan.dead()) for i in (self.inputs, self.redrawn)]
            both.append({n: elements.moved(runs[0][n], runs[1][n]) for n in wanted if n in runs[0]})
        for x, y in missing:
            if self.plan.redraw == "before":
                if x in both[0] and nodes.shape(x) == nodes.shape(y):
                    self._masks[x, y] = both[0][x]
            elif x in both[0] and y in both[1] and both[0][x].shape == both[1][y].shape:
                self._masks[x, y] = both[0][x] | both[1][y]

    def native(
        self,
        side: str,
        region: Region,
        given: Mapping[Node, torch.Tensor] | None = None,
        override: Mapping[Node, torch.Tensor] | None = None,
    ) -> Values:
        """Evaluate one piece natively on before's values (or on `given`, keyed by before's node).

        Nodes in `override` take the given values.
        """
        env = self._leaves(side, region, given)
        if side == "after":
            for leaf, value in env.items():
                env[leaf] = _as_taken(value, leaf)
        return self.run_piece(side, region, env, override)

    def exact(
        self,
        side: str,
        region: Region,
        noise: Noise | None = None,
        given: Mapping[Node, torch.Tensor] | None = None,
        cast: bool = False,
        override: Mapping[Node, torch.Tensor] | None = None,
        size: float = 2 * U64,
        relaxed: Collection[Node] = (),
    ) -> torch.Tensor:
        """Evaluate one piece in float64. With `noise`, every floating result and constant is multiplied by 1 + size xi.

        With `given`, frontier nodes of before take these values. With `cast`, before's values are first rounded to what
        `after` takes (for the precision rule). With `override`, weights and nodes inside the piece take the given
        values. The nodes in `relaxed` are evaluated without their rounding to codes (see `lanes.relaxed`).
        """
        values = self.exact_values(side, region, noise, given, cast, override, size, relaxed)
        return self.result(side, region, values, override)

    def result(
        self, side: str, region: Region, values: Values, override: Mapping[Node, torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Return the claimed value of one piece, given those of its nodes."""
        last: Node = getattr(region.claim, side)
        found: torch.Tensor = (
            values[last] if last.op != "get_attr" else exact.lift(self._weight(side, last, override or {}))
        )
        return found

    def exact_values(
        self,
        side: str,
        region: Region,
        noise: Noise | None = None,
        given: Mapping[Node, torch.Tensor] | None = None,
        cast: bool = False,
        override: Mapping[Node, torch.Tensor] | None = None,
        size: float = 2 * U64,
        relaxed: Collection[Node] = (),
        only: Collection[Node] | None = None,
    ) -> Values:
        """Do as `exact`, and return the values of all nodes of the piece (of those in `only`) but its weights."""
        override = override or {}
        env = self._leaves(side, region, given)
        if cast:
            env = {leaf: _as_taken(value, leaf) for leaf, value in env.items()}
        env = {leaf: exact.lift(value) for leaf, value in env.items()}
        plain = not (noise or given or cast or override or relaxed or only)
        known = self._known.of(side, region) if self._known is not None and plain else None
        native: Values = {}
        if any(self._is_native(n) for n in getattr(region, side)):
            native = self.native(side, region, given, self._stored(side, override))
        jitter = Jitter(noise, size)
        for node in getattr(region, side):
            if node.op == "get_attr" or (only is not None and node not in only):
                continue
            if known is not None and node in known:
                env[node] = known[node]
            elif node in override:
                env[node] = override[node] if exact.decides(node) else jitter(override[node])
            elif self._is_native(node):
                env[node] = exact.lift(native[node])
            else:
                env[node] = self._exact_node(side, node, env, jitter, override, relaxed)
        if known is not None and self._known is not None:
            self._known.keep(side, region, env)
        return env

    def _stored(self, side: str, override: Mapping[Node, torch.Tensor]) -> dict[Node, torch.Tensor]:
        """Return the overridden weights that keep their dtype: codes whose bits the native lane reads, too."""
        program = self.plan.before if side == "before" else self.plan.after
        own = {n: v for n, v in override.items() if n.op == "get_attr" and n in program.order}
        return {n: v for n, v in own.items() if getattr(program.attribute(n), "dtype", None) == v.dtype}

    def _is_native(self, node: Node) -> bool:
        return exact.takes_native(node) or node.target in self.plan.native_only

    def _exact_node(
        self,
        side: str,
        node: Node,
        env: Values,
        jitter: Jitter,
        override: Mapping[Node, torch.Tensor],
        relaxed: Collection[Node],
    ) -> Any:
        late = exact.lifts_late(node)

        def operand(n: Node) -> Any:
            if n.op != "get_attr":
                return env[n]
            value = self._weight(side, n, override)
            return value if n is late else jitter(exact.lift(value))

        args: Any = torch.fx.map_arg(node.args, operand)
        kwargs: Any = torch.fx.map_arg(node.kwargs, operand)
        target: Any = node.target
        with torch.no_grad():
            if late is not None:
                return jitter(exact.lift(target(*args, **kwargs)))
            if relaxed:
                target, args, kwargs = relaxed_call(node, args, kwargs, node in relaxed)
            else:
                target, args, kwargs = exact.lifted_call(node, args, kwargs)
            if control.is_control(node):
                kwargs = {**kwargs, "after_each": jitter.of}
            value = target(*args, **kwargs)
        return jitter.of(node, value)

    def _weight(self, side: str, node: Node, override: Mapping[Node, torch.Tensor]) -> Any:
        if node in override:
            return override[node]
        if side == "after" and node in self.plan.same_weight:
            side, node = "before", self.plan.same_weight[node]
        return (self.plan.before if side == "before" else self.plan.after).attribute(node)

    def _leaves(self, side: str, region: Region, given: Mapping[Node, torch.Tensor] | None) -> Values:
        env: Values = {}
        for p, q in reversed(region.frontier):
            env[p if side == "before" else q] = given[p] if given and p in given else self.values[p]
        if side == "before":
            env.update({p: self.values[p] for p in region.loose_before})
        else:
            paths = {n: path for path, n in self.plan.after.inputs.items()}
            env.update({q: self.inputs[paths[q]] for q in region.loose_after})
        return env

    def run_piece(
        self, side: str, region: Region, env: Values, override: Mapping[Node, torch.Tensor] | None = None
    ) -> Values:
        """Run one piece natively on the leaves in `env`; returns env with the piece's values added."""
        program = self.plan.before if side == "before" else self.plan.after
        with torch.no_grad():
            for node in getattr(region, side):
                if override and node in override:
                    env[node] = override[node]
                else:
                    env[node] = program.attribute(node) if node.op == "get_attr" else call(program, node, env)
        return env


def _as_taken(value: Any, leaf: Node) -> Any:
    """Cast before's value to the dtype of the node of after that stands in its place."""
    taken = nodes.tensor_val(leaf)
    if isinstance(value, torch.Tensor) and taken is not None and taken.dtype != value.dtype:
        return elements.taken(value, taken.dtype)
    return value
