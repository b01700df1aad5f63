"""Tensors of a loaded ``.fx`` file: contents are read, storages are made of them, and tensors look into those."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch

from graphprobe.errors import FxFileError
from graphprobe.fxfile import mapping
from graphprobe.fxfile.archive import Archive, Damage
from graphprobe.fxfile.shapes import dtype
from graphprobe.fxfile.weights import digest, extent, open_weights

_MOST_COPIES = 256  # storages of equal content that a file may ask for, as a multiple of its own size
_ALLOWANCE = 1 << 30
_MAPPED = 1 << 16  # contents of fewer bytes are read at once


class TensorReader:
    """Rebuilds tensors by number; each storage is read at most once."""

    def __init__(
        self,
        archive: Archive,
        graph: dict[str, Any],
        device: Callable[[str], torch.device],
        weights_from: Sequence[str],
    ) -> None:
        self._archive, self._device, self._weights_from = archive, device, weights_from
        self._tensors, self._storages, self._contents, self._files = (
            _rows(graph, key) for key in ("tensors", "storages", "contents", "files")
        )
        self._built: dict[int, torch.Tensor] = {}
        self._flats: dict[int, torch.Tensor] = {}
        self._open: dict[str, Any] = {}
        self._entries: dict[str, dict[str, mapping.Entry]] = {}

    def read(self, wanted: Sequence[int], mapped: Collection[int] = ()) -> dict[int, torch.Tensor | None]:
        """Return the tensors of these numbers; None for those whose values the file does not hold.

        Large ones of those in `mapped` are mapped on the CPU: read when they are looked at, their digests unchecked.
        """
        rows = {index: _pick(self._tensors, index, "tensor") for index in wanted}
        storages = {row["storage"] for row in rows.values() if row["storage"] is not None}
        alone = {row["storage"] for index, row in rows.items() if index not in mapped}
        self._make_storages(sorted(storages), storages - alone if mapped else set())
        return {index: self._view(index, row) for index, row in rows.items()}

    def description(self, index: int) -> torch.Tensor:
        """Return the tensor without values: on the meta device."""
        row = _pick(self._tensors, index, "tensor")
        return torch.empty_strided(row["shape"], row["stride"], dtype=dtype(row["dtype"]), device="meta")

    def _view(self, index: int, row: dict[str, Any]) -> torch.Tensor | None:
        if row["storage"] is None:
            return None
        if index not in self._built:
            flat, kind = self._flats[row["storage"]], dtype(row["dtype"])
            shape, stride, offset = row["shape"], row["stride"], row["offset"]
            sizes = [*shape, *stride, offset]
            if len(shape) != len(stride) or not all(type(n) is int and n >= 0 for n in sizes):
                raise Damage(f"tensor {index} has an impossible shape")
            if (offset + extent(shape, stride)) * kind.itemsize > flat.numel():
                raise Damage(f"tensor {index} reaches beyond its memory")
            place = mapping.place_of(flat)
            if place is not None:
                first = mapping.Place(place.file, place.offset + offset * kind.itemsize)
                self._built[index] = mapping.view(first, kind, shape, stride)
                return self._built[index]
            device = self._device(row["device"])
            moved = flat.to(device)
            self._flats[row["storage"]] = moved
            empty = torch.empty(0, dtype=kind, device=device)
            self._built[index] = empty.set_(moved.untyped_storage(), offset, shape, stride)
        return self._built[index]

    def _make_storages(self, numbers: list[int], mapped: set[int]) -> None:
        contents = {number: _pick(self._storages, number, "storage") for number in numbers}
        rows = {content: _pick(self._contents, content, "content") for content in set(contents.values())}
        for number in sorted(mapped):
            found = self._map(rows[contents[number]], self._dtypes_of(number))
            if found is not None:
                self._flats[number] = found
                del contents[number]
        rows = {content: rows[content] for content in contents.values()}
        total = sum(rows[content]["bytes"] for content in contents.values() if "file" not in rows[content])
        if total > _MOST_COPIES * self._archive.size + _ALLOWANCE:
            raise Damage(f"its tensors claim {total:,} bytes")
        read = self._read({row["key"]: row for row in rows.values() if "file" not in row})
        used: set[int] = set()
        for number, content in contents.items():
            row = rows[content]
            flat = read[row["key"]] if "file" not in row else self._fetch(row)
            if flat.numel() != row["bytes"]:
                raise Damage(f"the tensor {row['key']!r} has {flat.numel()} bytes instead of {row['bytes']}")
            self._flats[number] = flat.clone() if content in used and "file" not in row else flat
            used.add(content)

    def _dtypes_of(self, storage: int) -> set[torch.dtype]:
        return {dtype(row["dtype"]) for row in self._tensors if row["storage"] == storage}

    def _map(self, row: dict[str, Any], kinds: set[torch.dtype]) -> torch.Tensor | None:
        """Map the bytes of a content; None where they are few, of another dtype in the file, or not aligned in it."""
        if row["bytes"] < _MAPPED:
            return None
        if "file" not in row:
            path = self._archive.path
            begin, end = self._archive.span(row["key"])
        else:
            path = self._path_of(row["file"])
            if path not in self._entries:
                self._entries[path] = mapping.entries(path)
            entry = self._entries[path].get(row["source"])
            if entry is None or entry.dtype is not dtype(row["dtype"]):
                return None
            begin, end = entry.begin, entry.end
        if end - begin != row["bytes"] or any(begin % kind.itemsize for kind in kinds):
            return None
        return mapping.map_file(path).tensor(begin, end)

    def _read(self, rows: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Read contents from the file itself, as bytes."""
        found = self._archive.tensors(set(rows))
        for key, flat in found.items():
            if digest(flat) != rows[key]["digest"]:
                raise Damage(f"the values of the tensor {key!r} are not those that were written")
        return found

    def _fetch(self, row: dict[str, Any]) -> torch.Tensor:
        """Read a content from the safetensors file that the row refers to, as bytes."""
        key, kind = row["source"], dtype(row["dtype"])
        path = self._path_of(row["file"])
        if path not in self._open:
            self._open[path] = open_weights(path)
        if key not in self._open[path].keys():  # noqa: SIM118 - it is no dict
            raise FxFileError(f"{path} has no tensor {key!r}, to which {self._archive.path} refers: {_ELSEWHERE}")
        flat: torch.Tensor = self._open[path].get_tensor(key).to(kind).contiguous().view(-1).clone()
        if digest(flat) != row["digest"]:
            raise FxFileError(
                f"the tensor {key!r} in {path} is not the one that {self._archive.path} was written with: {_ELSEWHERE}"
            )
        return flat.view(torch.uint8)

    def _path_of(self, number: int) -> str:
        written = _pick(self._files, number, "file")
        name = os.path.basename(written)
        for path in self._weights_from:
            if os.path.basename(path) == name or len(self._weights_from) == 1 == len(self._files):
                return path
        path = os.path.normpath(os.path.join(os.path.dirname(os.path.abspath(self._archive.path)), written))
        if not os.path.isfile(path):
            raise FxFileError(f"{self._archive.path} refers to the weights in {path}, which is not there: {_ELSEWHERE}")
        return path


_ELSEWHERE = "give the right file with load(..., weights_from=...), or load without weights (weights=False)"


def _rows(graph: dict[str, Any], key: str) -> list[Any]:
    rows = graph[key]
    if not isinstance(rows, list):
        raise Damage(f"{key!r} is no list")
    return rows


def _pick(rows: list[Any], index: Any, what: str) -> Any:
    if type(index) is not int or not 0 <= index < len(rows):
        raise Damage(f"there is no {what} number {index!r}")
    return rows[index]
