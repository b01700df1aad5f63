"""Launch a Triton kernel again without its front end, which takes longer than most of our kernels run.

The front end asks every argument for its type, alignment and divisibility, to choose among the compiled variants. Who
calls with a key that settles these things knows the variant already.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch

Grid = tuple[int, int]
_NARROW = 2**31  # from here on a number is passed in 64 bits, to another variant


class Launch:
    """A kernel with all its arguments but addresses and a few numbers, which it must not be specialised for.

    Its parameters are, in this order: `tensors`, numbers that vary, the numbers in `settled`, the `constants`. Tensors
    of bool and of 8-bit floating types reach it as bytes.
    """

    def __init__(self, kernel: Any, settled: tuple[int, ...], constants: dict[str, Any], warps: int) -> None:
        self._kernel, self._settled, self._constants, self._warps = kernel, settled, constants, warps
        self._again: Callable[..., None] | None = None

    def __call__(self, grid: Grid, tensors: Sequence[torch.Tensor], varying: Sequence[int]) -> None:
        """Launch with tensors of the dtypes and alignments, and numbers of the widths, of the first call."""
        if self._again is not None:
            self._again(grid, [t.data_ptr() for t in tensors], varying)
            return
        taken = map(_taken, tensors)
        made = self._kernel[grid](*taken, *varying, *self._settled, **self._constants, num_warps=self._warps)
        if hasattr(made, "packed_metadata"):  # the interpreter compiles nothing
            names = [name for name in self._kernel.arg_names if name in self._constants]
            self._again = _launcher(made, (*self._settled, *(self._constants[name] for name in names)))


def _taken(tensor: torch.Tensor) -> torch.Tensor:
    eight = tensor.dtype.is_floating_point and tensor.dtype.itemsize == 1
    return tensor.view(torch.uint8) if eight or tensor.dtype is torch.bool else tensor


def _launcher(compiled: Any, tail: tuple[Any, ...]) -> Callable[..., None]:
    """Return what launches a compiled kernel on the device that is current now.

    ``compiled[grid]`` would make a function and look at Triton's hooks for every launch; this is how torch's own
    compiler launches. Nobody's hooks are called for it: they are for tools that count kernels by name.
    """
    from triton.runtime import driver

    stream, device = driver.active.get_current_stream, driver.active.get_current_device()
    run, function, packed = compiled.run, compiled.function, compiled.packed_metadata

    def launch(grid: Grid, addresses: Sequence[int], varying: Sequence[int]) -> None:
        run(grid[0], grid[1], 1, stream(device), function, packed, None, None, None, *addresses, *varying, *tail)

    return launch


class Launches:
    """The launches that are known, by all that they depend on."""

    def __init__(self, most: int = 4096) -> None:
        self._known: dict[Hashable, Any] = {}
        self._most = most

    def get(self, key: Hashable) -> Any:
        """Return what was noted under a key, None where nothing was."""
        return self._known.get(key)

    def note(self, key: Hashable, launch: Any) -> Any:
        """Note a launch, and return it."""
        if len(self._known) >= self._most:
            self._known.clear()
        self._known[key] = launch
        return launch


def kind(value: torch.Tensor) -> tuple[Hashable, ...]:
    """Return all of a tensor that a launch depends on."""
    if value.layout is not torch.strided:
        return (value.layout,)
    return (value.dtype, value.shape, value.stride(), value.data_ptr() & 15, value.get_device())


def is_wide(*numbers: int) -> bool:
    """Whether one of the numbers is passed in 64 bits."""
    return max(numbers) >= _NARROW
