"""What a bisection remembers of its trials, in a file if asked, so that it can go on where it was interrupted."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import inspect
import json
import os
import shlex
import types
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch.fx import GraphModule

from graphprobe import placing
from graphprobe.bisection.oracle import Answer
from graphprobe.errors import InputError
from graphprobe.provenance import target_name

_VERSION = 1


@dataclass
class Store:
    """Answers by trial; written to `path` after each new one."""

    path: Path | None
    key: str  # of the model, the inputs, the pipeline and the check: answers of another question are no answers
    answers: dict[str, Answer] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    remembered: set[str] = field(default_factory=set)

    @staticmethod
    def open(path: str | os.PathLike[str] | None, key: str) -> Store:
        """Read a state file if it is there. Raises InputError where it is none, or belongs to another question."""
        store = Store(None if path is None else Path(path), key)
        if store.path is None or not store.path.exists():
            return store
        try:
            data = json.loads(store.path.read_text(encoding="utf-8"))
            version, found, trials = data["version"], data["key"], data["trials"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path} is no state file of a bisection ({type(error).__name__}): give another path"
            ) from error
        if version != _VERSION or found != key:
            raise InputError(
                f"{path} remembers a bisection of another model, pipeline, check or inputs, or of another version: "
                "delete it, or give another path"
            )
        for trial, row in trials.items():
            store.answers[trial] = Answer(row["verdict"], row["reason"], row["crashed"])
            store.seconds[trial] = row["seconds"]
        store.remembered = set(store.answers)
        return store

    def put(self, trial: str, answer: Answer, seconds: float) -> None:
        """Remember an answer."""
        self.answers[trial], self.seconds[trial] = answer, seconds
        if self.path is not None:
            self._write(self.path)

    def _write(self, path: Path) -> None:
        rows = {
            trial: {
                "verdict": answer.verdict,
                "reason": answer.reason,
                "crashed": answer.crashed,
                "seconds": self.seconds[trial],
            }
            for trial, answer in self.answers.items()
        }
        partial = placing.beside(path)
        try:
            partial.write_text(json.dumps({"version": _VERSION, "key": self.key, "trials": rows}), encoding="utf-8")
            placing.put(partial, path)
        except OSError as error:
            raise InputError(f"cannot write the state file {path}: {error.strerror or error}") from error
        finally:
            with contextlib.suppress(OSError):
                partial.unlink()


def key_of(gm: GraphModule, inputs: Any, *words: Any) -> str:
    """Return a digest of a graph with its weights, of inputs, and of whatever else the answers depend on."""
    digest = hashlib.sha256()
    digest.update(torch.__version__.encode())
    for node in gm.graph.nodes:
        digest.update(f"{node.name} {node.op} {target_name(node)} {node.args} {node.kwargs}\n".encode())
    tensors = [*gm.named_parameters(), *gm.named_buffers(), *enumerate(pytree.tree_leaves(inputs))]
    for name, leaf in tensors:
        digest.update(f"{name}:".encode())
        digest.update(_bytes(leaf))
    for word in words:
        digest.update(f"|{described(word)}".encode())
    return digest.hexdigest()


def print_of(gm: GraphModule) -> int:
    """Return a number that is another one where a graph or the numbers in its weights are; quick, and no proof."""
    text = "\n".join(
        f"{name} {node.op} {target_name(node)} {node.args} {node.kwargs}"
        for name, one in gm.named_modules()
        if isinstance(one, GraphModule)
        for node in one.graph.nodes
    )
    return hash((text, *(_sum(name, value) for name, value in (*gm.named_parameters(), *gm.named_buffers()))))


def _sum(name: str, value: torch.Tensor) -> Any:
    try:
        bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[value.dtype.itemsize]
        return name, int(value.detach().view(bits).sum(dtype=torch.int64))
    except Exception:  # no plain memory, such as a packed weight: its kind is all that is seen
        return name, str(value.dtype), tuple(value.shape)


def _bytes(leaf: Any) -> bytes:
    if hasattr(leaf, "__tensor_flatten__"):  # a quantised weight: the tensors inside it
        names, context = leaf.__tensor_flatten__()
        return b"".join(_bytes(getattr(leaf, name)) for name in names) + repr(context).encode()
    if not isinstance(leaf, torch.Tensor) or leaf.layout is not torch.strided or leaf.device.type == "meta":
        return repr(leaf).encode()
    data = leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return f"{leaf.dtype}{tuple(leaf.shape)}".encode() + hashlib.sha256(data.tobytes()).digest()


def described(word: Any, depth: int = 3) -> str:
    """Return what a value is, not where: one that was edited since is another, and answers another question.

    A function is its code, what it closes over and the file it stands in; an object its class and its fields.
    """
    if isinstance(word, torch.Tensor):
        return hashlib.sha256(_bytes(word)).hexdigest()
    if isinstance(word, (list, tuple)):
        return f"[{', '.join(described(one, depth) for one in word)}]"
    if isinstance(word, dict):
        return f"{{{', '.join(f'{key}: {described(value, depth)}' for key, value in word.items())}}}"
    if isinstance(word, (str, int, float, bool, type(None))):
        return repr(word)
    if isinstance(word, functools.partial):
        return f"partial({described([word.func, word.args, word.keywords], depth)})"
    name = f"{getattr(word, '__module__', '')}.{getattr(word, '__qualname__', type(word).__qualname__)}"
    if depth == 0:
        return name
    code = getattr(word, "__code__", None)
    if code is None:
        return f"{name}:{_source(type(word))}:{described(_fields(word), depth - 1)}"
    held = [*_contents(getattr(word, "__closure__", None) or ()), *(getattr(word, "__defaults__", None) or ())]
    # lists and other things that may change while it runs say nothing of what it is
    fixed = [value for value in held if isinstance(value, (str, int, float, bool, tuple)) or callable(value)]
    return f"{name}:{_code(code)}:{_source(word)}:{[described(value, depth - 1) for value in fixed]}"


def files_in(command: str | Sequence[str]) -> str:
    """Return a digest of the files that a command names: a script that was edited gives other answers."""
    words = shlex.split(command) if isinstance(command, str) else command
    there = [Path(word) for word in words if len(word) < 4096 and Path(word).is_file()]
    return " ".join(hashlib.sha256(path.read_bytes()).hexdigest() for path in there)


def _fields(word: Any) -> dict[str, Any]:
    if dataclasses.is_dataclass(word) and not isinstance(word, type):
        return {f.name: getattr(word, f.name, None) for f in dataclasses.fields(word)}
    values = getattr(word, "__dict__", {})
    return {key: value for key, value in values.items() if isinstance(value, (str, int, float, bool, tuple))}


def _source(word: Any) -> str:
    """Return a digest of the file in which a user's function or class is defined; installed ones have a version."""
    try:
        path = inspect.getsourcefile(word)
    except TypeError:
        return ""
    if path is None or "site-packages" in path or not os.path.isfile(path):
        return ""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _contents(cells: Iterable[Any]) -> Iterator[Any]:
    for cell in cells:
        with contextlib.suppress(ValueError):  # a name that is assigned later
            yield cell.cell_contents


def _code(code: types.CodeType) -> str:
    constants = [_code(c) if isinstance(c, types.CodeType) else repr(c) for c in code.co_consts]
    return f"{code.co_code.hex()} {constants} {code.co_names}"
