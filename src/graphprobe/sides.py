"""The two sides of a comparison: models and files become graphs, and what they are called with is settled."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch

from graphprobe import fxfile, inputs
from graphprobe.capturing import Model, capture
from graphprobe.devices import moved
from graphprobe.errors import InputError
from graphprobe.foreign import graphs as foreign_graphs

Side = Model | str | os.PathLike[str]
Call = tuple[tuple[Any, ...], dict[str, Any]]  # (args, kwargs)


def graphs(
    sides: Sequence[Side],
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None,
    *,
    mapped: bool = False,
    other: Call | None = None,
) -> tuple[list[torch.fx.GraphModule], tuple[Any, ...], dict[str, Any]]:
    """Turn the sides into graphs and settle the inputs: given, stored with a side, or drawn; `other` are the last's."""
    given = bool(args) or bool(kwargs)
    if not given:
        for side in sides:
            stored = _stored_inputs(side)
            if stored is not None:
                args, kwargs, given = stored[0], stored[1], True
                break
    kwargs = dict(kwargs or {})
    loaded = [fxfile.load(s, mapped=mapped) if isinstance(s, (str, os.PathLike)) else s for s in sides]
    if not given:
        captured = [s for s in loaded if not is_plain_module(s)]
        if not captured:
            raise InputError("no inputs were given, and a plain nn.Module has none to draw from: give args= or kwargs=")
        args, kwargs = inputs.draw(capture(captured[0]))
    calls = [(args, kwargs)] * len(loaded) if other is None else [*[(args, kwargs)] * (len(loaded) - 1), other]
    return [capture(s, *call) for s, call in zip(loaded, calls, strict=True)], args, kwargs


def stored_apart(before: Side, after: Side, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> Call | None:
    """Return the inputs stored with after's file, where none are given and before's file holds some of other shapes."""
    if args or kwargs or not all(isinstance(s, (str, os.PathLike)) for s in (before, after)):
        return None
    mine, theirs = (fxfile.load_inputs(s) for s in (before, after))  # type: ignore[arg-type]
    if mine is None or theirs is None or _shapes(mine) == _shapes(theirs):
        return None
    return theirs


def _shapes(call: Any) -> list[tuple[int, ...] | None]:
    leaves = torch.utils._pytree.tree_leaves(call)
    return [tuple(v.shape) if isinstance(v, torch.Tensor) else None for v in leaves]


def is_text(side: Side) -> bool:
    """Whether a side is the text of a graph: it can be aligned, but not run."""
    return isinstance(side, (str, os.PathLike)) and os.fspath(side).endswith(foreign_graphs.SUFFIXES)


def read(side: Side) -> Model:
    """Read a side that is a file: an .fx file or a text dump. Raises FxFileError and DumpError."""
    if is_text(side):
        return foreign_graphs.load(side)  # type: ignore[arg-type]
    return fxfile.load(side) if isinstance(side, (str, os.PathLike)) else side


def _stored_inputs(side: Side) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Return the inputs that a file or an ExportedProgram comes with, None where there are none."""
    if isinstance(side, torch.export.ExportedProgram):
        found = side.example_inputs
    else:
        found = fxfile.load_inputs(side) if isinstance(side, (str, os.PathLike)) else None
    return (tuple(found[0]), dict(found[1])) if found and any(found) else None


def is_plain_module(side: Any) -> bool:
    return isinstance(side, torch.nn.Module) and not isinstance(side, torch.fx.GraphModule)


def to_device(
    device: torch.device,
    before: torch.fx.GraphModule,
    after: torch.fx.GraphModule,
    call: Any,
    valid: torch.Tensor | None,
) -> tuple[torch.fx.GraphModule, torch.fx.GraphModule, Any, torch.Tensor | None]:
    def there(value: Any) -> Any:
        return value.to(device) if isinstance(value, torch.Tensor) else value

    call, valid = torch.utils._pytree.tree_map(there, (call, valid))
    return moved(before, device), moved(after, device), call, valid
