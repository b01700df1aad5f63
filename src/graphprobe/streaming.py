"""Weights beyond the device's memory: they stay in files or in host memory and come when an operation needs them.

A `Stream` brings one weight at a time to a device, ahead of its use and in the order of use, and keeps none: what it
hands out dies with its last user. So a graph runs in the memory of its values, of the weights in use, and of `ahead`
bytes of those that come next. Weights in mapped files are read from there and leave nothing in the process.
"""

from __future__ import annotations

import collections
import os
import threading
import weakref
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, Node

from graphprobe.errors import InputError
from graphprobe.fxfile.archive import buffer
from graphprobe.fxfile.mapping import place_of

Tensor = torch.Tensor

#: Bytes of weights that are brought before they are asked for; also how much may come between two uses of one weight
#: before it is brought again.
AHEAD = 1 << 30
#: What is smaller stays on the device once it is there.
_SMALL = 1 << 16
#: Page-locked memory through which bytes go to a GPU, and the pieces in which several threads fill it.
_STAGES, _STAGE, _PIECE = 4, 64 << 20, 4 << 20
_READERS = min(16, os.cpu_count() or 1)


def stream_to(device: torch.device | str | None, memory: str) -> Stream | None:
    """Return the stream for memory="stream" (to the GPU, if there is one and no device is named), None for "resident".

    Raises InputError for other words, and where there is no such device.
    """
    if memory not in ("resident", "stream"):
        raise InputError(f"memory={memory!r}: it must be 'resident' or 'stream'")
    if memory == "resident":
        return None
    found = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if found.type not in ("cpu", "cuda") or (found.type == "cuda" and not torch.cuda.is_available()):
        raise InputError(
            f"memory='stream' brings weights to the CPU or to a CUDA device that torch sees, not to {found}"
        )
    return Stream(found)


class Stream:
    """Brings weights to one device, and counts the bytes that came and the most that were there at once."""

    def __init__(self, device: torch.device | str, ahead: int = AHEAD) -> None:
        self.device = torch.device(device)
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.ahead = ahead
        self.bytes = self.present = self.peak = 0
        self._lock = threading.Lock()
        # a copy, and its weight: as long as that is held, no other can have its key
        self._alive: dict[Key, tuple[weakref.ref[Tensor], Tensor]] = {}
        self._kept: dict[Key, tuple[Tensor, Tensor]] = {}
        self._carrier: _Carrier = _GpuCarrier(self.device) if self.device.type == "cuda" else _Carrier(self.device)
        self._worker = ThreadPoolExecutor(1, "graphprobe-stream")
        weakref.finalize(self, self._worker.shutdown, wait=False)

    def here(self, value: Any) -> Any:
        """Return a weight on the device, at once; what is no tensor or is there already stays what it is."""
        if not isinstance(value, Tensor) or not self._comes(value):
            return value
        if value.device.type == "cpu" and self.device.type == "cpu":
            return value  # reading a mapped tensor where it lies is as good
        if _size(value) > _SMALL:
            return self.receive(self.order(value, None))
        key = key_of(value)
        if key not in self._kept:
            self._kept[key] = (value.detach().to(self.device), value)
        return self._kept[key][0]

    def feed(self, weights: Sequence[Tensor]) -> Feed:
        """Return what hands these weights out, in this order, and orders them ahead."""
        return Feed(self, list(weights))

    def reader(self, nodes: Sequence[Node], held: Callable[[Node], Any]) -> Callable[[Node], Any]:
        """Return what reads a weight on the device; `nodes` read them in this order, from where `held` says."""
        values = {n: held(n) for n in nodes}
        large = [n for n, v in values.items() if isinstance(v, Tensor) and self._comes(v) and _size(v) > _SMALL]
        feed, index = self.feed([values[n] for n in large]), {n: i for i, n in enumerate(large)}

        def read(node: Node) -> Any:
            return feed.take(values[node], index[node]) if node in index else self.here(held(node))

        return read

    def insert(
        self, root: torch.nn.Module, graph: Graph, reads: Collection[Node], written: Collection[Node] = ()
    ) -> None:
        """Let a graph over `root` fetch weights just before they are used; `root` gets copies of small ones.

        `reads` are the nodes that read them; those in `written` are written to, too: they are brought once and stay.
        """
        values = {n: _fetch(root, str(n.target)) for n in reads}
        large = {}
        for node, value in values.items():
            if not isinstance(value, Tensor) or not self._comes(value):
                continue
            if node in written or _size(value) <= _SMALL:
                if self.device.type != "cpu":
                    node.target = _resident(root, value.to(self.device) if node in written else self.here(value))
            else:
                large[node] = value
        _insert_fetches(graph, large, self)

    def _comes(self, value: Tensor) -> bool:
        """Whether a weight is brought: from host memory to another device, to the CPU only from a file."""
        if value.device.type != "cpu":
            return False
        return self.device.type != "cpu" or (place_of(value) is not None and _size(value) > _SMALL)

    # --- one weight ---------------------------------------------------------------------------------------------

    def order(self, weight: Tensor, since: torch.cuda.Event | None) -> Ticket:
        """Begin to bring a weight, not before the device has reached `since`."""
        key = key_of(weight)
        alive = self._alive.get(key)
        there = None if alive is None else alive[0]()
        coming = None if there is not None else self._worker.submit(self._carrier.bring, weight, since)
        return Ticket(key, weight, there, coming)

    def receive(self, ticket: Ticket) -> Tensor:
        """Return what was ordered; work of the current stream waits until it is there."""
        if ticket.there is not None:
            return ticket.there
        assert ticket.coming is not None
        there, ready = ticket.coming.result()
        self._carrier.hand_over(there, ready)
        with self._lock:
            self._alive[ticket.key] = (weakref.ref(there), ticket.weight)
            self.bytes += ticket.size
            self.present += ticket.size
            self.peak = max(self.peak, self.present)
        weakref.finalize(there, self._gone, ticket.key, ticket.size)
        return there

    def _gone(self, key: Key, size: int) -> None:
        with self._lock:
            self.present -= size
            alive = self._alive.get(key)
            if alive is not None and alive[0]() is None:
                del self._alive[key]


