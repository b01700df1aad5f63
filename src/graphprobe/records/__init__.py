"""The records that graphprobe hands around and writes: frozen, standard library only, JSON round-trip.

A saved report can be drawn again later, elsewhere, without torch and without a GPU, so nothing here may import torch.
Errors are relative L2 norms unless a field says otherwise; ``None`` means "not measured", never zero.
"""

from graphprobe.records.comparisons import Comparison
from graphprobe.records.graphs import (
    EXACT_RULES,
    ClaimRecord,
    ExactRow,
    GraphView,
    Leftover,
    Lint,
    NodeView,
    Replacement,
    Tap,
)
from graphprobe.records.plain import SCHEMA_VERSION, from_data, to_data
from graphprobe.records.reports import SMALL_REGION, VERDICTS, Coverage, Finding, OutputRow, RegionRow, Report
from graphprobe.records.runs import STATUSES, RunReport, RunStep

__all__ = [
    "EXACT_RULES",
    "SCHEMA_VERSION",
    "SMALL_REGION",
    "STATUSES",
    "VERDICTS",
    "ClaimRecord",
    "Comparison",
    "Coverage",
    "ExactRow",
    "Finding",
    "GraphView",
    "Leftover",
    "Lint",
    "NodeView",
    "OutputRow",
    "RegionRow",
    "Replacement",
    "Report",
    "RunReport",
    "RunStep",
    "Tap",
    "from_data",
    "to_data",
]
