"""`instrument`: a model that observes itself while it runs."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch.fx import GraphModule

from graphprobe import capturing
from graphprobe.errors import InputError, nearest
from graphprobe.records import Tap
from graphprobe.taps import eager, metadata
from graphprobe.taps.copies import copied
from graphprobe.taps.insertion import instrument_graph
from graphprobe.taps.rows import META, Sizes, Table, bind

#: So many captures are remembered; beyond, the least recently used one is dropped. They share their weights.
_REMEMBERED = 16


def instrument(model: capturing.Model, *, keep: str | Sequence[str] | None = None) -> Probe:
    """Return a probe: called like `model`, it returns the same and observes every operation on the way.

    `model` is an nn.Module, an ExportedProgram or a GraphModule; it is captured at the first call, and again for inputs
    of another shape, dtype or structure. `keep` is a glob, or several, of module paths ("*.mlp") and of values inside
    modules ("*.mlp/mul*") whose whole tensors are kept. Raises CaptureError where `model` is none of these.
    """
    return Probe(model, keep=keep)


class Probe(torch.nn.Module):
    """A model with a tap on every operation; what it returns is bitwise what the captured graph returns.

    Gradients are off while it runs. After a call `taps`, `tensors`, `graph` and `distance` tell about that call.
    """

    def __init__(self, model: capturing.Model, *, keep: str | Sequence[str] | None = None) -> None:
        super().__init__()
        self.model = model
        self._source = _Source(model, keep)
        self._captures: OrderedDict[Hashable, _Capture] = OrderedDict()
        self._last: tuple[_Capture, Sizes] | None = None
        self._read: tuple[_Capture, Sizes, dict[str, torch.Tensor], tuple[Tap, ...]] | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run on these inputs; capture first if inputs of this kind are new."""
        capturing.register_caches()
        key = self._source.signature(args, kwargs)
        capture = self._captures.get(key)
        if capture is None:
            capture = self._source.capture(args, kwargs)
            result = self._first_run(capture, args, kwargs)
            self._captures[key] = capture
            if len(self._captures) > _REMEMBERED:
                self._captures.popitem(last=False)
        else:
            self._captures.move_to_end(key)
            result = capture.run(args, kwargs)
        self._last = (capture, bind(capture.graph, args, kwargs))
        return result

    def _first_run(self, capture: _Capture, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not isinstance(self.model, torch.nn.Module) or isinstance(self.model, GraphModule):
            return capture.run(args, kwargs)
        expected = eager.run_aside(self.model, args, kwargs)  # first: the run may change inputs and buffers
        result = capture.run(args, kwargs)
        capture.distance = eager.distance(expected, result)
        return result

    @property
    def taps(self) -> tuple[Tap, ...]:
        """The statistics of the last call, one row per operation that makes values; views are listed as derived.

        Numbers are of the finite elements (complex ones by magnitude, bool as 0 and 1); NaN and infinities are counted.
        Reading synchronises with the device once. Raises InputError before the first call.
        """
        capture, sizes = self._called("taps")
        snapshot = capture.table.snapshot(capture.graph)
        if self._read is None or self._read[:2] != (capture, sizes) or not _same(self._read[2], snapshot):
            self._read = (capture, sizes, snapshot, capture.table.taps(snapshot, sizes))
        return self._read[3]

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The kept tensors of the last call: "model.layers.3.mlp" is what that module returned.

        Values inside modules are "module.path/node_name"; the next call makes new ones. Empty without `keep`. Raises
        InputError before the first call.
        """
        capture, _ = self._called("tensors")
        return _Kept({name: capture.graph.get_buffer(buffer) for name, buffer in capture.table.kept.items()})

    @property
    def graph(self) -> GraphModule:
        """The instrumented graph of the last call, to be run, compiled, exported or drawn; it writes the same taps."""
        return self._called("graph")[0].graph

    @property
    def distance(self) -> float | None:
        """Relative L2 distance of the captured graph's output from the model's own, measured once at capture.

        Almost always 0; None for an ExportedProgram or a GraphModule, which has no other form to compare with.
        """
        return self._called("distance")[0].distance

    def __str__(self) -> str:
        if self._last is None:
            return f"Probe of {type(self.model).__name__}, not called yet"
        from graphprobe import render

        return render.taps_text(self.taps)

    def _called(self, what: str) -> tuple[_Capture, Sizes]:
        if self._last is None:
            raise InputError(f"the probe has no {what} yet: call it first, probe(*args, **kwargs)")
        return self._last


@dataclass(eq=False)
class _Capture:
    """An instrumented graph for one kind of inputs."""

    graph: GraphModule
    names: tuple[str, ...]  # keyword arguments in the order of the capture
    distance: float | None = None

    @property
    def table(self) -> Table:
        table: Table = self.graph.meta[META]
        return table

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        for name in self.table.stats:
            self.graph.get_buffer(name).zero_()
        for name in set(self.table.kept.values()):  # new memory: somebody may hold the tensors of the last call
            with torch.inference_mode(False):
                setattr(self.graph, name, torch.empty_like(self.graph.get_buffer(name)))
        with torch.no_grad():
            return self.graph(*args, **{name: kwargs[name] for name in self.names})


class _Source:
    """What is to be instrumented, and when two calls can share a capture."""

    def __init__(self, model: capturing.Model, keep: str | Sequence[str] | None) -> None:
        self.model = model
        self.keep = keep
        self.graph: GraphModule | None = None  # of an ExportedProgram or GraphModule: the same for all inputs
        if not isinstance(model, (torch.nn.Module, torch.export.ExportedProgram)):
            capturing.capture(model)  # raises and says what would be one

    def capture(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Capture:
        with torch.inference_mode(False):
            gm = capturing.capture(self.model, args, kwargs) if self.graph is None else self.graph
            if isinstance(self.model, torch.export.ExportedProgram):
                self.graph = gm
            if not metadata.is_complete(gm):
                gm = copied(gm)
                metadata.fill(gm, args, kwargs)
            return _Capture(instrument_graph(gm, keep=self.keep, sizes=bind(gm, args, kwargs)), tuple(kwargs))

    def signature(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hashable:
        """Return a key that is equal for calls that one capture serves."""
        leaves, spec = pytree.tree_flatten((args, dict(sorted(kwargs.items()))))
        call = (str(spec), *(_kind(leaf) for leaf in leaves))
        if isinstance(self.model, torch.export.ExportedProgram):
            return call
        weights = tuple((id(p), p.dtype, p.device) for p in self.model.parameters())
        if isinstance(self.model, GraphModule):
            return (call, weights, self.model.code)
        modes = tuple(module.training for module in self.model.modules())
        autocast = tuple(
            torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None for kind in ("cpu", "cuda")
        )
        return (call, weights, modes, autocast)


def _kind(leaf: Any) -> Hashable:
    if isinstance(leaf, torch.Tensor):
        return (tuple(leaf.shape), leaf.dtype, leaf.device)
    return (type(leaf), leaf if isinstance(leaf, Hashable) else id(leaf))


def _same(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> bool:
    # as bits, for NaN is not equal to itself
    return all(torch.equal(before[name].view(torch.int64), after[name].view(torch.int64)) for name in after)


class _Kept(dict[str, torch.Tensor]):
    """A dictionary that suggests a name where one is missing."""

    def __missing__(self, name: str) -> torch.Tensor:
        raise KeyError(f"{name!r} was not kept{nearest(name, self)}; instrument(model, keep=...) says what is")
