"""Taps: every operation of a graph is observed while it runs, at the right moment, changing nothing."""

from __future__ import annotations

from graphprobe.taps.insertion import instrument_graph
from graphprobe.taps.probe import Probe, instrument
from graphprobe.taps.rows import Row, Table, read

__all__ = ["Probe", "Row", "Table", "instrument", "instrument_graph", "read"]
