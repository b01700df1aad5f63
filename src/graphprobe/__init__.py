"""graphprobe finds the operation that makes two versions of a model disagree, and proves it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# name -> module that holds it, loaded at first use so that `graphprobe --help` need not import torch. No submodule may
# bear the name of a public function: importing the one would hide the other.
_PUBLIC = {
    "capture": "capturing",
    "save": "fxfile",
    "load": "fxfile",
    "instrument": "taps",
    "diff": "api",
    "run": "running",
    "bisect": "bisection.entry",
    "lint": "linting",
    "exact_rule": "lanes.exact",
    "view": "graphview",
    "Report": "records",
    "Finding": "records",
    "Coverage": "records",
    "Tap": "records",
    "Lint": "records",
    "RunReport": "records",
    "RunStep": "records",
    "Bisection": "bisection.records",
    "BisectStep": "bisection.records",
    "GraphprobeError": "errors",
    "testing": "",
}

if TYPE_CHECKING:
    from graphprobe.api import diff as diff
    from graphprobe.bisection.entry import bisect as bisect
    from graphprobe.bisection.records import Bisection as Bisection
    from graphprobe.bisection.records import BisectStep as BisectStep
    from graphprobe.capturing import capture as capture
    from graphprobe.errors import GraphprobeError as GraphprobeError
    from graphprobe.fxfile import load as load
    from graphprobe.fxfile import save as save
    from graphprobe.graphview import view as view
    from graphprobe.lanes.exact import exact_rule as exact_rule
    from graphprobe.linting import lint as lint
    from graphprobe.records import Coverage as Coverage
    from graphprobe.records import Finding as Finding
    from graphprobe.records import Lint as Lint
    from graphprobe.records import Report as Report
    from graphprobe.records import RunReport as RunReport
    from graphprobe.records import RunStep as RunStep
    from graphprobe.records import Tap as Tap
    from graphprobe.running import run as run
    from graphprobe.taps import instrument as instrument

__all__ = [*_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'graphprobe' has no attribute {name!r}")
    home = _PUBLIC[name]
    if not home:
        return importlib.import_module(f"graphprobe.{name}")
    value = getattr(importlib.import_module(f"graphprobe.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
