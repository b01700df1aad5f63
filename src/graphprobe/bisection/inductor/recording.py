"""Compile a model once with Inductor and keep every graph on the way; the result runs any of them in its place."""

from __future__ import annotations

import copy
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch.fx import GraphModule, Node

from graphprobe import nodes, observe, provenance, torch_private
from graphprobe.bisection.inductor import hooks, snapshots
from graphprobe.bisection.inductor.snapshots import Adapter, Hit, Piece, Snapshot
from graphprobe.caches import register_caches
from graphprobe.capturing import quiet

OTHER = "(between the passes)"
Seen = dict[str, Any]  # what a caller sees of a call: by path, outputs, arguments and buffers after it
#: Inductor's switches for a compilation that is looked at: nothing may come from a cache.
CONFIG = {"fx_graph_cache": False, "fx_graph_remote_cache": False, "compile_threads": 1}


@dataclass(frozen=True)
class Plan:
    """What is to be different from a plain compilation."""

    limit: tuple[tuple[str, str, int], int] | None = None  # a pass, and how many of its matches may be applied
    lowered: Callable[[int, int], bool] | None = None  # whether the n-th operation of a piece is lowered
    codegen: bool = True  # False: the last FX graph runs in place of generated code
    config: tuple[tuple[str, Any], ...] = ()


class Interrupted(Exception):
    """Compilation has failed; `stage` and `name` say where."""

    def __init__(self, stage: str, name: str, error: BaseException) -> None:
        super().__init__(f"{type(error).__name__}: {error}")
        self.stage, self.name, self.error = stage, name, error


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
            piece.returned = returned(gm)
            compiled = self._generated(gm, example_inputs, options)

            def run(args: list[Any]) -> Any:
                given = list(args)
                if self.keep:
                    piece.inner_inputs = cloned(given)
                    piece.adapter, piece.unadapted = adapter(piece, self._outer_args, given, held)
                place = self.places.get(piece.number)
                if place is not None or compiled is None:
                    return piece.snapshots[len(piece.snapshots) - 1 if place is None else place].gm(*given)
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
        torch_private.fetch("post_grad_passes")(gm, is_inference=options.get("is_inference", True))
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
        signature = snapshots.signature_of(gm)
        if signature == self._signature:
            return
        self._signature = signature
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


def is_random(node: Node) -> bool:
    """Whether a node draws random numbers, in ATen's way or in Inductor's."""
    return nodes.is_random(node) or "inductor_seed" in str(node.target) or "inductor_random" in str(node.target)


# --- signatures ------------------------------------------------------------------------------------------------------


def returned(gm: GraphModule) -> tuple[int, int]:
    """Return how many inputs a graph behind AOTAutograd hands back first, and how many outputs of the model follow."""
    context = torch_private.fetch("tracing_context")()
    metadata = getattr(context, "fw_metadata", None)
    flat = list(next(iter(gm.graph.find_nodes(op="output"))).args[0])
    if metadata is None:
        return 0, len(flat)
    return len(metadata.mutated_inp_runtime_indices), len(metadata.output_info)


def adapter(
    piece: Piece, outer: Sequence[Any], inner: Sequence[Any], held: Sequence[Any]
) -> tuple[Adapter | None, str]:
    """Say how the inner graph is called in the outer way, or why it cannot be."""
    first, count = piece.returned
    before, after = piece.snapshots[0].gm, piece.snapshots[piece.boundary].gm
    wanted, there = (len(list(next(iter(g.graph.find_nodes(op="output"))).args[0])) for g in (before, after))
    if count != wanted or first + count > there:
        return None, f"it returns {there} values for the {wanted} of the Dynamo graph"
    left = list(range(len(outer)))
    found: list[Any] = []
    for value in inner:
        index = next((i for i in left if _is_same(value, outer[i])), None)
        if index is not None:
            left.remove(index)
            found.append(index)
        elif any(_is_same(value, one) for one in held):
            found.append(value.detach())
        else:
            return None, "one of its inputs is none of the Dynamo graph's"
    return Adapter(tuple(found), tuple(range(first, first + count))), ""


def _is_same(one: Any, other: Any) -> bool:
    if one is other:
        return True
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        alike = (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)
        return alike and one.data_ptr() == other.data_ptr() and one.numel() > 0
    return type(one) is type(other) and not isinstance(one, torch.Tensor) and bool(one == other)


def cloned(values: Any) -> tuple[Any, ...]:
    """Return copies of tensors with their strides; all else as it is."""
    return tuple(_clone(value) for value in values)


