"""A backend of torch.compile that listens to Inductor and keeps every graph on the way."""

from __future__ import annotations

import copy
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from torch.fx import GraphModule, Node

from graphprobe import observe, provenance, torch_private
from graphprobe.bisection.inductor import hooks, signature, snapshots
from graphprobe.bisection.inductor.snapshots import Hit, Piece, Snapshot
from graphprobe.bisection.inductor.values import cloned

OTHER = "(between the passes)"


@dataclass(frozen=True)
class Plan:
    """What is to be different from a plain compilation."""

    limit: tuple[tuple[str, str, int], int] | None = None  # a pass, and how many of its matches may be applied
    lowered: Callable[[int, int], bool] | None = None  # whether the n-th operation of a piece is lowered
    codegen: bool = True  # False: no code is generated, and the first graph behind AOTAutograd runs in its place
    config: tuple[tuple[str, Any], ...] = ()


class Interrupted(Exception):
    """Compilation has failed; `stage` and `name` say where."""

    def __init__(self, stage: str, name: str, error: BaseException) -> None:
        lines = [line for line in str(error).splitlines() if line.strip()] or [""]
        super().__init__(f"{type(error).__name__}: {lines[0][:300]}")
        self.stage, self.name, self.error = stage, name, error

    @property
    def label(self) -> str:
        """Return 'joint: pass_pattern_0'."""
        return f"{self.stage}: {self.name}" if self.name else self.stage


