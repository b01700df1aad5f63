"""Whole files or none: what is written takes its place in one step, and replaces nothing but a plain file."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
import uuid
from pathlib import Path


def beside(target: str | os.PathLike[str]) -> Path:
    """Return where to write what `put` will move to `target`: in the same directory, with the same suffix."""
    real = Path(tempfile.gettempdir(), Path(target).name) if is_stream(target) else Path(os.path.realpath(target))
    return real.with_name(f".{real.stem}.{uuid.uuid4().hex[:8]}.partial{real.suffix}")


def put(partial: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Move a finished file to `target`. A link stays one, and a device or a pipe is given the bytes. Raises OSError."""
    if is_stream(target):
        with open(partial, "rb") as source, open(target, "ab") as sink:
            shutil.copyfileobj(source, sink)
        os.unlink(partial)
    else:
        os.chmod(partial, 0o666 & ~_umask())
        os.replace(partial, os.path.realpath(target))


def is_stream(target: str | os.PathLike[str]) -> bool:
    """Whether a path names a device, a pipe or an open file of this process, such as /dev/stdout."""
    if str(target).startswith(("/dev/", "/proc/")):
        return True
    try:
        return not stat.S_ISREG(os.stat(target).st_mode)
    except OSError:  # nothing is there yet
        return False


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
