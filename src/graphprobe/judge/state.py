"""State that one side alone writes: a buffer, a cache that it is given. Only the next call would show it."""

from __future__ import annotations

from graphprobe import align, provenance
from graphprobe.program import Program
from graphprobe.records import Finding

RULE = "9 state"
_NAMED = 3  # so many names are listed


def one_sided(before: Program, after: Program) -> tuple[list[Finding], list[str]]:
    """Return a finding for each side that writes what the other has and leaves as it was, a note for what it has alone.

    A transform may bring a cache along: that these outputs do not read it again is no fault.
    """
    paired = {n for _, x, y in align.output_pairs(before, after) for n in (x, y)}
    found, notes = [], []
    for one, other, sides in ((before, after, ("before", "after")), (after, before, ("after", "before"))):
        written = [p for p, n in one.outputs.items() if p.startswith(align.STATE) and n not in paired]
        if any(_has(other, path) for path in written):
            found.append(_finding(sides, written, one))
        elif written:
            notes.append(
                f"{sides[0]} writes {_names(written)}, which {sides[1]} does not have: only a next call reads it"
            )
    return found, notes


def _has(one: Program, path: str) -> bool:
    """Whether a program is given the state that another one writes, or holds it."""
    given = {key for key, node in one.inputs.items() for key in (key, node.name)}
    held = {provenance.weight_name(n) for n in one.gm.graph.nodes if n.op == "get_attr"}
    return path.removeprefix(align.STATE) in given or _name(path) in held


def _name(path: str) -> str:
    return path.removeprefix(align.STATE).removeprefix("_constant_")


def _names(written: list[str]) -> str:
    shown = [repr(_name(path)) for path in written]
    return ", ".join(shown[:_NAMED]) + (f" and {len(shown) - _NAMED} more" if len(shown) > _NAMED else "")


def _finding(sides: tuple[str, str], written: list[str], one: Program) -> Finding:
    node = one.outputs[written[0]]
    label, in_after = one.label(node), sides[0] == "after"
    said = f"{sides[0]} writes {_names(written)}, which {sides[1]} leaves as it was"
    labels = tuple(dict.fromkeys(one.label(one.outputs[path]) for path in written))
    return Finding(
        "semantic", () if in_after else labels, labels if in_after else (), provenance.module_path(node),
        provenance.target_name(node), None, None, None, None, rule=RULE, hint=said, culprit=label,
        source=provenance.source(node), outputs=("", label) if in_after else (label, ""),
        explanation=f"{said[0].upper()}{said[1:]}. These outputs do not show it, those of the next call would. "
        f"Next: write it in {sides[1]}, too; a model in training mode writes its statistics (call .eval()).",
    )  # fmt: skip
