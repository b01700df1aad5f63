"""The container of an ``.fx`` file: a zip of ``graph.json`` and ``tensors.safetensors``, written whole or not at all.

Nothing is ever extracted or executed. Sizes are checked before memory is taken: ``graph.json`` is bounded, and
``tensors.safetensors`` is stored uncompressed, so that it cannot claim more bytes than the file has.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import struct
import zipfile
from collections.abc import Iterator, Sequence
from typing import IO, Any, BinaryIO

import torch

from graphprobe import placing
from graphprobe.errors import FxFileError

FORMAT = 1  # raised when older readers cannot read what newer writers write
GRAPH, TENSORS = "graph.json", "tensors.safetensors"
MAX_GRAPH_BYTES = 256 << 20  # SmolLM2 (1,950 operations) takes less than 1 MB
_LONG_AGO = (1980, 1, 1, 0, 0, 0)  # no time of day in the file: equal graphs give equal bytes
_ALIGN = 64

#: dtypes that the safetensors format names; the others are written as bytes (U8), their dtype being in graph.json
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}


class Damage(Exception):
    """What is wrong inside a file; the loader turns it into an FxFileError that names the file."""


@contextlib.contextmanager
def replacing(path: str) -> Iterator[IO[bytes]]:
    """Open a temporary file beside `path` that takes its place at the end, or vanishes when anything goes wrong."""
    temporary = placing.beside(path)
    try:
        with open(temporary, "xb") as file:
            yield file
        placing.put(temporary, path)
    except OSError as error:
        raise FxFileError(f"cannot write {path}: {error.strerror or error}") from error
    finally:  # also on Ctrl-C
        with contextlib.suppress(OSError):
            os.unlink(temporary)


def write(path: str, graph: dict[str, Any], tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
    """Write `graph` and the flat `tensors` (name, values on any device) to `path`. Raises FxFileError."""
    text = json.dumps(graph, separators=(",", ":"), allow_nan=False).encode()
    with replacing(path) as file, zipfile.ZipFile(file, "w", allowZip64=True) as archive:
        info = zipfile.ZipInfo(GRAPH, _LONG_AGO)
        info.compress_type = zipfile.ZIP_DEFLATED
        archive.writestr(info, text)
        with archive.open(zipfile.ZipInfo(TENSORS, _LONG_AGO), "w", force_zip64=True) as member:
            _write_tensors(member, tensors, start=file.tell())


def _write_tensors(member: IO[bytes], tensors: Sequence[tuple[str, torch.Tensor]], start: int) -> None:
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors:
        begin, end = end, end + tensor.numel() * tensor.element_size()
        kind = _NAMES.get(tensor.dtype, "U8")
        length = tensor.numel() if tensor.dtype in _NAMES else end - begin
        header[name] = {"dtype": kind, "shape": [length], "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-(start + 8 + len(text)) % _ALIGN)  # lets readers map the values in place
    member.write(struct.pack("<Q", len(text)) + text)
    for _, tensor in tensors:
        member.write(buffer(tensor.detach().cpu().contiguous()))


def buffer(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a contiguous CPU tensor without a copy; they stay alive with the answer."""
    size = tensor.numel() * tensor.element_size()
    if not size:
        return memoryview(bytearray())
    raw: Any = (ctypes.c_ubyte * size).from_address(tensor.data_ptr())
    raw.owner = tensor  # else the copy of a tensor that lies on a GPU would be gone before it is read
    return memoryview(raw).cast("B")