@dataclass(eq=False)
class Recorder:
    """A backend of torch.compile that listens to Inductor."""

    plan: Plan = field(default_factory=Plan)
    pieces: list[Piece] = field(default_factory=list)
    places: dict[int, int] = field(default_factory=dict)  # piece -> which of its snapshots runs; absent: compiled code
    lowerings: dict[int, list[str]] = field(default_factory=dict)  # piece -> nodes whose lowering was asked for
    where: tuple[str, str] = ("dynamo", "")
    keep: bool = False  # note inputs and outputs of the next call
    closed: bool = False  # all pieces are there
    failed: Interrupted | None = None  # where the passes ended early, while no code was to be generated
    _top: GraphModule | None = None
    _signature: int = 0
    _depth: int = 0
    _watch: ExitStack = field(default_factory=ExitStack)
    _observation: observe.Observation = field(default_factory=observe.Observation)
    _hits: list[Hit] = field(default_factory=list)
    _met: Counter[tuple[str, str]] = field(default_factory=Counter)
    _started: float = 0.0
    _outer_args: list[Any] = field(default_factory=list)
    _counts: Counter[str] = field(default_factory=Counter)

    # --- torch.compile's side ----------------------------------------------------------------------------------------

    def __call__(self, gm: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        """Compile one Dynamo graph."""
        if self.closed:
            return self._late(gm, example_inputs)
        provenance.stamp(gm)
        piece = Piece(len(self.pieces))
        self.pieces.append(piece)
        self._top, self._signature, self.where = gm, 0, ("dynamo", "")
        self._met.clear()
        self._take("dynamo", "", gm)
        held = [*gm.parameters(), *gm.buffers()]
        compile_fx = torch_private.fetch("compile_fx")
        with hooks.listening(self):
            compiled = compile_fx(gm, example_inputs, inner_compile=self._inner(piece, held))
        return self._outer(piece, compiled)

    def _late(self, gm: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        """Compile what Dynamo traces again in a later call, where a number is another: it is no piece of its own."""
        traced = copy.deepcopy(gm)
        compiled = torch_private.fetch("compile_fx")(gm, example_inputs)
        return lambda *args: traced(*args) if self.places else compiled(*args)

    def _outer(self, piece: Piece, compiled: Any) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            if self.keep:
                piece.inputs, self._outer_args = cloned(args), list(args)
            place = self.places.get(piece.number)
            if place is not None and place < piece.boundary:
                return piece.snapshots[place].gm(*args)
            result = compiled(*args)
            if self.keep:
                piece.outputs = cloned(result)
            return result

        return run

    def _inner(self, piece: Piece, held: list[Any]) -> Callable[..., Any]:
        def compile_inner(gm: GraphModule, example_inputs: Sequence[Any], **options: Any) -> Callable[..., Any]:
            piece.returned = signature.returned(gm)
            compiled = self._generated(gm, example_inputs, options)

            def run(args: list[Any]) -> Any:
                given = list(args)
                if self.keep:
                    piece.inner_inputs = cloned(given)
                    piece.adapter, piece.unadapted = signature.adapter(piece.counts, self._outer_args, given, held)
                place = self.places.get(piece.number, piece.boundary if compiled is None else None)
                if place is not None:
                    return piece.snapshots[place].gm(*given)
                result = compiled(args)
                if self.keep:
                    piece.inner_outputs = cloned(result)
                return result

            run._boxed_call = True  # type: ignore[attr-defined]
            return run

        return compile_inner

    def _generated(self, gm: GraphModule, example_inputs: Sequence[Any], options: dict[str, Any]) -> Any:
        if self.plan.codegen:
            return torch_private.fetch("compile_fx_inner")(gm, example_inputs, **options)
        try:
            torch_private.fetch("post_grad_passes")(gm, is_inference=options.get("is_inference", True))
        except Exception as error:  # the graphs up to here can be compared all the same
            self.failed = Interrupted(*self.where, error)
        return None

    # --- Inductor's side: hooks.Listener -----------------------------------------------------------------------------

    def phase(self, stage: str, gm: GraphModule) -> None:
        """Take what has changed since the last pass."""
        first = self._top is not gm and stage == "joint"
        self._top = gm
        if first:
            self._signature = 0
        self._take("aot" if first else stage, "" if first else OTHER, gm)

    def enter(self, stage: str, name: str, gm: GraphModule) -> None:
        """Begin to watch, where the pass works on the graph at hand."""
        top = self._top
        self._depth += 1
        if self._depth > 1 or top is None or not any(one is gm for one in top.modules()):
            return
        stage = stage or self.where[0]
        self._take("pre_grad" if stage == "dynamo" else stage, OTHER, top)
        self.where, self._started = (stage, name), time.perf_counter()
        self._counts = counted()
        self._watch = ExitStack()
        self._observation = self._watch.enter_context(observe.watch(top, f"{stage}: {name}"))

    def leave(self, stage: str, name: str, gm: GraphModule) -> None:
        """End the watch and take what the pass has made."""
        self._depth -= 1
        top = self._top
        if self._depth or top is None or not any(one is gm for one in top.modules()):
            return
        self._watch.close()
        stage = stage or self.where[0]
        self._take(stage, name, top, self._observation, tuple(counted() - self._counts))
        self._met[stage, name] += 1
        self.where = (stage, OTHER)

    def match(self, name: str, kind: str, match: Any, node: Node, apply: Callable[[], None]) -> None:
        """Apply a match unless the plan has had enough of them, and note it."""
        stage, passed = self.where
        limit = self.plan.limit
        if limit is not None and limit[0] == (stage, passed, self._met[stage, passed]) and len(self._hits) >= limit[1]:
            return
        self._hits.append(Hit(name, node.name, kind))
        if kind != "lowering_pattern":
            apply()
            return
        graph, there = node.graph, set(node.graph.nodes)
        original = snapshots.remember(match, node)
        apply()
        snapshots.mark(there, graph, original)

    def lowered(self, gm: GraphModule) -> None:
        """Take the graph that code is generated for."""
        self._take("post_grad", OTHER, gm)
        self.where = ("codegen", "")

    def falls_back(self, node: str) -> bool:
        """Whether the plan leaves an operation to its eager kernel."""
        number = len(self.pieces) - 1
        names = self.lowerings.setdefault(number, [])
        names.append(node)
        return self.plan.lowered is not None and not self.plan.lowered(number, len(names) - 1)

    def _take(
        self,
        stage: str,
        name: str,
        gm: GraphModule,
        seen: observe.Observation | None = None,
        counts: tuple[str, ...] = (),
    ) -> None:
        """Keep a copy of the graph if it has changed."""
        hits, self._hits = tuple(self._hits), []
        state = snapshots.signature_of(gm)
        if state == self._signature:
            return
        self._signature = state
        seen = seen or observe.Observation()
        taken = Snapshot(
            stage,
            name,
            snapshots.copy_of(gm),
            seen.replacements,
            seen.created,
            seen.erased,
            seen.rewritten,
            hits,
            time.perf_counter() - self._started if name not in ("", OTHER) else 0.0,
            self._met[stage, name],
            counts,
        )
        self.pieces[-1].snapshots.append(taken)


def counted() -> Counter[str]:
    """Return how often each rewrite within Inductor's passes says that it has done something."""
    counts = torch_private.fetch("counters")["inductor"]
    return Counter({name: n for name, n in counts.items() if not name.startswith("pattern_matcher_")})
