"""The answer of a comparison: regions, findings, coverage, and the report that holds them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from graphprobe.records.comparisons import Comparison
from graphprobe.records.graphs import ClaimRecord, GraphView
from graphprobe.records.plain import SCHEMA_VERSION, parse, to_data

#: From harmless to grave; the verdict of a report is that of its gravest standing finding.
VERDICTS = (
    "identical",
    "rounding",
    "unknown",
    "quantization",
    "precision",
    "semantic",
    "nonfinite",
    "structural",
)


@dataclass(frozen=True)
class RegionRow:
    """One judged region: the claimed output on each side and what was measured there."""

    before: str
    after: str
    op: str
    module_path: str
    verdict: str
    introduced: float | None
    total: float | None
    exact: float | None
    floor: float | None
    evidence: str
    size_before: int  # operations inside the region on each side, views included
    size_after: int
    shape: tuple[int, ...] = ()
    dtype: str = ""
    rule: str = ""
    spread: float | None = None  # S of judge rule 1: exact difference over float64 noise
    note: str = ""
    details: Comparison | None = None  # both versions' own values here; None unless they were asked for


@dataclass(frozen=True)
class Finding:
    """One judged region that is worth a word."""

    kind: str  # one of VERDICTS
    before: tuple[str, ...]  # names of the region's operations in `before`, in graph order
    after: tuple[str, ...]
    module_path: str
    op: str  # target of the region's culprit: the first operation without an equal partner
    introduced: float | None  # relative L2 error made here, on before's own inputs
    total: float | None  # relative L2 error accumulated up to here
    exact: float | None  # relative L2 difference in exact arithmetic
    floor: float | None  # relative L2 rounding error of before itself
    cures: float | None = None  # 0..1: share of the output error gone when only this region is replaced
    located: bool = True
    rule: str = ""  # the judge's rule that decided
    better: str | None = None  # "before", "after": the side nearer to exact arithmetic
    hint: str = ""  # "looks like ..."
    explanation: str = ""  # two sentences for a newcomer
    culprit: str = ""  # name of the culprit node, in after where it has one, else in before
    source: str = ""  # source line of the culprit
    outputs: tuple[str, str] = ("", "")  # the claimed pair (before, after) that closes the region
    frontier: tuple[tuple[str, str], ...] = ()  # the pairs (before, after) that open it
    spread: float | None = None
    transform: str = ""  # the transform that made the culprit, where that is known
    causal: bool = True
    accepted: str = ""  # the accept= rule that covers it
    inputs: int = 0  # which of several input sets showed it
    details: Comparison | None = None  # both versions' own values where the region closes; None unless asked for


#: A region of at most so many value-making operations is judged closely, and its operation is named.
SMALL_REGION = 16


@dataclass(frozen=True)
class Coverage:
    """How much of the two graphs was compared, and what was not."""

    compared: int = 0  # value-making operations of after with a judged claim
    derived: int = 0  # views
    inside: int = 0  # value-making operations inside a judged region
    pardoned: int = 0
    unknown: int = 0
    unmatched_before: int = 0
    unmatched_after: int = 0
    fraction: float = 0.0  # compared / value-making operations of after
    resolution: float = 0.0  # share in a judged region of at most 16 value-making operations
    largest: str = ""  # the output of the largest region, and its size
    evidence: dict[str, int] = field(default_factory=dict)
    dont_care: int = 0  # elements left out (padding, fully masked rows)
    left_before: dict[str, int] = field(default_factory=dict)  # why nothing claims them: eliminated, fused, rewritten
    left_after: dict[str, int] = field(default_factory=dict)  # added, fused, rewritten
    unmatched: tuple[str, ...] = ()  # names of value-making operations of after in no judged region
    eliminated: tuple[str, ...] = ()  # operations of before without a partner that reach no region


@dataclass(frozen=True)
class OutputRow:
    """One graph output compared."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    error: float | None  # relative L2
    max_abs: float | None
    identical: bool
    details: Comparison | None = None  # None unless asked for


@dataclass(frozen=True)
class Report:
    """The answer of a diff: a verdict, its findings, and everything needed to draw and to check it."""

    verdict: str
    findings: tuple[Finding, ...] = ()
    coverage: Coverage = field(default_factory=Coverage)
    regions: tuple[RegionRow, ...] = ()
    outputs: tuple[OutputRow, ...] = ()
    before: GraphView = field(default_factory=GraphView)
    after: GraphView = field(default_factory=GraphView)
    claims: tuple[ClaimRecord, ...] = ()
    notes: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    allow: tuple[str, ...] = ()
    min_coverage: float = 0.9
    command: str = ""
    seconds: float = 0.0
    version: int = SCHEMA_VERSION

    @property
    def first(self) -> Finding | None:
        """The earliest causal finding of the verdict's kind, or None."""
        standing = [f for f in self.findings if f.causal and not f.accepted and f.kind == self.verdict]
        return standing[0] if standing else None

    @property
    def ok(self) -> bool:
        """Whether the two graphs may be exchanged: identical, rounding, or what the caller allowed."""
        if self.verdict in ("identical", "rounding"):
            return True
        standing = [f for f in self.findings if f.causal and not f.accepted]
        return self.verdict in self.allow and all(f.kind in ("identical", "rounding", *self.allow) for f in standing)

    @property
    def exit_code(self) -> int:
        """0 the same, 1 different, 2 could not be judged."""
        if self.ok:
            return 0
        return 2 if self.verdict == "unknown" else 1

    def to_json(self, indent: int | None = None) -> str:
        """Return the report as JSON text; non-finite numbers become strings."""
        return json.dumps(to_data(self), indent=indent)

    @staticmethod
    def from_json(text: str) -> Report:
        """Read a report that `to_json` wrote. Raises ValueError where it is not one."""
        return parse(Report, text, "verdict")

    def to_html(self, path: str) -> None:
        """Write the report as one self-contained HTML file."""
        from graphprobe import render

        render.write_html(self, path)

    def render(self, path: str) -> None:
        """Write the picture of the first diverging subgraph: ``.png``, ``.svg`` or ``.dot``."""
        from graphprobe import render

        render.write_divergence(self, path)

    def __str__(self) -> str:
        from graphprobe import render

        return render.text(self)
