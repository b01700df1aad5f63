"""Evidence by definition: a floating cast changes no value but for rounding, so it claims its input's partner."""

from __future__ import annotations

from torch.fx import Node

from graphprobe import nodes
from graphprobe.align.claims import Alignment, Claim
from graphprobe.program import Program

_CASTS = ("aten::to", "aten::_to_copy", "aten::type_as", "prims::convert_element_type")


def claim(before: Program, after: Program, alignment: Alignment) -> None:
    """Claim unclaimed casts on either side: what equals the input of a cast equals its output."""
    for y in after.live:
        if is_cast(y) and not alignment.of_after.get(y):
            for known in list(alignment.of_after.get(y.all_input_nodes[0], ())):
                alignment.add(Claim(known.before, y, "cast", known.certain))
    for x in before.live:
        if is_cast(x) and not alignment.of_before.get(x):
            for known in list(alignment.of_before.get(x.all_input_nodes[0], ())):
                alignment.add(Claim(x, known.after, "cast", known.certain))


def is_cast(node: Node) -> bool:
    """Whether the node casts a floating tensor to another floating dtype of at least 16 bits."""
    if nodes.schema_name(node) not in _CASTS or not node.all_input_nodes:
        return False
    mine, theirs = nodes.tensor_val(node), nodes.tensor_val(node.all_input_nodes[0])
    return (
        mine is not None
        and theirs is not None
        and mine.dtype != theirs.dtype
        and all(t.dtype.is_floating_point and t.dtype.itemsize > 1 for t in (mine, theirs))
    )
