"""Weights beyond the device's memory: they stay in files or in host memory and come when an operation needs them.

A `Stream` brings one weight at a time to a device, ahead of its use and in the order of use, and keeps none: what it
hands out dies with its last user. So a graph runs in the memory of its values, of the weights in use, and of `ahead`
bytes of those that come next. Weights in mapped files are read from there and leave nothing in the process.
"""

from __future__ import annotations

import collections
import threading
import weakref
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, Node

from graphprobe.carrying import Carrier, GpuCarrier
from graphprobe.errors import InputError
from graphprobe.fxfile.mapping import place_of

Tensor = torch.Tensor

#: Bytes of weights that are brought before they are asked for; also how much may come between two uses of one weight
#: before it is brought again.
AHEAD = 1 << 30
#: Weights that are brought at once: while the last bytes of one are awaited, the next is read.
_WORKERS = 3
#: What is smaller stays on the device once it is there.
_SMALL = 1 << 16


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
        self._carrier: Carrier = GpuCarrier(self.device) if self.device.type == "cuda" else Carrier(self.device)
        self._worker = ThreadPoolExecutor(_WORKERS, "graphprobe-stream")
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


def key_of(weight: Tensor) -> Key:
    """Return what two names of one piece of memory have in common."""
    return (weight.data_ptr(), weight.dtype, tuple(weight.shape), weight.stride())


def _size(value: Tensor) -> int:
    return value.numel() * value.element_size()


def _fetch(root: Any, target: str) -> Any:
    for part in target.split("."):
        root = getattr(root, part)
    return root


def _resident(root: torch.nn.Module, value: Tensor) -> str:
    name = f"_graphprobe_here_{len(root._buffers)}"
    root.register_buffer(name, value.detach(), persistent=False)
    return name
