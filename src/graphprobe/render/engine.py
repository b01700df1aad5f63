"""DOT becomes a picture: a layout engine is found, run under a time limit, and helped when it is too slow."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path

from graphprobe import placing
from graphprobe.errors import RenderError

FORMATS = ("png", "svg")
#: Layout effort, from best to quickest: shorter searches, then straight lines instead of splines.
_EFFORTS: tuple[tuple[str, ...], ...] = ((), ("-Gnslimit=2", "-Gnslimit1=2", "-Gsplines=line"))
_INSTALL = "install one with pip install 'graphprobe[pictures]' (graphviz-pure, no root needed) or apt install graphviz"


def find_engine() -> str | None:
    """Return the path of a layout engine: a system `dot`, else graphviz-pure from pip, else None."""
    system = shutil.which("dot")
    if system:
        return system
    scripts = [sysconfig.get_path("scripts"), str(Path(sys.executable).parent)]
    places = os.pathsep.join([os.environ.get("PATH", ""), *scripts])
    return shutil.which("graphviz-pure", path=places)


def draw(
    dot: str,
    path: str | os.PathLike[str] | None = None,
    format: str = "png",
    *,
    seconds: float = 30.0,
    coarser: Sequence[Callable[[], str]] = (),
) -> bytes:
    """Lay out DOT text and return the picture as PNG or SVG bytes; with `path`, write it there as well.

    `seconds` limits each attempt. When the layout takes longer it is tried with less effort, then each of `coarser`
    is asked for a simpler picture. Raises RenderError where no engine is installed, the DOT is wrong, or nothing
    was quick enough; with `path`, the DOT text then lies beside it, and the error names it.
    """
    if format not in FORMATS:
        raise RenderError(f"cannot draw {format!r}: choose one of {', '.join(FORMATS)}, or write the .dot")
    engine = find_engine()
    if engine is None:
        raise RenderError(f"no layout engine found; {_INSTALL}. {_keep(dot, path)}".strip())
    attempts: list[tuple[Callable[[], str], tuple[str, ...]]] = [(lambda: dot, effort) for effort in _EFFORTS]
    attempts += [(simpler, ()) for simpler in coarser]
    for text, effort in attempts:
        picture = _run(engine, text(), format, effort, seconds, dot, path)
        if picture is not None:
            if path is not None:
                write(path, picture)
            return picture
    raise RenderError(
        f"{os.path.basename(engine)} found no layout within {seconds:g} s; draw less (one layer, a smaller limit) or "
        f"allow more time. {_keep(dot, path)}".strip()
    )


def _run(
    engine: str,
    text: str,
    format: str,
    effort: tuple[str, ...],
    seconds: float,
    dot: str,
    path: str | os.PathLike[str] | None,
) -> bytes | None:
    """Return the picture, or None where the time was up."""
    command = [engine, "-Kdot", f"-T{format}", *effort]
    try:
        done = subprocess.run(command, input=text.encode(), capture_output=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return None
    except OSError as error:
        raise RenderError(f"cannot run the layout engine {engine}: {error}; {_INSTALL}. {_keep(dot, path)}") from error
    if done.returncode != 0 or not done.stdout:
        said = re.sub(r"\s+", " ", done.stderr.decode(errors="replace")).strip()[:300] or "it wrote nothing"
        raise RenderError(f"the layout engine {engine} failed: {said}. {_keep(dot, path)}".strip())
    return done.stdout


def _keep(dot: str, path: str | os.PathLike[str] | None) -> str:
    """Write the DOT text beside a picture that could not be drawn, and say where."""
    if path is None:
        return ""
    beside = Path(path).with_suffix(".dot")
    write(beside, dot.encode())
    return f"The graph itself is in {beside}"


def write(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file in one step, so that an interrupted run leaves no half-written one. Raises RenderError."""
    target = Path(path)
    partial = placing.beside(target)
    try:
        partial.write_bytes(data)
        placing.put(partial, target)
    except OSError as error:
        folder = "; does the folder exist?" if isinstance(error, FileNotFoundError) else ""
        raise RenderError(f"cannot write {target}: {error.strerror}{folder}") from error
    finally:  # also on Ctrl-C
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def write_picture(
    path: str | os.PathLike[str], dot: str, *, coarser: Sequence[Callable[[], str]] = (), seconds: float = 30.0
) -> None:
    """Write DOT text as what the suffix says: ``.png``, ``.svg``, ``.dot`` or ``.gv``. Raises RenderError."""
    suffix = Path(path).suffix.lower()
    if suffix in (".dot", ".gv"):
        write(path, dot.encode())
    elif suffix.removeprefix(".") in FORMATS:
        draw(dot, path, suffix.removeprefix("."), seconds=seconds, coarser=coarser)
    else:
        raise RenderError(f"cannot tell what to write to {path}: name it .png, .svg or .dot")
