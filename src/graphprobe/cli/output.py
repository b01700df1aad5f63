"""What commands share for writing: whole files or none, JSON, and a progress bar on a terminal."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from graphprobe import placing
from graphprobe.errors import InputError
from graphprobe.records import to_data


@contextmanager
def whole_file(path: str | Path) -> Iterator[str]:
    """Give a temporary path with the same suffix beside `path`; it becomes `path` only when the block ends well.

    Raises InputError where the directory does not exist.
    """
    target = Path(path)
    check_target(path)
    partial = placing.beside(target)
    try:
        yield str(partial)
        placing.put(partial, target)
    except OSError as error:
        raise InputError(f"cannot write {target}: {error.strerror or error}") from error
    finally:  # also on Ctrl-C
        with suppress(OSError):
            partial.unlink()


def check_target(path: str | Path | None, *suffixes: str) -> None:
    """Raise InputError where a file cannot be written there, or has none of these suffixes: before the long work."""
    if path is None:
        return
    target = Path(path)
    if not target.name or str(path).endswith(("/", os.sep)) or target.is_dir():
        raise InputError(f"cannot write {str(path)!r}: it is a directory; give a file name in it")
    if placing.is_stream(target):
        return
    if not target.parent.is_dir():
        raise InputError(f"cannot write {target}: there is no directory {target.parent}; make it first")
    if not os.access(target.parent, os.W_OK):
        raise InputError(f"cannot write {target}: the directory {target.parent} cannot be written to")
    if suffixes and target.suffix.lower() not in suffixes:
        raise InputError(f"cannot tell what to write to {target}: name it {', '.join(suffixes)}")


def write_text(path: str | Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with whole_file(path) as partial:
        Path(partial).write_text(text, encoding="utf-8")


def print_json(value: Any) -> None:
    """Print records, lists and dicts as indented JSON."""
    print(json.dumps(to_data(value), indent=2))


class Progress:
    """A progress bar on stderr, silent when that is no terminal: call it with (done, total, what); a context manager.

    It appears after half a second and is redrawn at most ten times a second, so quick work stays quiet.
    """

    WIDTH = 24

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._visible = self._stream.isatty()
        self._start = time.monotonic()
        self._drawn_at = self._start + 0.4

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._write("")

    def __call__(self, done: int, total: int, what: str = "") -> None:
        """Say that `done` of `total` steps are behind us and that `what` comes next."""
        now = time.monotonic()
        if not self._visible or now - self._drawn_at < 0.1:
            return
        self._drawn_at = now
        share = min(1.0, done / total) if total > 0 else 0.0
        filled = round(self.WIDTH * share)
        bar = "#" * filled + "-" * (self.WIDTH - filled)
        self._write(f"[{bar}] {100 * share:3.0f} %  {now - self._start:4.0f} s  {what[:48]}")

    def _write(self, line: str) -> None:
        if self._visible:
            self._stream.write(f"\r\x1b[K{line}")
            self._stream.flush()
