"""`instrument`: a model that observes itself while it runs."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch.fx import GraphModule

from graphprobe import capturing, devices
from graphprobe.caches import register_caches
from graphprobe.errors import InputError, nearest
from graphprobe.records import Tap
from graphprobe.streaming import Stream, stream_to
from graphprobe.taps.rows import Sizes, bind
from graphprobe.taps.sources import Capture, Globs, GraphSource, ModuleSource

#: So many captures are remembered; beyond, the least recently used one is dropped. They share their weights.
_REMEMBERED = 16


def instrument(
    model: capturing.Model,
    *,
    keep: Globs = None,
    memory: str = "resident",
    device: str | torch.device | None = None,
    checksum: bool = False,
) -> Probe:
    """Return a probe: called like `model`, it returns the same and observes every operation on the way.

    `model` is an nn.Module, an ExportedProgram or a GraphModule; it is captured at the first call, and again for inputs
    of another shape, dtype or structure. `keep` is a glob, or several, of module paths ("*.mlp") and of values inside
    modules ("*.mlp/mul*") whose whole tensors are kept. With `memory` "stream" the model stays on the CPU, or in the
    files that ``load(..., mapped=True)`` left it in, and its weights come to `device` one by one, where the model runs.
    With `checksum` every row of the taps has a checksum of 32 bits, of the value's bits and of where they stand: it is
    the same on every device and for every layout in memory.
    Raises CaptureError where `model` is none of these, InputError where `device` does not fit.
    """
    stream = stream_to(device, memory)
    if stream is None and device is not None:
        raise InputError('device= says where weights are brought: it goes with memory="stream"')
    return Probe(model, keep=keep, stream=stream, checksum=checksum)


class Probe(torch.nn.Module):
    """A model with a tap on every operation; what it returns is bitwise what the captured graph returns.

    Gradients are off while it runs. After a call `taps`, `tensors`, `graph` and `distance` tell about that call.
    """

    def __init__(
        self, model: capturing.Model, *, keep: Globs = None, stream: Stream | None = None, checksum: bool = False
    ) -> None:
        super().__init__()
        self.model = model
        self.stream = stream  # what brings the weights, None where they are where the model runs
        self._keep, self._checksum = keep, checksum
        if isinstance(model, (GraphModule, torch.export.ExportedProgram)):
            self._source: GraphSource | ModuleSource = GraphSource(model, keep, stream, checksum)
        elif isinstance(model, torch.nn.Module):
            self._source = ModuleSource(model, keep, stream, checksum)
        else:
            capturing.capture(model)  # raises, and says what would be a model
        self._captures: OrderedDict[Hashable, Capture] = OrderedDict()
        self._last: tuple[Capture, Sizes] | None = None
        self._read: tuple[Capture, Sizes, dict[str, torch.Tensor], tuple[Tap, ...]] | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run on these inputs; capture first if inputs of this kind are new."""
        register_caches()
        given = (args, kwargs)
        if self.stream is not None:  # captured where the weights are, run where they are brought
            args, kwargs = _on(_home(self.model), given)
            given = _on(self.stream.device, given)
        key = self._source.signature(args, kwargs)
        capture = self._captures.pop(key, None)
        new = capture is None
        if capture is None:
            capture = self._source.capture(args, kwargs)
        sizes = bind(capture.graph, args, kwargs) if capture.table.is_dynamic else {}  # before caches grow in the run
        run = self._source.first_run if new else Capture.run
        result = run(capture, *given)
        self._captures[key] = capture  # now the youngest
        if len(self._captures) > _REMEMBERED:
            self._captures.popitem(last=False)
        self._last = (capture, sizes)
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

    def recorded(self, *args: Any, **kwargs: Any) -> Callable[..., Any]:
        """Record a call with these inputs as a CUDA graph; the callable that is returned takes others of their kind.

        It writes the same taps and is launched at once, which is what small batches need. What it returns, and kept
        tensors, are overwritten by its next call. Raises InputError without a CUDA device, and with streamed weights.
        """
        if self.stream is not None:
            raise InputError('a CUDA graph cannot wait for weights that come with memory="stream"')
        self(*args, **kwargs)
        return devices.recorded(self.graph, args, kwargs)

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

    def __deepcopy__(self, memo: dict[int, Any]) -> Probe:
        return Probe(copy.deepcopy(self.model, memo), keep=self._keep, stream=self.stream, checksum=self._checksum)

    def _called(self, what: str) -> tuple[Capture, Sizes]:
        if self._last is None:
            raise InputError(f"the probe has no {what} yet: call it first, probe(*args, **kwargs)")
        return self._last


def _home(model: capturing.Model) -> torch.device:
    """Return the device where a model's weights are."""
    if isinstance(model, torch.export.ExportedProgram):
        tensors = [*model.state_dict.values(), *model.constants.values()]
    else:
        tensors = [*model.parameters(), *model.buffers()]
    return next((t.device for t in tensors if isinstance(t, torch.Tensor)), torch.device("cpu"))


def _on(device: torch.device, given: tuple[tuple[Any, ...], dict[str, Any]]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    moved: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map_only(torch.Tensor, lambda t: t.to(device), given)
    return moved


def _same(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> bool:
    # as bits, for NaN is not equal to itself
    return all(torch.equal(before[name].view(torch.int64), after[name].view(torch.int64)) for name in after)


class _Kept(dict[str, torch.Tensor]):
    """A dictionary that suggests a name where one is missing."""

    def __missing__(self, name: str) -> torch.Tensor:
        raise KeyError(f"{name!r} was not kept by instrument(model, keep=...){nearest(name, self)}")
