"""Two graphs become two programs on one set of inputs: bound by path, checked, cast to what each side takes."""

from __future__ import annotations

from typing import Any, TypeVar

import torch

from graphprobe import align, fxfile, inputs, nodes
from graphprobe.devices import redirect
from graphprobe.errors import InputError, MismatchError, OperatorError, nearest
from graphprobe.execute import run_program
from graphprobe.program import Program, copied, program
from graphprobe.sides import Call
from graphprobe.streaming import Stream

Value = TypeVar("Value")


def programs(
    gm_before: torch.fx.GraphModule,
    gm_after: torch.fx.GraphModule,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    stream: Stream | None = None,
    other: Call | None = None,
) -> tuple[Program, Program, inputs.Inputs]:
    """Make both graphs ready for the lanes and bind the inputs; the calling convention is before's."""
    theirs = other or (args, kwargs)
    bound = inputs.bind(gm_before, args, kwargs, "before")
    bound_after = inputs.bind(gm_after, *theirs, "after")
    if other is None:
        _check_names(gm_before, gm_after, kwargs)
    for gm in (gm_before, gm_after):
        _check_weights(gm)
    left = program(gm_before, *_where_it_is(gm_before, args, kwargs, stream))
    right = program(gm_after, *_where_it_is(gm_after, *theirs, stream))
    if other is not None:
        _check_inputs(right, bound_after, "after", gm_after, stream)
    right.inputs = _as_before_calls(right.inputs, gm_before, gm_after, len(theirs[0]))
    _check_inputs(left, bound, "before", gm_before, stream)
    if other is None:
        _check_signatures(left, right)
        _check_inputs(right, bound, "after", gm_after, stream)
    bound = as_before_takes(left, bound)
    if other is not None:
        bound |= _apart(right, bound, _as_before_calls(bound_after, gm_before, gm_after, len(theirs[0])))
        _check_outputs(left, right)
    if stream is not None:
        left, right = _streamed(left, stream), _streamed(right, stream)
        bound = {path: v.to(stream.device) if isinstance(v, torch.Tensor) else v for path, v in bound.items()}
    for one, gm in ((left, gm_before), (right, gm_after)):
        concretise(one, bound)
        one.device = _device(gm, bound) if stream is None else stream.device
    return left, right, bound


def _device(gm: torch.fx.GraphModule, bound: inputs.Inputs) -> torch.device | None:
    """Return where a graph runs, None where that is more than one device."""
    tensors = [*gm.parameters(), *gm.buffers(), *(v for v in bound.values() if isinstance(v, torch.Tensor))]
    devices = {tensor.device for tensor in tensors if not tensor.is_meta}
    return devices.pop() if len(devices) == 1 else None


def _check_inputs(
    one: Program, bound: inputs.Inputs, side: str, gm: torch.fx.GraphModule, stream: Stream | None
) -> None:
    inputs.check(one, bound, side, inputs.device_of(gm) if stream is None else None)


def _apart(right: Program, bound: inputs.Inputs, theirs: inputs.Inputs) -> inputs.Inputs:
    """Give after's inputs that are not before's a path of their own; return what lies there."""
    out: inputs.Inputs = {}
    for path, node in list(right.inputs.items()):
        mine, value = bound.get(path), theirs.get(path)
        if path in theirs and not _equal(mine, value):
            right.inputs = {(align.OTHER + p if n is node else p): n for p, n in right.inputs.items()}
            out[align.OTHER + path] = value
    return out


def _equal(mine: Any, theirs: Any) -> bool:
    if not isinstance(mine, torch.Tensor) or not isinstance(theirs, torch.Tensor):
        return type(mine) is type(theirs) and bool(mine == theirs)
    return mine.shape == theirs.shape and torch.equal(mine, theirs.to(mine.dtype))


def _where_it_is(
    gm: torch.fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any], stream: Stream | None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the inputs where the weights are: a graph may have to be exported there before its weights come over."""
    if stream is None:
        return args, kwargs
    device = inputs.device_of(gm) or torch.device("cpu")
    there: tuple[tuple[Any, ...], dict[str, Any]] = torch.utils._pytree.tree_map_only(
        torch.Tensor, lambda value: value.to(device), (args, kwargs)
    )
    return there


def _streamed(one: Program, stream: Stream) -> Program:
    """Let a program compute on the stream's device and its weights come from where they are."""
    there = copied(one)
    there.stream = stream
    if stream.device.type != "cpu":
        redirect(there.gm, stream.device)
    return there


def _check_names(gm_before: torch.fx.GraphModule, gm_after: torch.fx.GraphModule, kwargs: dict[str, Any]) -> None:
    known = (*inputs.parameter_names(gm_before), *inputs.parameter_names(gm_after))
    for name, value in kwargs.items():
        tensors = [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]
        if tensors and name not in known:
            takes = ", ".join(dict.fromkeys(known))
            raise InputError(f"neither graph takes the input {name!r}{nearest(name, known)}. They take {takes}")


def _check_weights(gm: torch.fx.GraphModule) -> None:
    missing = gm.meta.get(fxfile.MISSING)
    if missing:
        raise OperatorError(
            f"a graph was loaded without the values of {len(missing)} weights ({missing[0]}, ...) and cannot be run: "
            'save it with weights="store" or "reference"'
        )


