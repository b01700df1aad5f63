"""Where the devices that a file names are found on this machine."""

from __future__ import annotations

from typing import Any

import torch

from graphprobe.errors import FxFileError


class Devices:
    """Maps a device's name in a file to the device to use, and notes where that is another one."""

    def __init__(self, wanted: str | torch.device | None, notes: list[str]) -> None:
        self._wanted = None if wanted is None else _existing(wanted)
        self._notes = notes
        self._known: dict[str, torch.device] = {}

    def __call__(self, name: str) -> torch.device:
        if name not in self._known:
            recorded = torch.device(name)
            found = recorded if recorded.type == "meta" else self._wanted or _available(recorded)
            if self._wanted is None and found != recorded:
                self._notes.append(f"saved on {recorded}, which this machine does not have; loaded on {found}")
            self._known[name] = found
        return self._known[name]


def _existing(wanted: str | torch.device) -> torch.device:
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        raise FxFileError(f"device={wanted!r} is no device: {str(error).splitlines()[0]}") from error
    if device.type != "meta" and _available(device) != device:
        raise FxFileError(f"device={str(wanted)!r} is not available on this machine")
    return device


def _available(device: torch.device) -> torch.device:
    if device.type == "cpu":
        return device
    module: Any = getattr(torch, device.type, None)
    count = module.device_count() if hasattr(module, "is_available") and module.is_available() else 0
    if not count:
        return torch.device("cpu")
    return device if (device.index or 0) < count else torch.device(device.type)
