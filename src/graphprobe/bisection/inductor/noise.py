"""Rounding-sized noise: what a computation may return when every floating result is off by a rounding error."""

from __future__ import annotations

from typing import Any

import torch
import torch.utils._pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from graphprobe.lanes import exact


def shaken(value: Any, noise: torch.Generator) -> Any:
    """Return a floating tensor with each element times ``1 + u xi``, ``xi ~ U(-1, 1)``; anything else as it is."""
    if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.dtype.itemsize < 2:
        return value
    unit = torch.finfo(value.dtype).eps / 2
    draw = torch.rand(value.shape, generator=noise, dtype=torch.float64).to(value.device)
    return (value.double() * (1 + unit * (2 * draw - 1))).to(value.dtype)


def narrows(source: Any, value: Any) -> bool:
    """Whether a cast goes to a smaller floating dtype: exact arithmetic leaves it out, natively it rounds."""
    both = [t for t in (source, value) if isinstance(t, torch.Tensor) and t.is_floating_point()]
    return len(both) == 2 and both[1].dtype.itemsize < both[0].dtype.itemsize


class Raising(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Makes every cast to a floating dtype, and every constant of one, float64 while a model runs in float64."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.name != "aten::view":  # the bits of a value are read, which is no cast
            args = tuple(exact.lift_dtype(arg) for arg in args)
            kwargs = {name: exact.lift_dtype(arg) for name, arg in kwargs.items()}
        return func(*args, **kwargs)


class Shaking(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Shakes every floating result of an operator that rounds while a model runs eagerly."""

    def __init__(self, seed: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.noise = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        schema = func._schema
        name = schema.name.removesuffix("_")
        rounds = name not in exact.UNROUNDED or narrows(args[0] if args else None, result)
        if not rounds:
            return result
        if not any(output.alias_info for output in schema.returns):
            return pytree.tree_map(lambda value: shaken(value, self.noise), result)
        if schema.is_mutable and isinstance(result, torch.Tensor):
            result.copy_(shaken(result, self.noise))  # a view is no new value, what was written in place is one
        return result