def as_before_takes(left: Program, bound: inputs.Inputs) -> inputs.Inputs:
    """Cast floating inputs to the dtypes of before; after's are cast from there."""
    out = dict(bound)
    for path, node in left.inputs.items():
        wanted, value = nodes.tensor_val(node), bound.get(path)
        if wanted is not None and isinstance(value, torch.Tensor) and value.dtype != wanted.dtype:
            out[path] = value.to(wanted.dtype)
    return out


def _as_before_calls(
    paths: dict[str, Value], gm_before: torch.fx.GraphModule, gm_after: torch.fx.GraphModule, count: int
) -> dict[str, Value]:
    """What the caller gave by position binds to each side's own parameter; the path is called as before calls it."""
    mine, theirs = inputs.parameter_names(gm_before)[:count], inputs.parameter_names(gm_after)[:count]
    names = {t: m for m, t in zip(mine, theirs, strict=False)}

    def rename(path: str) -> str:
        head = next(
            (t for t in sorted(names, key=len, reverse=True) if path == t or path.startswith((t + ".", t + "["))), None
        )
        return path if head is None else names[head] + path[len(head) :]

    return {rename(path): value for path, value in paths.items()}


def _check_signatures(left: Program, right: Program) -> None:
    used_left = [p for p, n in left.inputs.items() if nodes.tensor_val(n) is not None]
    used_right = [p for p, n in right.inputs.items() if nodes.tensor_val(n) is not None]
    if len(used_left) != len(used_right):
        raise MismatchError(
            f"before takes {len(used_left)} tensors ({', '.join(used_left)}), after takes {len(used_right)} "
            f"({', '.join(used_right)}): capture both with the same inputs"
        )
    _check_outputs(left, right)


def _check_outputs(left: Program, right: Program) -> None:
    outputs_left, outputs_right = _tensors(left), _tensors(right)
    if len(outputs_left) != len(outputs_right):
        raise MismatchError(
            f"before returns {len(outputs_left)} values ({', '.join(outputs_left)}), after returns "
            f"{len(outputs_right)} ({', '.join(outputs_right)}): let both return the same"
        )


def _tensors(one: Program) -> list[str]:
    """Return the paths of what is returned and may be a tensor; numbers may be constants on the other side."""
    may_be = {p: nodes.tensor_val(n) is not None or "val" not in n.meta for p, n in one.outputs.items()}
    return [p for p, may in may_be.items() if may and not p.startswith("state:")]


def concretise(one: Program, bound: inputs.Inputs) -> None:
    """Where shapes are symbolic or ``meta["val"]`` is missing, run the program once and note what its values are.

    The notes go to a copy of the graph: the caller's nodes are not touched.
    """
    if all(_is_concrete(n) for n in one.live):
        return
    copy = copied(one)
    try:
        values = run_program(
            copy, bound, [n for n in copy.live if n.op != "get_attr"], observe=lambda _, v: _as_meta(v)
        )
    except Exception:  # the run itself will say which node raises
        values = {}
    values.update((n, _as_meta(copy.held(n))) for n in copy.live if n.op == "get_attr" and values)
    for node, value in values.items():
        node.meta["val"] = value
    one.__dict__.update(copy.__dict__)


def _is_concrete(node: torch.fx.Node) -> bool:
    value = node.meta.get("val", ...)
    if value is ... and node.op != "get_attr":
        return False
    return not isinstance(value, torch.Tensor) or all(isinstance(d, int) for d in value.shape)


def _as_meta(value: Any) -> Any:
    return torch.utils._pytree.tree_map(
        lambda v: (
            torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device="meta")
            if isinstance(v, torch.Tensor) and v.layout == torch.strided
            else None  # sparse ones are compared where they become dense
            if isinstance(v, torch.Tensor)
            else v
        ),
        value,
    )


def redrawn(
    left: Program, right: Program, bound: inputs.Inputs, valid: torch.Tensor | None, notes: list[str]
) -> tuple[inputs.Inputs | None, bool]:
    """Return inputs with fresh padding, if there is padding and if it really is hidden from the valid outputs of
    before; and whether it leaks into those of after: then what moves of after is no reason to leave it out."""
    padded = inputs.padding(bound, valid)
    if padded is None:
        return None, False
    redrawn = inputs.redraw(bound, padded)
    if _moves_valid(left, bound, redrawn, padded):
        notes.append("the padded positions reach the valid outputs of before: they are compared like all others")
        return None, False
    notes.append(f"{int(padded.sum())} padded positions are left out of every measure")
    leaks = _moves_valid(right, bound, redrawn, padded)
    if leaks:
        notes.append("the padded positions reach the valid outputs of after, but not those of before")
    return redrawn, leaks


def _moves_valid(one: Program, bound: inputs.Inputs, redrawn: inputs.Inputs, padded: torch.Tensor) -> bool:
    """Whether fresh padding moves an output where nothing is padded. An output that cannot be run moves nothing."""
    wanted = list(one.outputs.values())
    try:
        plain, again = run_program(one, bound, wanted), run_program(one, redrawn, wanted)
    except Exception:  # the lanes will say which node raises
        return False
    for node in wanted:
        x, y = plain[node], again[node]
        if isinstance(x, torch.Tensor) and x.shape[:2] == padded.shape and x.is_floating_point():
            counts = ~padded.to(x.device)
            if not torch.equal(torch.nan_to_num(x[counts]), torch.nan_to_num(y[counts])):
                return True
    return False
