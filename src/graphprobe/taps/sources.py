"""Where instrumented graphs come from: a module is captured for each kind of inputs, a given graph is what it is."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch.fx import GraphModule

from graphprobe import capturing
from graphprobe.errors import InputError
from graphprobe.streaming import Stream
from graphprobe.taps import eager, metadata
from graphprobe.taps.copies import copied
from graphprobe.taps.insertion import instrument_graph
from graphprobe.taps.rows import META, Table, bind

Globs = str | Sequence[str] | None


@dataclass(eq=False)
class Capture:
    """An instrumented graph, and how far it is from the model it was captured from."""

    graph: GraphModule
    distance: float | None = None

    @property
    def table(self) -> Table:
        """The rows of the graph."""
        table: Table = self.graph.meta[META]
        return table

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run once, with empty statistics and new memory for kept tensors."""
        for name in self.table.stats:
            self.graph.get_buffer(name).zero_()
        for name in set(self.table.kept.values()):  # somebody may hold the tensors of the last call
            with torch.inference_mode(False):
                setattr(self.graph, name, torch.empty_like(self.graph.get_buffer(name)))
        with torch.no_grad():
            return self.graph(*args, **kwargs)


class ModuleSource:
    """An nn.Module: captured anew where inputs, weights or modes differ."""

    def __init__(self, model: torch.nn.Module, keep: Globs, stream: Stream | None, checksum: bool = False) -> None:
        self._model = model
        self._keep = keep
        self._stream = stream
        self._checksum = checksum

    def signature(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hashable:
        """Return a key that is equal for calls that one capture serves."""
        modes = tuple(module.training for module in self._model.modules())
        autocast = tuple(
            torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None for kind in ("cpu", "cuda")
        )
        return (_call(args, kwargs), _weights(self._model), modes, autocast)

    def capture(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Capture:
        """Capture and instrument. Raises CaptureError, InputError."""
        with torch.inference_mode(False):
            gm = capturing.capture(self._model, args, kwargs)
            return Capture(instrument_graph(gm, keep=self._keep, stream=self._stream, checksum=self._checksum))

    def first_run(self, capture: Capture, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a new capture and note its distance from the model, unless that could not run where the weights are."""
        if self._stream is not None:
            return capture.run(args, kwargs)
        expected = eager.run_aside(self._model, args, kwargs)  # before, for the run may change inputs and buffers
        result = capture.run(args, kwargs)
        capture.distance = eager.distance(expected, result)
        return result


class GraphSource:
    """An ExportedProgram or a GraphModule: one capture serves all inputs, unless buffers or rows depend on shapes."""

    def __init__(
        self,
        model: GraphModule | torch.export.ExportedProgram,
        keep: Globs,
        stream: Stream | None,
        checksum: bool = False,
    ) -> None:
        self._model = model
        self._keep = keep
        self._stream = stream
        self._checksum = checksum
        self._program: GraphModule | None = None  # an ExportedProgram, unlifted
        self._checked: set[Hashable] = set()
        self._complete: dict[str, bool] = {}  # code -> whether its graph tells all shapes

    def signature(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hashable:
        """Return a key that is equal for calls that one capture serves. Raises InputError where they do not fit."""
        gm = self._graph()
        state = (_weights(gm), gm.code)
        call = _call(args, kwargs)
        if (call, state) not in self._checked:
            metadata.check(gm, args, kwargs)
            self._checked.add((call, state))
        if gm.code not in self._complete:  # asks every node: too slow for every call
            self._complete[gm.code] = metadata.is_complete(gm)
        return state if self._keep is None and self._complete[gm.code] else (call, state)

    def capture(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Capture:
        """Instrument a copy. Raises InputError."""
        with torch.inference_mode(False):
            gm = self._graph()
            if not metadata.is_complete(gm):
                gm = copied(gm)
                metadata.fill(gm, args, kwargs)
            sizes = bind(gm, args, kwargs)
            return Capture(
                instrument_graph(gm, keep=self._keep, sizes=sizes, stream=self._stream, checksum=self._checksum)
            )

    def first_run(self, capture: Capture, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a new capture; there is no model to compare it with. Raises InputError where inputs do not fit."""
        try:
            return capture.run(args, kwargs)
        except Exception as error:  # another dtype may do, so it is no error until it fails
            reason = metadata.misfit(self._graph(), args, kwargs)
            if not reason:
                raise
            said = (str(error).splitlines() or [""])[0]
            raise InputError(f"{reason}, and it cannot be run: {type(error).__name__}: {said}") from error

    def _graph(self) -> GraphModule:
        if isinstance(self._model, GraphModule):
            return capturing.capture(self._model)
        if self._program is None:
            self._program = capturing.capture(self._model)
        return self._program


def _call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hashable:
    leaves, spec = pytree.tree_flatten((args, dict(sorted(kwargs.items()))))
    return (str(spec), *(_kind(leaf) for leaf in leaves))


def _kind(leaf: Any) -> Hashable:
    if isinstance(leaf, torch.Tensor):
        return (tuple(leaf.shape), leaf.dtype, leaf.device)
    return (type(leaf), leaf if isinstance(leaf, Hashable) else id(leaf))


def _weights(model: torch.nn.Module) -> Hashable:
    # a capture holds its weights, so that an id is not given to another one
    return tuple((id(parameter), parameter.dtype, parameter.device) for parameter in model.parameters())
