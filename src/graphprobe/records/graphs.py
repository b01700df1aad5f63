"""Records of graphs and of what is seen on their nodes: views, taps, lints, claims, replacements."""

from __future__ import annotations

import functools
from dataclasses import dataclass


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
    checksum: int | None = None  # of the bits and where they stand; None unless instrument(checksum=True) asked for it


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
