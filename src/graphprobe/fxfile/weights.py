"""Tensors of an ``.fx`` file: each content stored once, or referred to in a safetensors file.

Three layers keep what matters of memory. A *tensor* is one Python tensor (dtype, shape, stride, offset); a *storage* is
a piece of memory that tensors may share (aliases and views, which must still alias after loading); a *content* is what
is written, and storages of equal bytes share it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from graphprobe.errors import FxFileError
from graphprobe.fxfile.archive import buffer

_WASTE = 4  # a view whose memory is mostly gaps is stored without them


@dataclass
class _Span:
    """Memory [begin, end) that the tensors numbered in `members` lie in."""

    begin: int
    end: int
    members: list[int] = field(default_factory=list)


class TensorWriter:
    """Collects the tensors of one file."""

    def __init__(self) -> None:
        self._tensors: list[torch.Tensor] = []
        self._names: list[str] = []
        self._index: dict[int, int] = {}
        self._missing: set[int] = set()

    def add(self, name: str, tensor: torch.Tensor, *, values: bool = True) -> int:
        """Return the tensor's number; one Python tensor has one number under all its names. Raises FxFileError."""
        if id(tensor) in self._index:
            return self._index[id(tensor)]
        absent = isinstance(tensor, FakeTensor) or tensor.device.type == "meta" or not values
        if not absent:
            _check(name, tensor)
        index = self._index[id(tensor)] = len(self._tensors)
        self._tensors.append(tensor)
        self._names.append(name)
        if absent:
            self._missing.add(index)
        return index

    def plan(self) -> Plan:
        """Lay all tensors out in storages and contents."""
        plan = Plan()
        plan.tensors = [_row(tensor) for tensor in self._tensors]
        present = [i for i in range(len(self._tensors)) if i not in self._missing]
        # a conjugate view holds the values of another tensor in another sense: store what it means
        plain = {i: self._tensors[i].detach().resolve_conj().resolve_neg() for i in present}
        seen: dict[tuple[torch.dtype, str], int] = {}
        for span in _spans(plain):
            for flat, offsets in _flatten({i: plain[i] for i in span.members}, span):
                name = self._names[min(offsets)]
                checksum = digest(flat)
                content = seen.setdefault((flat.dtype, checksum), len(plan.contents))
                if content == len(plan.contents):
                    plan.add_content(name, flat, checksum)
                for index, (offset, stride) in offsets.items():
                    plan.tensors[index] |= {"storage": len(plan.storages), "offset": offset, "stride": stride}
                plan.storages.append(content)
        return plan


@dataclass
class Plan:
    """What is written: rows for ``graph.json``, and the flat tensors that the contents number."""

    tensors: list[dict[str, Any]] = field(default_factory=list)
    storages: list[int] = field(default_factory=list)
    contents: list[dict[str, Any]] = field(default_factory=list)
    flats: list[torch.Tensor] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    _keys: set[str] = field(default_factory=set)

    def add_content(self, name: str, flat: torch.Tensor, checksum: str) -> None:
        """Add a content under a name that no other has."""
        key, count = name, 1
        while key in self._keys:
            key, count = f"{name}#{count}", count + 1
        self._keys.add(key)
        size = flat.numel() * flat.element_size()
        kind = str(flat.dtype).removeprefix("torch.")
        self.contents.append({"key": key, "dtype": kind, "bytes": size, "digest": checksum})
        self.flats.append(flat)

    def stored(self) -> list[tuple[str, torch.Tensor]]:
        """Return the contents that go into the file itself."""
        pairs = zip(self.contents, self.flats, strict=True)
        return [(row["key"], flat) for row, flat in pairs if "file" not in row]


def _check(name: str, tensor: torch.Tensor) -> None:
    kind = type(tensor)
    if kind not in (torch.Tensor, torch.nn.Parameter) and not _behaves_like_parameter(kind):
        raise FxFileError(
            f"cannot store {name!r}: it is a {kind.__module__}.{kind.__qualname__}, a tensor subclass. Unwrap it "
            "before capturing: torchao.utils.unwrap_tensor_subclass(model), DTensor.full_tensor(), or "
            "tensor.as_subclass(torch.Tensor) where the subclass has no data of its own"
        )
    if tensor.layout != torch.strided or tensor.is_nested:
        raise FxFileError(f"cannot store {name!r}: it has layout {tensor.layout}. Convert it with .to_dense()")
    if tensor.is_quantized:
        raise FxFileError(f"cannot store {name!r}: it has dtype {tensor.dtype}. Store .int_repr() and the scales")


def _behaves_like_parameter(kind: type) -> bool:
    plain = torch.nn.Parameter
    same = ("__torch_function__", "__torch_dispatch__")
    return issubclass(kind, plain) and all(getattr(kind, name) is getattr(plain, name) for name in same)


def _row(tensor: torch.Tensor) -> dict[str, Any]:
    return {
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": [int(d) for d in tensor.shape],
        "stride": [int(d) for d in tensor.stride()],
        "device": str(tensor.device),
        "storage": None,
        "offset": 0,
    }


