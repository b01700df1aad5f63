"""The errors a user can cause, and the sentence each of them says.

Every message says what is wrong, where, and how to mend it. The command line prints such an error without a
traceback and exits with 2; an exception of any other class is a defect of graphprobe and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class GraphprobeError(Exception):
    """Base of everything a user can mend."""


class CaptureError(GraphprobeError):
    """A model could not be exported to an FX graph."""


class FxFileError(GraphprobeError):
    """A file is missing, is not an ``.fx`` file, is damaged, or was written by a newer version."""


class InputError(GraphprobeError):
    """The inputs do not fit a graph: number, name, shape, dtype or device."""


class MismatchError(GraphprobeError):
    """Two graphs cannot be compared: other inputs, other outputs."""


class OperatorError(GraphprobeError):
    """A graph holds an operator that cannot be run here."""


class RenderError(GraphprobeError):
    """A picture could not be drawn."""


class PipelineError(GraphprobeError):
    """A pipeline or a transform is not what it should be."""


class DumpError(GraphprobeError):
    """A dump cannot be read, or a directory for dumps cannot be used."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the nearest known name, else an empty string."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {found[0]!r}?" if found else ""
