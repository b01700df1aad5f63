"""Launch a Triton kernel again without its front end, which takes longer than most of our kernels run.

The front end asks every argument for its type, alignment and divisibility, to choose among the compiled variants. Who
calls with a key that settles these things knows the variant already.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch

Grid = tuple[int, int]
_NARROW = 2**31  # from here on a number is passed in 64 bits, to another variant


class Launch:
    """A kernel with all its arguments but addresses and a few numbers, which it must not be specialised for.

    Its parameters are, in this order: `tensors`, numbers that vary, the numbers in `settled`, the `constants`.
    """

    def __init__(self, kernel: Any, settled: tuple[int, ...], constants: dict[str, Any], warps: int) -> None:
        self._kernel, self._settled, self._constants, self._warps = kernel, settled, constants, warps
        self._compiled: Any = None
        self._tail: tuple[Any, ...] = ()

    def __call__(self, grid: Grid, tensors: Sequence[torch.Tensor], varying: Sequence[int]) -> None:
        """Launch with tensors of the dtypes and alignments, and numbers of the widths, of the first call."""
        if self._compiled is not None:
            self._compiled[grid[0], grid[1], 1](*[t.data_ptr() for t in tensors], *varying, *self._tail)
            return
        made = self._kernel[grid](*tensors, *varying, *self._settled, **self._constants, num_warps=self._warps)
        if hasattr(made, "packed_metadata"):  # the interpreter compiles nothing
            names = [name for name in self._kernel.arg_names if name in self._constants]
            self._tail = (*self._settled, *(self._constants[name] for name in names))
            self._compiled = made


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
    return (value.dtype, value.shape, value.stride(), value.data_ptr() & 15, value.device.index)


def is_wide(*numbers: int) -> bool:
    """Whether one of the numbers is passed in 64 bits."""
    return max(numbers) >= _NARROW
