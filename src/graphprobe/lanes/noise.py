"""Rounding-sized noise for the exact lanes, the same whenever it is drawn from the same seed."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from graphprobe import nodes
from graphprobe.lanes import control, exact

U64 = 2.0**-53
_MASK = -1e30


class Noise:
    """Draws numbers where the values are: a region may hold values of several devices, or weights alone."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}

    def beside(self, value: torch.Tensor) -> torch.Tensor:
        """Return xi ~ U(-1, 1) in float64, of the shape and on the device of `value`."""
        device = value.device
        if device not in self._generators:
            self._generators[device] = torch.Generator(device=device).manual_seed(self._seed)
        drawn = torch.rand(value.shape, generator=self._generators[device], dtype=torch.float64, device=device)
        return drawn * 2 - 1


class Jitter:
    """Multiplies every float64 number by 1 + size xi, xi ~ U(-1, 1); without noise it does nothing."""

    def __init__(self, noise: Noise | None, size: float) -> None:
        self.noise, self.size = noise, size

    def of(self, node: Node, value: Any) -> Any:
        """Return what a node computed, with noise where it rounds."""
        unrounded = nodes.is_view(node) or nodes.schema_name(node) in exact.UNROUNDED or control.is_control(node)
        return value if unrounded else self(value)

    def __call__(self, value: Any) -> Any:
        if self.noise is None:
            return value
        if isinstance(value, (tuple, list)):
            return tuple(self(v) for v in value)
        return jittered(value, self.noise, self.size)


def jittered(value: Any, noise: Noise, size: float) -> Any:
    """Multiply a float64 tensor by 1 + size xi, xi ~ U(-1, 1); anything else stays."""
    if not isinstance(value, torch.Tensor) or value.dtype not in (torch.float64, torch.complex128):
        return value
    noisy = value * (1 + size * noise.beside(value))
    if value.is_complex():
        return noisy
    # the largest number of a dtype is a mask: natively it swallows what is added, rounding included
    return torch.where(value <= _MASK, value, noisy)