class Archive:
    """An ``.fx`` file opened for reading; use it in a ``with`` statement."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._found: dict[str, tuple[int, int]] | None = None  # where the tensors lie
        try:
            self.size = os.path.getsize(path)
            if not os.path.isfile(path):
                raise FxFileError(f"{path} is not a file")
            self._zip = zipfile.ZipFile(path)
        except FileNotFoundError:
            raise FxFileError(f"there is no file {path}") from None
        except OSError as error:
            raise FxFileError(f"cannot read {path}: {error.strerror or error}") from error
        except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
            raise FxFileError(_why_no_zip(path)) from error

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *_: object) -> None:
        self._zip.close()

    def graph(self) -> dict[str, Any]:
        """Return the content of ``graph.json``, known to be of a version that can be read here."""
        names = self._zip.namelist()
        if GRAPH not in names:
            found = ", ".join(ascii(name) for name in names[:3]) or "nothing"
            raise FxFileError(
                f"{self.path} is not an .fx file: it is a zip archive without {GRAPH} (it holds {found}). "
                "Write .fx files with graphprobe.save or `graphprobe capture`"
            )
        info = self._zip.getinfo(GRAPH)
        if info.file_size > MAX_GRAPH_BYTES:
            raise Damage(f"{GRAPH} claims {info.file_size:,} bytes, more than the {MAX_GRAPH_BYTES:,} allowed")
        data = json.loads(self._zip.read(info), parse_constant=_no_constant)
        if not isinstance(data, dict) or data.get("format") != "graphprobe.fx":
            raise FxFileError(f"{self.path} is not an .fx file: its {GRAPH} is not one of graphprobe's")
        version = data.get("version")
        if not isinstance(version, int) or isinstance(version, bool) or version < 1:
            raise Damage("its version is no number")
        if version > FORMAT:
            raise FxFileError(
                f"{self.path} was written by a newer graphprobe (format {version}; this one reads up to {FORMAT}): "
                "update graphprobe"
            )
        return data

    def tensors(self, wanted: set[str]) -> dict[str, torch.Tensor]:
        """Read the tensors named in `wanted`, and only those: uint8 tensors of their bytes, in memory of their own.

        The caller checks their digests: reading a part of a member leaves the zip's own sum unchecked.
        """
        if not wanted:
            return {}
        spans = self._spans()
        missing = sorted(wanted - spans.keys())
        if missing:
            raise Damage(f"the tensor {missing[0]!r} is missing")
        with open(self.path, "rb") as file:
            out: dict[str, torch.Tensor] = {}
            for name in sorted(wanted, key=spans.__getitem__):
                begin, end = spans[name]
                out[name] = values = torch.empty(end - begin, dtype=torch.uint8)
                file.seek(begin)
                _fill(file, buffer(values))
        return out

    def span(self, name: str) -> tuple[int, int]:
        """Return where the bytes of a tensor begin and end in the file."""
        if name not in self._spans():
            raise Damage(f"the tensor {name!r} is missing")
        return self._spans()[name]

    def _spans(self) -> dict[str, tuple[int, int]]:
        if self._found is None:
            if TENSORS not in self._zip.namelist():
                raise Damage(f"{TENSORS} is missing")
            info = self._zip.getinfo(TENSORS)
            with open(self.path, "rb") as file:
                start = self._data_start(file, info)
                base, spans = _read_header(file, info.file_size)
            start += base
            self._found = {name: (start + begin, start + end) for name, (begin, end) in spans.items()}
        return self._found

    def _data_start(self, file: BinaryIO, info: zipfile.ZipInfo) -> int:
        """Place the file at the first byte of a member that is stored as it is."""
        file.seek(info.header_offset)
        head = file.read(30)
        if len(head) != 30 or head[:4] != b"PK\x03\x04":
            raise Damage(f"{TENSORS} is not where the archive says")
        name, extra = struct.unpack("<HH", head[26:30])
        start = file.seek(info.header_offset + 30 + name + extra)
        if info.compress_type != zipfile.ZIP_STORED or start + info.file_size > self.size:
            raise Damage(f"{TENSORS} does not have the size that it claims")
        return start


def _read_header(file: BinaryIO, size: int) -> tuple[int, dict[str, tuple[int, int]]]:
    """Return where the values begin, and where each tensor lies among them."""
    prefix = file.read(8) if size >= 8 else b""
    length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
    if 8 + length > min(size, MAX_GRAPH_BYTES):
        raise Damage(f"the header of {TENSORS} is cut short")
    spans: dict[str, tuple[int, int]] = {}
    last = 0
    for name, entry in json.loads(file.read(length)).items():
        begin, end = entry["data_offsets"]
        if begin != last or not begin <= end <= size - 8 - length:
            raise Damage(f"the tensor {name!r} lies outside {TENSORS}")
        spans[name] = (begin, end)
        last = end
    if last != size - 8 - length:
        raise Damage(f"{TENSORS} has bytes that belong to no tensor")
    return 8 + length, spans


def _fill(file: BinaryIO, target: memoryview) -> None:
    done = 0
    while done < len(target):  # one call reads at most 2 GB
        count = file.readinto(target[done:])  # type: ignore[attr-defined]
        if not count:
            raise Damage(f"{TENSORS} is cut short")
        done += count


def _no_constant(text: str) -> Any:
    raise Damage(f"{GRAPH} holds the bare constant {text}")


def _why_no_zip(path: str) -> str:
    with open(path, "rb") as file:
        start = file.read(4)
    if not start:
        return f"{path} is not an .fx file: it is empty"
    if start == b"PK\x03\x04":
        return f"{path} is damaged: its end is missing or unreadable. Copy it again or write it anew"
    return f"{path} is not an .fx file. Write .fx files with graphprobe.save or `graphprobe capture`"
