"""How the bytes of one weight come to a device: from host memory or from its file, to a GPU through locked pages."""

from __future__ import annotations

import os
import queue
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from graphprobe.fxfile.archive import buffer
from graphprobe.fxfile.mapping import place_of

Tensor = torch.Tensor

#: Page-locked memory through which bytes go to a GPU, and the pieces in which several threads fill it.
_STAGES, _STAGE, _PIECE = 4, 64 << 20, 8 << 20
_READERS = min(16, os.cpu_count() or 1)


class Carrier:
    """Copies weights within the host's memory, or reads them from their files."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._lock = threading.Lock()  # several weights are brought at once
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
        with self._lock:
            if self._readers is None:
                self._readers = ThreadPoolExecutor(_READERS, "graphprobe-read")
        for _ in self._readers.map(fill, pieces):
            pass

    def _open(self, path: str) -> int:
        with self._lock:
            if path not in self._files:
                self._files[path] = descriptor = os.open(path, os.O_RDONLY)
                weakref.finalize(self, os.close, descriptor)
            return self._files[path]


class GpuCarrier(Carrier):
    """Copies weights to a GPU through page-locked memory, on a stream of its own."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._stages: queue.SimpleQueue[tuple[Tensor, Any]] | None = None

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
        stages = self._opened()
        for start in range(0, target.numel(), _STAGE):
            stage, free = stages.get()
            try:
                free.synchronize()
                part = target[start : start + _STAGE]
                filled = stage[: part.numel()]
                self._read(weight, start, buffer(filled))
                part.copy_(filled, non_blocking=True)
                free.record(self._stream)
            finally:
                stages.put((stage, free))

    def _opened(self) -> queue.SimpleQueue[tuple[Tensor, Any]]:
        with self._lock:
            if self._stages is None:
                self._stages = queue.SimpleQueue()
                for _ in range(_STAGES):
                    self._stages.put((torch.empty(_STAGE, dtype=torch.uint8, pin_memory=True), _event()))
            return self._stages

    def hand_over(self, there: Tensor, ready: Any) -> None:
        current = torch.cuda.current_stream(self.device)
        current.wait_event(ready)
        there.record_stream(current)

    def mark(self) -> Any:
        event = _event()
        event.record(torch.cuda.current_stream(self.device))
        return event


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]


def _is_dense(value: Tensor) -> bool:
    reach = 1 + sum((size - 1) * step for size, step in zip(value.shape, value.stride(), strict=True))
    return value.layout is torch.strided and not value.is_conj() and reach == value.numel() > 0


def _flat(value: Tensor) -> Tensor:
    return value.detach().as_strided((value.numel(),), (1,))


def _read_at(descriptor: int, target: memoryview, offset: int) -> None:
    done = 0
    while done < len(target):
        count = os.preadv(descriptor, [target[done:]], offset + done)
        if not count:
            raise OSError("a file with weights has become shorter while it was read")
        done += count
