"""Files mapped into memory: their tensors are there at once, and are read when somebody looks at them.

A mapped tensor knows its place in the file, so that who wants all of it can read it from there instead, without leaving
its pages in the process (`streaming`).
"""

from __future__ import annotations

import json
import os
import struct
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from graphprobe.errors import FxFileError

_PLACE = "_graphprobe_place"
_MAX_HEADER = 100 << 20  # what the safetensors library allows
#: dtypes as safetensors files name them
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


class MappedFile:
    """One file; its mapping lasts as long as a tensor of it. Use `map_file`, which maps no file twice."""

    def __init__(self, path: str) -> None:
        self.path = path
        size = os.path.getsize(path)
        # private: what is written to a tensor stays in this process
        self.bytes = torch.from_file(path, shared=False, size=size, dtype=torch.uint8)

    def tensor(self, begin: int, end: int) -> torch.Tensor:
        """Return the bytes [begin, end) of the file as a flat uint8 tensor that knows its place."""
        return at(self.bytes[begin:end], Place(self, begin))


class Place(NamedTuple):
    """Where the first element of a tensor lies."""

    file: MappedFile
    offset: int  # in bytes


_files: weakref.WeakValueDictionary[tuple[str, int, int], MappedFile] = weakref.WeakValueDictionary()


def map_file(path: str) -> MappedFile:
    """Map a file, once for all who ask for it while it lasts. Raises FxFileError."""
    try:
        found = os.stat(path)
        key = (os.path.realpath(path), found.st_mtime_ns, found.st_size)
        file = _files.get(key)
        if file is None:
            file = _files[key] = MappedFile(path)
        return file
    except (OSError, RuntimeError) as error:
        raise FxFileError(f"cannot map {path}: {error}") from error


def at(tensor: torch.Tensor, place: Place) -> torch.Tensor:
    """Note on a tensor where it lies."""
    setattr(tensor, _PLACE, place)
    return tensor


def view(place: Place, dtype: torch.dtype, shape: Sequence[int], stride: Sequence[int]) -> torch.Tensor:
    """Return a tensor that looks at a mapped file from a place on, which must be a multiple of the dtype's size."""
    empty = torch.empty(0, dtype=dtype)
    first = place.offset // dtype.itemsize
    return at(empty.set_(place.file.bytes.untyped_storage(), first, tuple(shape), tuple(stride)), place)


def tensors(path: str) -> dict[str, torch.Tensor]:
    """Map the tensors of a safetensors file as parameters; such as lie awkwardly in it are read. Raises FxFileError."""
    file = map_file(path)
    found: dict[str, torch.Tensor] = {}
    for key, entry in entries(path).items():
        if entry.dtype is None:
            raise FxFileError(f"{path} holds {key!r} in a dtype that is not known here")
        if entry.begin % entry.dtype.itemsize:
            flat = file.bytes[entry.begin : entry.end].clone().view(entry.dtype)
            found[key] = torch.nn.Parameter(flat.view(entry.shape), False)
            continue
        place = Place(file, entry.begin)
        dense = torch.empty(entry.shape, device="meta").stride()
        found[key] = at(torch.nn.Parameter(view(place, entry.dtype, entry.shape, dense), False), place)
    return found


def place_of(tensor: torch.Tensor) -> Place | None:
    """Return where a tensor lies in a mapped file; None for one that is in memory of its own."""
    found: Place | None = getattr(tensor, _PLACE, None)
    return found


class Entry(NamedTuple):
    """One tensor of a safetensors file."""

    dtype: torch.dtype | None  # None: one that is not known here
    shape: tuple[int, ...]
    begin: int  # in bytes, from the start of the file
    end: int


def entries(path: str) -> dict[str, Entry]:
    """Read where the tensors of a safetensors file lie. Raises FxFileError."""
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            length = struct.unpack("<Q", file.read(8))[0]
            if length > min(size - 8, _MAX_HEADER):
                raise ValueError("its header is longer than it")
            header: dict[str, Any] = json.loads(file.read(length))
        header.pop("__metadata__", None)
        return {key: _entry(row, 8 + length, size) for key, row in header.items()}
    except FxFileError:
        raise
    except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
        raise FxFileError(f"{path} is not a readable safetensors file: {error}") from error


def _entry(row: dict[str, Any], base: int, size: int) -> Entry:
    begin, end = (base + int(offset) for offset in row["data_offsets"])
    shape = tuple(int(d) for d in row["shape"])
    dtype = _DTYPES.get(row["dtype"])
    count = 1
    for d in shape:
        count *= d
    if not base <= begin <= end <= size or (dtype is not None and end - begin != count * dtype.itemsize):
        raise ValueError("a tensor lies outside of it")
    return Entry(dtype, shape, begin, end)
