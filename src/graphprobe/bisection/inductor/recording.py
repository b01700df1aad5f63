"""Compile a model once with Inductor and keep every graph on the way; the result runs any of them in its place."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree

from graphprobe import torch_private
from graphprobe.bisection.inductor.recorder import Interrupted, Plan, Recorder
from graphprobe.bisection.inductor.snapshots import Piece
from graphprobe.bisection.inductor.values import Seen, clone, outputs_of, own
from graphprobe.caches import register_caches
from graphprobe.capturing import quiet

#: Inductor's switches for a compilation that is looked at: nothing may come from a cache.
CONFIG = {"fx_graph_cache": False, "fx_graph_remote_cache": False, "compile_threads": 1}


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
        return pytree.tree_map(lambda leaf: change(own(leaf)), (self.args, self.kwargs))  # type: ignore[no-any-return]

    def seen(
        self, function: Callable[..., Any], model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Seen:
        """Call a function: what it returned, and what then stands in its arguments and in the buffers of `model`."""
        result = function(*args, **kwargs)
        found = {f"output [{i}]": clone(leaf) for i, leaf in enumerate(pytree.tree_leaves(result))}
        for i, leaf in enumerate(pytree.tree_leaves((args, kwargs))):
            if isinstance(leaf, torch.Tensor):
                found[f"argument [{i}] after the call"] = clone(leaf)
        found.update({f"buffer {name} after the call": clone(value) for name, value in model.named_buffers()})
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
    """Compile a model without gradients and run it once.

    Raises Interrupted where the compiler fails, and PipelineError where this torch lacks what listening needs.
    """
    with quiet():  # what is imported here may warn
        torch_private.require()
        register_caches()
    plan = plan or Plan()
    torch.compiler.reset()
    recorder = Recorder(plan)
    recording = Recording(model, torch.compile(model, backend=recorder), recorder, args, kwargs)
    recording.state = {name: clone(value) for name, value in recording._tensors()}
    with _switched(plan):
        try:
            recording.run(keep=True)
        except Exception as error:
            if is_our_own(error):
                raise
            raise Interrupted(*recorder.where, error) from error
    recorder.closed = True
    return recording


@contextmanager
def _switched(plan: Plan) -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(torch_private.switched("inductor_config", {**CONFIG, **dict(plan.config)}))
        stack.enter_context(torch_private.switched("aot_config", {"enable_autograd_cache": False}))
        yield


def is_our_own(error: BaseException) -> bool:
    """Whether graphprobe's own code raised it while it listened: that is no failure of the compiler."""
    while (
        inner := getattr(error, "inner_exception", None) or error.__cause__
    ) is not None:  # Dynamo wraps what it meets
        error = inner
    frames = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    return bool(frames) and Path(frames[-1]).is_relative_to(Path(__file__).parents[2])


def _same(value: Any) -> Any:
    return value
