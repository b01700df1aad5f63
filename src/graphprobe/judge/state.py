"""State that one side alone writes: a buffer, a cache that it is given. Only the next call would show it."""

from __future__ import annotations

from graphprobe import align, provenance
from graphprobe.program import Program
from graphprobe.records import Finding

RULE = "9 state"


def one_sided(before: Program, after: Program) -> list[Finding]:
    """Return a finding for every state that is written in one graph and left as it was in the other."""
    paired = {n for _, x, y in align.output_pairs(before, after) for n in (x, y)}
    return [
        _finding(sides, path.removeprefix(align.STATE), one, side == 1)
        for side, (one, sides) in enumerate(((before, ("before", "after")), (after, ("after", "before"))))
        for path, node in one.outputs.items()
        if path.startswith(align.STATE) and node not in paired
    ]


def _finding(sides: tuple[str, str], name: str, one: Program, in_after: bool) -> Finding:
    node = one.outputs[align.STATE + name]
    label, op = one.label(node), provenance.target_name(node)
    shown = name.removeprefix("_constant_")
    said = f"{sides[0]} writes {shown!r} anew ({label}), {sides[1]} leaves it as it was"
    return Finding(
        "structural", () if in_after else (label,), (label,) if in_after else (), provenance.module_path(node), op,
        None, None, None, None, rule=RULE, hint=said, culprit=label, source=provenance.source(node),
        outputs=("", label) if in_after else (label, ""),
        explanation=f"{said[0].upper()}{said[1:]}. These outputs do not show it, those of the next call would. "
        f"Next: write it in {sides[1]}, too, or allow it with --allow structural.",
    )  # fmt: skip