Key = tuple[int, torch.dtype, tuple[int, ...], tuple[int, ...]]


@dataclass
class Ticket:
    """A weight that is here, or on its way."""

    key: Key
    weight: Tensor
    there: Tensor | None
    coming: Future[tuple[Tensor, Any]] | None

    @property
    def size(self) -> int:
        """Its bytes."""
        return _size(self.weight)


@dataclass
class Feed:
    """The weights of one run in the order of their use."""

    stream: Stream
    weights: list[Tensor]
    _ordered: collections.OrderedDict[int, Ticket] = field(default_factory=collections.OrderedDict)
    _bytes: int = 0
    _next: int = 0

    def take(self, weight: Tensor, index: int) -> Tensor:
        """Return `weight`, the `index`-th of the order, on the device; those that follow are on their way then."""
        if index != self._next:  # a run that did not come to its end, or another order
            self._ordered.clear()
            self._bytes = 0
        self._next = (index + 1) % len(self.weights)
        ticket = self._ordered.pop(index, None)
        if ticket is None or ticket.key != key_of(weight):
            ticket = self.stream.order(weight, None)
        else:
            self._bytes -= ticket.size
        there = self.stream.receive(ticket)
        since = self.stream._carrier.mark()
        for following in range(max(self._ordered, default=index) + 1, len(self.weights)):
            if self._bytes + _size(self.weights[following]) > self.stream.ahead and self._ordered:
                break
            ahead = self._ordered[following] = self.stream.order(self.weights[following], since)
            self._bytes += ahead.size
        return there


