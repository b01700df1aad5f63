"""How numbers, names and tables are written, the same in every text and picture."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Sequence

from graphprobe.render.labels import clip

_NUMBER = re.compile(r"[-+>]? ?[\d,.]+(e[-+]\d+)?( %)?$|-$|[-+]?(nan|inf)$")
WIDTH = 100  # columns of every text


def error(value: float | None) -> str:
    """Return an error to two digits: '9.2e-04'; '0' only for exactly zero, '-' for what was not measured."""
    if value is None:
        return "-"
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    return f"{value:.1e}"


def size(value: float | None) -> float:
    """Return an error as something to sort by: what was not measured is smallest, NaN is largest."""
    if value is None:
        return -1.0
    return math.inf if math.isnan(value) else value


def made(introduced: float | None, exact: float | None) -> float | None:
    """Return the error that was made at one place: natively or in exact arithmetic, whichever is larger.

    A bug that happens to round away on these inputs is no smaller for it.
    """
    return introduced if size(introduced) >= size(exact) else exact


def share(value: float | None) -> str:
    """Return a share of one as per cent: '99.8 %'; '-' for what was not measured."""
    if value is None:
        return "-"
    digits = 0 if value in (0.0, 1.0) else 1
    shown = f"{100 * value:.{digits}f} %"
    # 0.9999 must not read as all of it
    return "> 99.9 %" if shown == "100.0 %" and value < 1 else shown


def statistic(value: float | None) -> str:
    """Return a statistic to three digits, '' for what was not measured."""
    return "" if value is None else f"{value:.3g}"


def count(number: int, noun: str, plural: str = "") -> str:
    """Return '1 operation', '2,190 operations'."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def flat(text: str) -> str:
    """Return the text on one line, without characters that a terminal would obey."""
    return " ".join(_printable(text).split())


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)


def wrap(text: str, indent: str = "", width: int = WIDTH) -> list[str]:
    """Break a text into lines of at most `width` columns, each behind `indent`."""
    return textwrap.wrap(_printable(text), width, initial_indent=indent, subsequent_indent=indent) or [indent.rstrip()]


def table(
    headers: Sequence[str], rows: Sequence[Sequence[str]], flexible: Sequence[int] = (), width: int = WIDTH
) -> str:
    """Lay rows out below their headers in at most `width` columns; `flexible` columns are shortened first.

    Columns of numbers are aligned to the right.
    """
    from tabulate import tabulate

    cells = [[flat(cell) for cell in row] for row in rows]
    # tabulate pads every header by two columns
    narrowest = [len(header) + 2 for header in headers]
    widths = [max(narrowest[i], *(len(row[i]) for row in cells), 0) for i in range(len(headers))]
    spare = width - 2 * (len(headers) - 1)
    for columns in (flexible, range(len(headers))):
        while sum(widths) > spare and any(widths[i] > narrowest[i] for i in columns):
            widths[max(columns, key=lambda i: widths[i] - narrowest[i])] -= 1
    short = [[clip(cell, widths[i]) for i, cell in enumerate(row)] for row in cells]
    align = ["right" if _numeric([row[i] for row in cells]) else "left" for i in range(len(headers))]
    laid: str = tabulate(
        short, headers=list(headers), tablefmt="simple", colalign=align if rows else None, disable_numparse=True
    )
    return laid


def _numeric(cells: Sequence[str]) -> bool:
    return bool(cells) and all(not cell or _NUMBER.match(cell) for cell in cells)


def hang(head: str, body: str) -> list[str]:
    """Break a text into lines that stand behind its head."""
    pad = " " * (len(head) or 2)
    lines = wrap(body, pad)
    return [head + lines[0].removeprefix(pad), *lines[1:]]


def clip_line(line: str) -> str:
    """Shorten a line to the width of a text in its middle."""
    return clip(flat(line), WIDTH)
