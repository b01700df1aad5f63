"""The values a comparison runs on: bound by their path in the calling convention, or drawn from the graph itself."""

from __future__ import annotations

from typing import Any

import torch
import torch.utils._pytree as pytree
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Node

from graphprobe import nodes
from graphprobe.calling import input_paths, suffix
from graphprobe.errors import InputError, nearest
from graphprobe.program import Program, fetch

Inputs = dict[str, Any]
_SEED = 20260117


def parameter_names(gm: GraphModule) -> list[str]:
    """Return the names of forward's parameters, positional order."""
    info = getattr(gm.graph._codegen, "pytree_info", None)
    if info is not None:
        return list(info.orig_args)
    return [str(n.target) for n in gm.graph.nodes if n.op == "placeholder"]


def bind(gm: GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any], side: str) -> Inputs:
    """Map every leaf of the call to its path: 'input_ids', 'past.layers[0].keys'. Raises InputError."""
    names = parameter_names(gm)
    if len(args) > len(names):
        raise InputError(
            f"{side} takes {len(names)} inputs ({', '.join(names)}), but {len(args)} were given by position"
        )
    call = {**dict(zip(names, args, strict=False))}
    for name, value in kwargs.items():
        if name in call:
            raise InputError(f"the input {name!r} of {side} was given twice: by position and by name")
        call[name] = value
    bound: Inputs = {}
    for name, value in call.items():
        for path, leaf in pytree.tree_flatten_with_path(value)[0]:
            bound[name + suffix(path)] = leaf
    return bound


def check(program: Program, bound: Inputs, side: str, device: torch.device | None) -> None:
    """Raise InputError where a value is missing or its shape, dtype or device does not fit the graph."""
    for path, node in program.inputs.items():
        wanted = nodes.tensor_val(node)
        if path not in bound:
            if node not in program.order:
                continue
            raise InputError(
                f"{side} needs the input {path!r}, which was not given{nearest(path, bound)}. It takes "
                f"{', '.join(program.inputs)}; give them as args=(...) or kwargs={{...}}"
            )
        value = bound[path]
        if wanted is None or not isinstance(wanted, torch.Tensor):
            continue
        if not isinstance(value, torch.Tensor):
            raise InputError(f"the input {path!r} of {side} must be a tensor, not a {type(value).__name__}")
        _check_tensor(path, value, wanted, side, device)


def _check_tensor(path: str, value: torch.Tensor, wanted: torch.Tensor, side: str, device: torch.device | None) -> None:
    if isinstance(value, FakeTensor):
        raise InputError(f"the input {path!r} is a FakeTensor, which holds no values: give a real tensor of its shape")
    fits = len(value.shape) == len(wanted.shape) and all(
        not isinstance(want, int) or want == have for want, have in zip(wanted.shape, value.shape, strict=True)
    )
    if not fits:
        raise InputError(
            f"the input {path!r} has shape {tuple(value.shape)}, but {side} was captured with "
            f"{tuple(str(d) if not isinstance(d, int) else d for d in wanted.shape)}. Capture it again with inputs of "
            "this shape, or with dynamic_shapes (--dynamic NAME:DIM)"
        )
    both_float = value.dtype.is_floating_point and wanted.dtype.is_floating_point
    if value.dtype != wanted.dtype and not both_float:
        raise InputError(
            f"the input {path!r} has dtype {nodes.dtype_name(value.dtype)}, but {side} takes "
            f"{nodes.dtype_name(wanted.dtype)}. Convert it with .to(torch.{nodes.dtype_name(wanted.dtype)})"
        )
    if device is not None and value.device.type != device.type:
        raise InputError(
            f"the input {path!r} is on {value.device}, but the weights of {side} are on {device}. Move it there, or "
            "give device= to move everything"
        )


def device_of(gm: GraphModule) -> torch.device | None:
    """Return the device of the graph's weights, or None where it has none."""
    for tensor in (*gm.parameters(), *gm.buffers()):
        if not tensor.is_meta:  # a weight that was never loaded is nowhere
            return tensor.device
    return None


# --- drawing ----------------------------------------------------------------------------------------------------