class _Carrier:
    """Copies weights within the host's memory, or reads them from their files."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._readers: ThreadPoolExecutor | None = None
        self._files: dict[str, int] = {}

    def bring(self, weight: Tensor, since: Any) -> tuple[Tensor, Any]:
        """Return a copy on the device, and what to wait for before it is read."""
        if not _is_dense(weight):
            return weight.detach().clone(), None
        there = torch.empty_strided(weight.shape, weight.stride(), dtype=weight.dtype)
        self._read(weight, 0, buffer(_flat(there)))
        return there, None

    def hand_over(self, there: Tensor, ready: Any) -> None:
        """Make the copy safe to use for work that is launched from now on."""

    def mark(self) -> Any:
        """Return the point that has been reached now."""
        return None

    def _read(self, weight: Tensor, start: int, target: memoryview) -> None:
        """Fill `target` with the bytes of a dense weight from `start` on, in several threads."""
        pieces = range(0, len(target), _PIECE)
        place = place_of(weight)
        if place is None or not hasattr(os, "preadv"):  # Windows has none: there the mapped pages are copied
            source = torch.frombuffer(buffer(_flat(weight))[start : start + len(target)], dtype=torch.uint8)
            copy = torch.frombuffer(target, dtype=torch.uint8)

            def fill(piece: int) -> None:
                copy[piece : piece + _PIECE].copy_(source[piece : piece + _PIECE])
        else:
            descriptor, offset = self._open(place.file.path), place.offset + start

            def fill(piece: int) -> None:
                _read_at(descriptor, target[piece : piece + _PIECE], offset + piece)

        if len(pieces) == 1:
            fill(0)
            return
        if self._readers is None:
            self._readers = ThreadPoolExecutor(_READERS, "graphprobe-read")
        for _ in self._readers.map(fill, pieces):
            pass

    def _open(self, path: str) -> int:
        if path not in self._files:
            self._files[path] = descriptor = os.open(path, os.O_RDONLY)
            weakref.finalize(self, os.close, descriptor)
        return self._files[path]


class _GpuCarrier(_Carrier):
    """Copies weights to a GPU through page-locked memory, on a stream of its own."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._stages: list[tuple[Tensor, Any]] = []
        self._turn = 0

    def bring(self, weight: Tensor, since: Any) -> tuple[Tensor, Any]:
        if since is not None:  # else memory would be taken for all weights while the device is still at the first
            since.synchronize()
        ready = _event()
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            if not _is_dense(weight):
                there = weight.detach().to(self.device)
            else:
                there = torch.empty_strided(weight.shape, weight.stride(), dtype=weight.dtype, device=self.device)
                self._copy(weight, _flat(there).view(torch.uint8))
            ready.record(self._stream)
        return there, ready

    def _copy(self, weight: Tensor, target: Tensor) -> None:
        while len(self._stages) < _STAGES:
            self._stages.append((torch.empty(_STAGE, dtype=torch.uint8, pin_memory=True), _event()))
        for start in range(0, target.numel(), _STAGE):
            stage, free = self._stages[self._turn]
            self._turn = (self._turn + 1) % _STAGES
            free.synchronize()
            part = target[start : start + _STAGE]
            filled = stage[: part.numel()]
            self._read(weight, start, buffer(filled))
            part.copy_(filled, non_blocking=True)
            free.record(self._stream)

    def hand_over(self, there: Tensor, ready: Any) -> None:
        current = torch.cuda.current_stream(self.device)
        current.wait_event(ready)
        there.record_stream(current)

    def mark(self) -> Any:
        event = _event()
        event.record(torch.cuda.current_stream(self.device))
        return event


def _insert_fetches(graph: Graph, weights: dict[Node, Tensor], stream: Stream) -> None:
    """Put a call before the first user of each weight; before a later one, too, where much else comes in between."""
    order = {node: place for place, node in enumerate(graph.nodes)}
    uses = sorted((order[user], order[node], user, node) for node in weights for user in node.users)
    groups = _groups([(key_of(weights[node]), _size(weights[node])) for _, _, _, node in uses], stream.ahead)
    feed = stream.feed([weights[uses[group[0]][3]] for group in groups])
    for index, group in enumerate(groups):
        _, _, first, read = uses[group[0]]
        with graph.inserting_before(first):
            made = graph.call_function(feed.take, (read, index))
        made.meta.update({key: read.meta[key] for key in ("val",) if key in read.meta})
        for use in group:
            _, _, user, node = uses[use]
            user.replace_input_with(node, made)


def _groups(uses: Sequence[tuple[Key, int]], most: int) -> list[list[int]]:
    """Group uses of one weight unless more than `most` bytes of others come in between; given as (weight, bytes)."""
    groups: list[list[int]] = []
    latest: dict[Key, list[int]] = {}  # the last used one at the end
    sizes: dict[Key, int] = {}
    for use, (key, size) in enumerate(uses):
        group = latest.pop(key, None)
        last, between = (group[-1] if group else -1), 0
        for other in reversed(latest) if group is not None else ():
            if latest[other][-1] < last:
                break
            between += sizes[other]
            if between > most:
                group = None
                break
        if group is None:
            group = []
            groups.append(group)
        group.append(use)
        latest[key], sizes[key] = group, size
    return groups


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]


def key_of(weight: Tensor) -> Key:
    """Return what two names of one piece of memory have in common."""
    return (weight.data_ptr(), weight.dtype, tuple(weight.shape), weight.stride())


def _size(value: Tensor) -> int:
    return value.numel() * value.element_size()


def _is_dense(value: Tensor) -> bool:
    reach = 1 + sum((size - 1) * step for size, step in zip(value.shape, value.stride(), strict=True))
    return value.layout is torch.strided and not value.is_conj() and reach == value.numel() > 0


def _flat(value: Tensor) -> Tensor:
    return value.detach().as_strided((value.numel(),), (1,))


def _fetch(root: Any, target: str) -> Any:
    for part in target.split("."):
        root = getattr(root, part)
    return root


def _resident(root: torch.nn.Module, value: Tensor) -> str:
    name = f"_graphprobe_here_{len(root._buffers)}"
    root.register_buffer(name, value.detach(), persistent=False)
    return name


def _read_at(descriptor: int, target: memoryview, offset: int) -> None:
    done = 0
    while done < len(target):
        count = os.preadv(descriptor, [target[done:]], offset + done)
        if not count:
            raise OSError("a file with weights has become shorter while it was read")
        done += count