def _clone(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    plain = value.detach()
    if any(stride == 0 and size > 1 for stride, size in zip(plain.stride(), plain.shape, strict=True)):
        return plain.clone()  # what shares memory with itself cannot be copied into
    return torch.empty_strided(plain.shape, plain.stride(), dtype=plain.dtype, device=plain.device).copy_(plain)


def outputs_of(seen: Seen) -> list[Any]:
    """Return the leaves of what was returned, without what was written."""
    return [value for path, value in seen.items() if path.startswith("output")]


def _same(value: Any) -> Any:
    return value


def _own(leaf: Any) -> Any:
    """Return a copy that a call may change: a tensor, or an object such as a cache that is no pytree."""
    if isinstance(leaf, torch.Tensor):
        return _clone(leaf)
    try:
        return copy.deepcopy(leaf)
    except Exception:  # a handle of something outside: calls share it
        return leaf


# --- a recorded model ------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Recording:
    """A compiled model whose pieces run as generated code, or as any graph on the way to it."""

    model: torch.nn.Module
    compiled: Callable[..., Any]
    recorder: Recorder
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    state: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def pieces(self) -> list[Piece]:
        """The Dynamo graphs in the order in which they were compiled."""
        return self.recorder.pieces

    def eager(self) -> list[Any]:
        """Return the leaves of what the model returns without the compiler."""
        return outputs_of(self.observed(self.model))

    def run(self, places: dict[int, int] | None = None, *, keep: bool = False) -> list[Any]:
        """Return the leaves of what the model returns with pieces standing at `places`, the others compiled.

        With `keep` the pieces note their inputs and outputs.
        """
        self.recorder.keep = keep
        try:
            return outputs_of(self.observed(self.compiled, places))
        finally:
            self.recorder.keep = False

    def observed(self, function: Callable[..., Any], places: dict[int, int] | None = None) -> Seen:
        """Return what a call of the model, or of the compiled model with pieces at `places`, lets its caller see."""
        standing = self.standing(places) if places else nullcontext()
        try:
            with standing, torch.no_grad(), torch.random.fork_rng(devices=[]), quiet():
                self.restore()
                torch.manual_seed(0)
                return self.seen(function, self.model, *self.inputs(_same))
        finally:
            self.restore()

    @contextmanager
    def standing(self, places: dict[int, int]) -> Iterator[None]:
        """Let pieces stand at these places, the others as code, inside the block."""
        was, self.recorder.places = self.recorder.places, dict(places)
        try:
            yield
        finally:
            self.recorder.places = was

    def inputs(self, change: Callable[[Any], Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the inputs anew, each leaf a copy that went through `change`."""
        return pytree.tree_map(lambda leaf: change(_own(leaf)), (self.args, self.kwargs))  # type: ignore[no-any-return]

    def seen(
        self, function: Callable[..., Any], model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Seen:
        """Call a function: what it returned, and what then stands in its arguments and in the buffers of `model`."""
        result = function(*args, **kwargs)
        found = {f"output [{i}]": _clone(leaf) for i, leaf in enumerate(pytree.tree_leaves(result))}
        for i, leaf in enumerate(pytree.tree_leaves((args, kwargs))):
            if isinstance(leaf, torch.Tensor):
                found[f"argument [{i}] after the call"] = _clone(leaf)
        found.update({f"buffer {name} after the call": _clone(value) for name, value in model.named_buffers()})
        return found

    def restore(self) -> None:
        """Put the model's weights and buffers back to what they were."""
        with torch.no_grad():
            for name, value in self._tensors():
                if name in self.state:
                    value.copy_(self.state[name])

    def as_fx(self) -> dict[int, int]:
        """Return the places at which every piece runs as Dynamo has traced it."""
        return {piece.number: 0 for piece in self.pieces}

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self.model.named_buffers()
        yield from self.model.named_parameters()


def record(
    model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], plan: Plan | None = None
) -> Recording:
    """Compile a model without gradients and run it once. Raises Interrupted where the compiler fails."""
    plan = plan or Plan()
    register_caches()
    torch.compiler.reset()
    recorder = Recorder(plan)
    recording = Recording(model, torch.compile(model, backend=recorder), recorder, args, kwargs)
    recording.state = {name: _clone(value) for name, value in recording._tensors()}
    with _switched(plan):
        try:
            recording.run(keep=True)
        except Exception as error:
            raise Interrupted(*recorder.where, error) from error
    recorder.closed = True
    return recording


@contextmanager
def _switched(plan: Plan) -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(torch_private.fetch("inductor_config")({**CONFIG, **dict(plan.config)}))
        stack.enter_context(torch_private.fetch("aot_config")({"enable_autograd_cache": False}))
        yield
