"""The records that graphprobe hands around and writes: frozen, standard library only, JSON round-trip.

A saved report can be drawn again later, elsewhere, without torch and without a GPU, so nothing here may import torch.
Errors are relative L2 norms unless a field says otherwise; ``None`` means "not measured", never zero.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import types
import typing
from dataclasses import dataclass, field
from typing import Any, TypeVar

SCHEMA_VERSION = 1

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

#: How a transform of a run can end.
STATUSES = ("applied", "matched nothing", "disabled", "skipped", "failed")

R = TypeVar("R")


@dataclass(frozen=True)
class NodeView:
    """One node of a graph as pictures and reports see it."""

    name: str
    op: str  # placeholder, get_attr, call_function, call_method, call_module, output
    target: str  # qualified name: aten.add.Tensor, model.layers.0.weight, ...
    inputs: tuple[str, ...] = ()  # names of all input nodes, in argument order
    args: str = ""  # the arguments in short text form
    module_path: str = ""  # "model.layers.3.self_attn"; empty at the root
    module_type: str = ""  # class name of that module
    shape: tuple[int | str, ...] | None = None  # symbolic dimensions as strings
    dtype: str | None = None  # "bfloat16", "int64", ...
    source: str = ""  # "modeling_llama.py:257 in forward"
    has_val: bool = True  # False where meta["val"] is missing though the node makes a value
    is_view: bool = False  # makes no new values
    id: str = ""  # "lineage:index", empty where unknown


@dataclass(frozen=True)
class GraphView:
    """A graph without weights or torch: enough to draw it and to talk about it."""

    name: str = ""
    nodes: tuple[NodeView, ...] = ()

    @functools.cached_property
    def by_name(self) -> dict[str, NodeView]:
        """Map a node's name to the node."""
        return {node.name: node for node in self.nodes}


@dataclass(frozen=True)
class Tap:
    """Statistics of one operation's value; ``derived`` rows are views and carry none of their own."""

    name: str
    op: str
    module_path: str
    shape: tuple[int, ...]
    dtype: str
    min: float | None = None
    max: float | None = None
    mean: float | None = None
    rms: float | None = None
    nan: int = 0
    inf: int = 0
    zeros: int = 0
    derived: bool = False
    of: str = ""  # for derived rows: the tap whose storage this is


@dataclass(frozen=True)
class Lint:
    """One defect of a graph, found without running it."""

    rule: str
    node: str
    message: str
    fix: str
    target: str = ""
    source: str = ""
    module_path: str = ""
    transform: str = ""  # the transform that caused it, where that is known


#: How the exact lanes evaluate an operator, from strongest to weakest.
EXACT_RULES = {
    "view": "makes no values of its own",
    "float64": "its own kernel on float64 operands",
    "adapted": "its own kernel on float64 operands, defaults that depend on a dtype filled in from the native one",
    "reference": "a float64 reference takes its place",
    "decomposition": "its kernel refuses float64: torch's decomposition takes its place",
    "bodies": "control flow: its bodies are evaluated exactly, operation by operation",
    "replayed": "random: both sides replay one generator state",
    "native": "works on bit patterns: the native value is taken, and only the size of its rounding is judged",
    "statistics": "no float64 form: only the size of its rounding is judged (graphprobe.exact_rule registers one)",
    "unknown": "cannot be run here",
}


@dataclass(frozen=True)
class ExactRow:
    """How exact arithmetic evaluates one operator; ``rule`` is one of EXACT_RULES."""

    operator: str
    rule: str
    note: str = ""  # the reference, or why there is no float64 form
    count: int = 0  # how many nodes of the graph call it


@dataclass(frozen=True)
class ClaimRecord:
    """A statement that node ``after`` must equal node ``before``; ``evidence`` says why."""

    before: str
    after: str
    evidence: str
    certain: bool = True
    confidence: float = 1.0  # 0..1, of this kind of evidence
    view: str = ""  # how the one is shown as the other, where they differ in layout or hold a slice


@dataclass(frozen=True)
class Leftover:
    """A value-making operation that nothing claims, and why: eliminated, inside a fused operation, a tie, ..."""

    node: str
    why: str
    detail: str = ""


@dataclass(frozen=True)
class Replacement:
    """While a transform was watched, all uses of node `old` moved to `new`: its author's claim that they are equal."""

    old: str
    new: str
    transform: str = ""


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
        return _parse(Report, text, "verdict")

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


