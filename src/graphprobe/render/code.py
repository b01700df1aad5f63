"""What a region computes, as lines that read like Python: the quickest way to see what a transform changed."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from graphprobe.records import Finding, GraphView, NodeView, Report
from graphprobe.render.labels import dims, dtype, short_op
from graphprobe.render.numbers import count
from graphprobe.render.wiring import CALLS

_LISTED = 8  # lines of one side
_REFERENCE = re.compile(r"%([A-Za-z_]\w*)")


@dataclass(frozen=True)
class CodeLine:
    """One operation: ``text`` is the call, ``made`` its shape and dtype; for a gap `name` is ''."""

    name: str
    text: str
    made: str = ""
    culprit: bool = False


def region_code(report: Report, finding: Finding) -> tuple[tuple[CodeLine, ...], tuple[CodeLine, ...]]:
    """Return what the region of a finding computes in before and in after, at most a few lines each.

    The culprit and what closes the region are always among them.
    """
    keep = {finding.culprit, *finding.outputs}
    sides = ((report.before, finding.before), (report.after, finding.after))
    # a name may be the same on both sides; the culprit is after's where after has it
    marked = ("" if finding.culprit in finding.after else finding.culprit, finding.culprit)
    before, after = (_lines(graph, names, keep, culprit) for (graph, names), culprit in zip(sides, marked, strict=True))
    return before, after


def _lines(graph: GraphView, names: Sequence[str], keep: Collection[str], culprit: str) -> tuple[CodeLine, ...]:
    nodes = [graph.by_name[name] for name in names if name in graph.by_name and graph.by_name[name].op in CALLS]
    places = [i for i, node in enumerate(nodes) if node.name in keep]
    if len(nodes) > _LISTED:
        chosen = set(places[-_LISTED:])
        for distance in range(1, len(nodes)):  # then what is nearest to these
            for i in [i + step * distance for i in places for step in (-1, 1)]:
                if len(chosen) < _LISTED and 0 <= i < len(nodes):
                    chosen.add(i)
            if len(chosen) >= _LISTED:
                break
        if not chosen:
            chosen = set(range(_LISTED))
    else:
        chosen = set(range(len(nodes)))
    found: list[CodeLine] = []
    gap = 0
    for i, node in enumerate(nodes):
        if i not in chosen:
            gap += 1
            continue
        if gap:
            found.append(CodeLine("", f"... {count(gap, 'operation')} ..."))
            gap = 0
        made = f"{dims(node.shape)} {dtype(node.dtype)}".strip()
        found.append(CodeLine(node.name, f"{node.name} = {call(graph, node)}", made, node.name == culprit))
    if gap:
        found.append(CodeLine("", f"... {count(gap, 'operation')} ..."))
    return tuple(found)


def call(graph: GraphView, node: NodeView) -> str:
    """Return a node's call: 'linear(mul_94, model.layers.9.self_attn.k_proj.weight)'."""

    def named(match: re.Match[str]) -> str:
        source = graph.by_name.get(match.group(1))
        return source.target if source is not None and source.op == "get_attr" else match.group(1)

    args = _REFERENCE.sub(named, node.args)
    if short_op(node) == "getitem":
        value, _, key = args.strip("()").rpartition(", ")
        return f"{value}[{key}]"
    return f"{short_op(node)}{args or '()'}"
