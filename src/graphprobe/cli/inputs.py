"""Inputs from files and from JSON on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from graphprobe.errors import InputError

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def inputs_from_file(path: str) -> Inputs:
    """Read (args, kwargs) from ``.json``, ``.safetensors``, ``.npz``, ``.pt`` or ``.fx``. Raises InputError.

    A mapping is read as keyword arguments, a sequence as positional ones, ``{"args": [...], "kwargs": {...}}`` as both.
    """
    readers = {".json": _read_json, ".safetensors": _read_safetensors, ".npz": _read_npz, ".pt": _read_pt}
    suffix = Path(path).suffix
    if not Path(path).is_file():
        raise InputError(f"there is no file {path}")
    if suffix == ".fx":
        return _read_fx(path)
    if suffix not in readers:
        raise InputError(
            f"inputs are read from {', '.join([*readers, '.fx'])}, not from {suffix or 'no suffix'}: {path}"
        )
    try:
        value = readers[suffix](path)
    except (OSError, ValueError, RuntimeError, EOFError) as error:
        raise InputError(f"{path} cannot be read as {suffix}: {str(error).splitlines()[0]}") from error
    args, kwargs = arguments(value, path)
    if not args and not kwargs:
        raise InputError(f"{path} holds no inputs")
    return args, kwargs


def for_graph(gm: torch.fx.GraphModule, graph_file: str, inputs_file: str | None) -> Inputs:
    """Return the inputs of `inputs_file`, else those stored in `graph_file`, else drawn ones. Raises InputError."""
    from graphprobe import fxfile
    from graphprobe.inputs import draw

    if inputs_file:
        return inputs_from_file(inputs_file)
    return fxfile.load_inputs(graph_file) or draw(gm)


def arguments(value: Any, where: str) -> Inputs:
    """Sort a mapping, a sequence or both into (args, kwargs). Raises InputError."""
    if isinstance(value, dict) and value and set(value) <= {"args", "kwargs"}:
        args, kwargs = value.get("args", ()), value.get("kwargs", {})
    elif isinstance(value, dict):
        args, kwargs = (), value
    else:
        args, kwargs = value if isinstance(value, (list, tuple)) else (value,), {}
    if not isinstance(args, (list, tuple)) or not isinstance(kwargs, dict):
        raise InputError(f"{where}: 'args' must be a list and 'kwargs' a mapping of names to values")
    return tuple(args), dict(kwargs)


def from_json(text: str, where: str) -> Any:
    """Parse JSON in which lists of numbers become tensors (int64, float32 or bool); the outermost list stays a list.

    Raises InputError.
    """
    try:
        data = json.loads(text)
    except ValueError as error:
        raise InputError(f"{where} is not valid JSON: {error}") from error
    try:
        return _tensors(data)
    except ValueError as error:
        raise InputError(f"{where}: a list of numbers cannot become a tensor: {error}") from error


def _tensors(data: Any) -> Any:
    if isinstance(data, list):  # a list of arguments
        return [_leaf(v) for v in data]
    if isinstance(data, dict) and isinstance(data.get("args"), list) and set(data) <= {"args", "kwargs"}:
        return {name: _tensors(v) for name, v in data.items()}
    return _leaf(data)


def _leaf(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _leaf(v) for name, v in value.items()}
    if isinstance(value, list):
        return torch.tensor(value) if _is_numeric(value) else [_leaf(v) for v in value]
    return value


def _is_numeric(value: list[Any]) -> bool:
    return bool(value) and all(_is_numeric(v) if isinstance(v, list) else isinstance(v, (int, float)) for v in value)


def _read_json(path: str) -> Any:
    return from_json(Path(path).read_text(encoding="utf-8"), path)


def _read_safetensors(path: str) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(str(error)) from error


def _read_npz(path: str) -> Any:
    import numpy

    with numpy.load(path, allow_pickle=False) as archive:
        return {name: torch.from_numpy(archive[name]) for name in archive.files}


def _read_pt(path: str) -> Any:
    import pickle

    try:
        return torch.load(path, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        raise ValueError("it holds more than tensors and plain containers, which is not read for safety") from error


def _read_fx(path: str) -> Inputs:
    from graphprobe import fxfile

    stored = fxfile.load_inputs(path)
    if stored is None:
        raise InputError(f"{path} holds no inputs: save it with graphprobe.save(gm, path, args=..., kwargs=...)")
    return stored


def device(name: str) -> torch.device:
    """Return the device of this name. Raises InputError where this machine has none such."""
    from graphprobe.arguments import check_device

    return check_device(name)


def on_device(gm: torch.fx.GraphModule, args: Any, kwargs: Any, name: str) -> tuple[torch.fx.GraphModule, Any, Any]:
    """Return the graph and its inputs on another device. Raises InputError where this machine has none such."""
    from graphprobe.devices import moved

    where = device(name)

    def there(value: Any) -> Any:
        return value.to(where) if isinstance(value, torch.Tensor) else value

    args, kwargs = torch.utils._pytree.tree_map(there, (args, kwargs))
    return moved(gm, where), args, kwargs