def draw(gm: GraphModule) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Draw (args, kwargs) for a graph, the same ones every time.

    Token ids lie below the embedding's number of rows, masks are ones, positions count, floats are standard normal.
    Symbolic dimensions become 8. Raises InputError where a placeholder has no ``meta["val"]`` to draw from.
    """
    generator = torch.Generator().manual_seed(_SEED)
    values = {path: _draw_one(gm, path, node, generator) for path, node in input_paths(gm).items()}
    info = getattr(gm.graph._codegen, "pytree_info", None)
    if info is None or info.in_spec is None:
        return tuple(values.values()), {}
    args, kwargs = pytree.tree_unflatten(list(values.values()), info.in_spec)
    return tuple(args), dict(kwargs)


def _draw_one(gm: GraphModule, path: str, node: Node, generator: torch.Generator) -> Any:
    value = node.meta.get("val")
    if "val" not in node.meta and node.users:
        raise InputError(
            f"no inputs were given, and none can be drawn for {path!r}: its placeholder has no meta['val']. "
            "Give args= and kwargs=, or save the graph with graphprobe.save(gm, path, args=..., kwargs=...)"
        )
    if not isinstance(value, torch.Tensor):
        return value if isinstance(value, (int, float, bool, str, type(None))) else _dimension(value)
    shape = [_dimension(d) for d in value.shape]
    device = device_of(gm) or torch.device("cpu")
    if value.dtype == torch.bool or "mask" in path:
        ones = torch.ones(shape, dtype=value.dtype, device=device)
        return torch.zeros_like(ones) if value.dtype.is_floating_point else ones
    if value.dtype.is_floating_point or value.dtype.is_complex:
        work = torch.complex64 if value.dtype.is_complex else torch.float32
        return torch.randn(shape, generator=generator, dtype=work).to(device, value.dtype)
    rows = _table_rows(gm, node)
    if rows is not None:
        return torch.randint(0, rows, shape, generator=generator, dtype=torch.int64).to(device, value.dtype)
    if shape and "position" in path:
        return torch.arange(shape[-1]).expand(shape).to(device, value.dtype).contiguous()
    return torch.zeros(shape, dtype=value.dtype, device=device)


def _dimension(size: Any) -> int:
    return size if isinstance(size, int) else 8


def _table_rows(gm: GraphModule, node: Node) -> int | None:
    """Return the number of rows of the smallest table this placeholder indexes, through casts and views."""
    rows: list[int] = []
    stack, seen = [node], {node}
    while stack:
        for user in stack.pop().users:
            if user.op != "call_function" or user in seen:
                continue
            seen.add(user)
            name = nodes.schema_name(user)
            if name == "aten::embedding" and isinstance(user.args[0], Node) and user.args[0].op == "get_attr":
                if user.args[1] in seen:
                    rows.append(int(fetch(gm, str(user.args[0].target)).shape[0]))
            elif nodes.is_view(user) or name in ("aten::to", "aten::_to_copy"):
                stack.append(user)
    return min(rows) if rows else None


# --- padding ----------------------------------------------------------------------------------------------------


def padding(bound: Inputs, valid: torch.Tensor | None) -> torch.Tensor | None:
    """Return [batch, tokens] bool, True where a position is padding; None where nothing is padded."""
    if valid is not None:
        _check_valid(bound, valid)
        return None if bool(valid.bool().all()) else ~valid.bool()
    for path, value in bound.items():
        if "attention_mask" in path and isinstance(value, torch.Tensor) and value.dim() == 2:
            if value.dtype.is_floating_point or bool((value != 0).all()) or not bool((value != 0).any()):
                continue
            return value == 0
    return None


def _check_valid(bound: Inputs, valid: torch.Tensor) -> None:
    """Raise InputError where `valid` does not say of every token of an input whether it counts, or lets none count."""
    shapes = [tuple(v.shape[:2]) for v in bound.values() if isinstance(v, torch.Tensor) and v.dim() >= 2]
    if not isinstance(valid, torch.Tensor) or tuple(valid.shape) not in shapes:
        have = tuple(valid.shape) if isinstance(valid, torch.Tensor) else type(valid).__name__
        wanted = ", ".join(dict.fromkeys(map(str, shapes))) or "none: no input has two dimensions"
        raise InputError(f"valid must be a [batch, tokens] tensor of an input's shape ({wanted}), not {have}")
    if not bool(valid.bool().any()):
        raise InputError("valid says that no position counts: there would be nothing to compare")


def redraw(bound: Inputs, padded: torch.Tensor) -> Inputs:
    """Return the inputs with every padded token drawn anew: what moves then is a value nobody cares about."""
    generator = torch.Generator().manual_seed(_SEED)
    out = dict(bound)
    for path, value in bound.items():
        if (
            not isinstance(value, torch.Tensor)
            or value.shape[:2] != padded.shape
            or "mask" in path
            or "position" in path
        ):
            continue
        where = padded.to(value.device)
        if value.dtype.is_floating_point:
            fresh = torch.randn(value.shape, generator=generator).to(value.device, value.dtype)
            out[path] = torch.where(where.reshape(*where.shape, *(1,) * (value.dim() - 2)), fresh, value)
        elif value.dim() == 2 and value.dtype != torch.bool:
            known = torch.unique(value.cpu())
            if known.numel() < 2:
                continue
            # another one than stands there: what happens to be drawn again would look as if somebody cared about it
            step = torch.randint(1, known.numel(), value.shape, generator=generator)
            pick = (torch.searchsorted(known, value.cpu()) + step) % known.numel()
            out[path] = torch.where(where, known[pick].to(value.device), value)
    return out
