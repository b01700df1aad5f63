"""State that one side alone writes: a buffer, a cache that it is given. Only the next call would show it."""

from __future__ import annotations

from graphprobe import align, provenance
from graphprobe.program import Program
from graphprobe.records import Finding

RULE = "9 state"
_NAMED = 3  # so many names are listed


def one_sided(before: Program, after: Program) -> list[Finding]:
    """Return a finding for each side that writes what the other leaves as it was."""
    paired = {n for _, x, y in align.output_pairs(before, after) for n in (x, y)}
    found = []
    for one, sides in ((before, ("before", "after")), (after, ("after", "before"))):
        written = [p for p, n in one.outputs.items() if p.startswith(align.STATE) and n not in paired]
        if written:
            found.append(_finding(sides, written, one))
    return found


def _finding(sides: tuple[str, str], written: list[str], one: Program) -> Finding:
    node = one.outputs[written[0]]
    label, in_after = one.label(node), sides[0] == "after"
    shown = [repr(path.removeprefix(align.STATE).removeprefix("_constant_")) for path in written]
    names = ", ".join(shown[:_NAMED]) + (f" and {len(shown) - _NAMED} more" if len(shown) > _NAMED else "")
    said = f"{sides[0]} writes {names}, which {sides[1]} leaves as it was"
    labels = tuple(dict.fromkeys(one.label(one.outputs[path]) for path in written))
    return Finding(
        "semantic", () if in_after else labels, labels if in_after else (), provenance.module_path(node),
        provenance.target_name(node), None, None, None, None, rule=RULE, hint=said, culprit=label,
        source=provenance.source(node), outputs=("", label) if in_after else (label, ""),
        explanation=f"{said[0].upper()}{said[1:]}. These outputs do not show it, those of the next call would. "
        f"Next: write it in {sides[1]}, too; a model in training mode writes its statistics (call .eval()).",
    )  # fmt: skip