def extent(shape: Sequence[int], stride: Sequence[int]) -> int:
    """Return how many elements of memory a strided tensor reaches over."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))


def _bytes_of(tensor: torch.Tensor) -> int:
    return extent(tensor.shape, tensor.stride()) * tensor.element_size()


def _spans(tensors: dict[int, torch.Tensor]) -> list[_Span]:
    """Merge tensors whose memory overlaps, front to back; in the order of their first member."""
    spans: list[_Span] = []
    key = lambda i: (str(tensors[i].device), tensors[i].data_ptr(), i)  # noqa: E731
    device = ""
    for index in sorted(tensors, key=key):
        tensor = tensors[index]
        begin, size = tensor.data_ptr(), _bytes_of(tensor)
        if spans and size and begin < spans[-1].end and str(tensor.device) == device:
            spans[-1].end = max(spans[-1].end, begin + size)
            spans[-1].members.append(index)
        else:
            spans.append(_Span(begin, begin + size, [index]))
            device = str(tensor.device)
    return sorted(spans, key=lambda span: min(span.members))


_Offsets = dict[int, tuple[int, list[int]]]


def _flatten(members: dict[int, torch.Tensor], span: _Span) -> list[tuple[torch.Tensor, _Offsets]]:
    """Turn a span into flat tensors, each with {tensor number: (offset in elements of its dtype, stride)}."""
    first = next(iter(members.values()))
    if span.begin == span.end:  # no elements, and maybe no memory
        return [(t.new_empty(0), {i: (0, list(t.stride()))}) for i, t in members.items()]
    storage = first.untyped_storage()
    used = sum(t.numel() * t.element_size() for t in members.values())
    shared = all(t.untyped_storage().data_ptr() == storage.data_ptr() for t in members.values())
    if not shared or span.end - span.begin > _WASTE * used:
        return [(t.contiguous().view(-1), {i: (0, list(t.contiguous().stride()))}) for i, t in members.items()]
    kinds = {t.dtype for t in members.values()}
    begin = span.begin
    if len(kinds) > 1:
        begin = storage.data_ptr()  # where every dtype is aligned
    kind = kinds.pop() if len(kinds) == 1 else torch.uint8
    size = first.element_size() if kind == first.dtype else 1
    skip, length = (begin - storage.data_ptr()) // size, (span.end - begin) // size
    flat = torch.empty(0, dtype=kind, device=first.device).set_(storage, skip, (length,), (1,))
    return [(flat, {i: ((t.data_ptr() - begin) // t.element_size(), list(t.stride())) for i, t in members.items()})]


def digest(flat: torch.Tensor) -> str:
    """Return the SHA-256 of a tensor's bytes, in hexadecimal."""
    return hashlib.sha256(buffer(flat.cpu().contiguous())).hexdigest()


def refer(plan: Plan, sources: Sequence[str], target: str) -> None:
    """Mark the contents found in the safetensors files `sources`, so that `target` refers to them.

    A content counts as found where the file's tensor has the same bytes, as it is or cast to the content's dtype.
    Raises FxFileError where a source cannot be read or none of the contents is found.
    """
    folder = os.path.dirname(os.path.abspath(target))
    for number, source in enumerate(sources):
        plan.files.append(os.path.relpath(os.path.abspath(source), folder))
        with open_weights(source) as file:
            _refer_to(plan, number, file)
    if plan.contents and not any("file" in row for row in plan.contents):
        raise FxFileError(
            f"none of the graph's tensors is found in {', '.join(sources)}: give the safetensors files that the "
            'model was loaded from, or save with weights="store"'
        )


def open_weights(path: str) -> Any:
    """Open a safetensors file. Raises FxFileError."""
    import safetensors

    if not os.path.isfile(path):
        raise FxFileError(f"there is no safetensors file {path}")
    try:
        return safetensors.safe_open(path, framework="pt")
    except (safetensors.SafetensorError, OSError) as error:
        raise FxFileError(f"{path} is not a readable safetensors file: {error}") from error


def _refer_to(plan: Plan, number: int, file: Any) -> None:
    sizes: dict[int, list[str]] = {}
    for key in file.keys():  # noqa: SIM118 - it is no dict
        count = 1
        for d in file.get_slice(key).get_shape():
            count *= d
        sizes.setdefault(count, []).append(key)
    digests: dict[tuple[str, torch.dtype], str] = {}
    for row, flat in zip(plan.contents, plan.flats, strict=True):
        keys = sizes.get(flat.numel(), []) if "file" not in row and flat.numel() else []
        for key in sorted(keys, key=lambda key: key != row["key"]):  # the same name first
            pair = (key, flat.dtype)
            if pair not in digests:
                digests[pair] = digest(file.get_tensor(key).to(flat.dtype).view(-1))
            if digests[pair] == row["digest"]:
                row |= {"file": number, "source": key}
                break