@dataclass(frozen=True)
class RunStep:
    """One transform of a run: what came of it, what it did to the graph, and what the checks found after it."""

    name: str
    transform: str  # its text form, with its options
    stage: str
    status: str  # one of STATUSES
    matches: tuple[str, ...] = ()  # one name (a module path or node) for each place that matched
    missed: int = 0  # places that it looked at and left alone, where others matched
    reason: str = ""  # why it matched nothing or not there, or was not run to its end
    near_miss: str = ""  # the node where it came nearest to a match
    created: tuple[str, ...] = ()
    erased: tuple[str, ...] = ()
    rewritten: tuple[str, ...] = ()
    replacements: tuple[Replacement, ...] = ()
    nodes_before: int = 0
    nodes_after: int = 0
    seconds: float = 0.0  # of the transform itself
    overhead: float = 0.0  # seconds of clean-up, checks and dumps around it
    weights_before: int = 0  # bytes of the tensors that the graph owns
    weights_after: int = 0
    memory_before: int = 0  # bytes: allocated on the accelerator, on a CPU the resident memory of the process
    memory_after: int = 0
    lints: tuple[Lint, ...] = ()  # defects that were not there before it, healed later or not
    notes: tuple[str, ...] = ()
    report: Report | None = None  # the graph before it against the graph after it, where that was asked for
    error: str = ""  # the traceback of what ended it
    dump: str = ""  # the name of its dump, without directory

    @property
    def ok(self) -> bool:
        """Whether nothing went wrong here."""
        return self.status != "failed" and not self.lints and (self.report is None or self.report.ok)


@dataclass(frozen=True)
class RunReport:
    """What a pipeline did to a model, step by step. `gm` is the transformed graph; it is not part of the JSON form."""

    pipeline: str  # the text form that reproduces the run
    steps: tuple[RunStep, ...] = ()
    report: Report | None = None  # the captured graph against the last one, where that was asked for
    notes: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    dump_dir: str = ""
    seconds: float = 0.0
    version: int = SCHEMA_VERSION
    gm: Any = field(default=None, repr=False, compare=False, metadata={"unsaved": True})

    @property
    def ok(self) -> bool:
        """Whether no transform failed, no check found a defect, and every comparison passed."""
        return all(step.ok for step in self.steps) and (self.report is None or self.report.ok)

    @property
    def first(self) -> RunStep | None:
        """The first transform with which something went wrong, or None."""
        return next((step for step in self.steps if not step.ok), None)

    @property
    def events(self) -> tuple[Replacement, ...]:
        """All replacements of all steps, in order: what `graphprobe.diff` takes as ``events=``."""
        return tuple(event for step in self.steps for event in step.replacements)

    @property
    def exit_code(self) -> int:
        """0 all is well, 1 a check or a comparison found something, 2 a transform failed or could not be judged."""
        reports = [step.report for step in self.steps] + [self.report]
        unjudged = any(report is not None and report.exit_code == 2 for report in reports)
        if unjudged or any(step.status == "failed" for step in self.steps):
            return 2
        return 0 if self.ok else 1

    def to_json(self, indent: int | None = None) -> str:
        """Return the report as JSON text; non-finite numbers become strings."""
        return json.dumps(to_data(self), indent=indent)

    @staticmethod
    def from_json(text: str) -> RunReport:
        """Read a report that `to_json` wrote. Raises ValueError where it is not one."""
        return _parse(RunReport, text, "pipeline")

    def __str__(self) -> str:
        from graphprobe.render import runs

        return runs.text(self)


def _parse(kind: type[R], text: str, key: str) -> R:
    data = json.loads(text)
    if not isinstance(data, dict) or key not in data:
        raise ValueError(f"this JSON is no graphprobe {kind.__name__}: it has no {key!r}")
    if data.get("version", 0) > SCHEMA_VERSION:
        raise ValueError(
            f"this report has schema version {data['version']}, this graphprobe reads up to "
            f"{SCHEMA_VERSION}: update graphprobe"
        )
    return from_data(kind, data)


def to_data(value: Any) -> Any:
    """Turn a record into what `json.dumps` takes; NaN and infinities become the strings 'nan', 'inf', '-inf'."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        saved = [f for f in dataclasses.fields(value) if not f.metadata.get("unsaved")]
        return {f.name: to_data(getattr(value, f.name)) for f in saved}
    if isinstance(value, dict):
        return {str(k): to_data(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_data(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def from_data(kind: type[R], data: dict[str, Any]) -> R:
    """Rebuild a record of class `kind` from `to_data`'s output; unknown keys are ignored."""
    hints = _hints(typing.cast(Any, kind))
    known = {f.name for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    return kind(**{k: _convert(hints[k], v) for k, v in data.items() if k in known})


def _convert(hint: Any, value: Any) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        plain = [a for a in args if a is not type(None)]
        return _convert(plain[0], value) if len(plain) == 1 else value
    if hint is float and isinstance(value, (str, int)):
        return float(value)
    if origin is tuple:
        if len(args) == 2 and args[1] is Ellipsis:
            return tuple(_convert(args[0], v) for v in value)
        return tuple(_convert(a, v) for a, v in zip(args, value, strict=True))
    if origin is dict:
        return {k: _convert(args[1], v) for k, v in value.items()}
    if dataclasses.is_dataclass(hint):
        return from_data(typing.cast(type, hint), value)
    return value
