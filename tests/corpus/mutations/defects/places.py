"""Defects of axes, layouts and indices."""

from __future__ import annotations

from torch.fx import GraphModule, Node

from corpus.mutations.graphs import (
    END,
    aten,
    insert,
    insert_before,
    is_float,
    schema,
    shape,
    tensor,
)  # fmt: skip


def wrong_axis(gm: GraphModule, node: Node) -> Node | None:
    if schema(node) in ("aten::softmax.int", "aten::log_softmax.int", "aten::cumsum.default"):
        dims = shape(node)
        if len(dims) < 2 or (schema(node) != "aten::cumsum.default" and dims[-1] != dims[-2]):
            return None
        node.args = (node.args[0], -2 if node.args[1] in (-1, len(dims) - 1) else -1, *node.args[2:])
        return node
    return None


def swap_dims(gm: GraphModule, node: Node) -> Node | None:
    """Swap two equal dimensions: heads with tokens where their sizes agree, or rows with columns."""
    if schema(node) not in ("aten::matmul.default", "aten::linear.default", "aten::mul.Tensor") or not is_float(node):
        return None
    dims = shape(node)
    for i in range(1, len(dims)):
        for j in range(i + 1, len(dims)):
            if dims[i] == dims[j] and dims[i] > 1:
                return insert(gm, node, aten.transpose.int, i, j)
    return None


def view_for_transpose(gm: GraphModule, node: Node) -> Node | None:
    """Reshape where a transposition was meant."""
    if schema(node) not in ("aten::transpose.int", "aten::permute.default") or not is_float(node):
        return None
    dims = shape(node)
    source = node.args[0]
    if len(dims) < 3 or not isinstance(source, Node) or sum(d > 1 for d in dims) < 2 or source.op == "get_attr":
        return None
    node.target, node.args, node.kwargs = aten.reshape.default, (source, list(dims)), {}
    return node


def reversed_heads(gm: GraphModule, node: Node) -> Node | None:
    if schema(node) not in ("aten::transpose.int", "aten::matmul.default") or not is_float(node):
        return None
    dims = shape(node)
    return insert(gm, node, aten.flip.default, [1]) if len(dims) == 4 and dims[1] > 1 else None


def repeat_order(gm: GraphModule, node: Node) -> Node | None:
    """Tile shared heads where they should be repeated one by one."""
    if schema(node) not in ("aten::reshape.default", "aten::view.default", "aten::_unsafe_view.default"):
        return None
    source = node.args[0]
    while isinstance(source, Node) and schema(source) in ("aten::clone.default", "aten::contiguous.default"):
        source = source.args[0]
    if not isinstance(source, Node) or schema(source) != "aten::expand.default":
        return None
    wide, narrow = shape(source), shape(source.args[0])
    if len(wide) != 5 or len(narrow) != 5 or wide[2] == narrow[2] or wide[1] < 2:
        return None
    turned = insert_before(gm, node, node.args[0], aten.transpose.int, 1, 2)  # type: ignore[arg-type]
    node.target = aten.reshape.default
    return turned


def swap_concat(gm: GraphModule, node: Node) -> Node | None:
    if schema(node) != "aten::cat.default" or not is_float(node):
        return None
    parts = node.args[0]
    if not isinstance(parts, (list, tuple)) or len(parts) != 2 or parts[0] is parts[1]:
        return None
    if shape(parts[0]) != shape(parts[1]):
        return None
    node.args = ([parts[1], parts[0]], *node.args[1:])
    return node


def roll(gm: GraphModule, node: Node) -> Node | None:
    """Shift by one along the last dimension: permuted channels."""
    if schema(node) not in ("aten::mul.Tensor", "aten::linear.default", "aten::cat.default", "aten::add.Tensor"):
        return None
    dims = shape(node)
    if not is_float(node) or len(dims) < 2 or dims[-1] < 2:
        return None
    return insert(gm, node, aten.roll.default, [1], [-1])


def off_by_one_mask(gm: GraphModule, node: Node) -> Node | None:
    table = {
        "aten::le.Tensor": aten.lt.Tensor, "aten::ge.Tensor": aten.gt.Tensor, "aten::gt.Tensor": aten.ge.Tensor,
        "aten::lt.Tensor": aten.le.Tensor,
    }  # fmt: skip
    if schema(node) in ("aten::tril.default", "aten::triu.default"):
        diagonal = node.args[1] if len(node.args) > 1 else node.kwargs.get("diagonal", 0)
        node.args, node.kwargs = (node.args[0], diagonal + 1), {}  # type: ignore[operator]
        return node
    target = table.get(schema(node))
    if target is None:
        return None
    node.target = target
    return node


def slice_off_by_one(gm: GraphModule, node: Node) -> Node | None:
    """Begin one element later, or earlier where the source ends."""
    if schema(node) != "aten::slice.Tensor" or tensor(node) is None or tensor(node.args[0]) is None:
        return None
    source, dim, start, _, *step = (*node.args, *(0, 0, END)[len(node.args) - 1 :])[:5]
    size, length = shape(source)[dim], shape(node)[dim]  # type: ignore[index]
    if step not in ([], [1]) or length == size or not isinstance(start, int):
        return None
    start = start + size if start < 0 else start
    moved = start + 1 if start + length < size else start - 1
    node.args = (source, dim, moved, moved + length)
    return node


def other_half(gm: GraphModule, node: Node) -> Node | None:
    """Take the other half: a rotate-half that takes the same half twice."""
    if schema(node) != "aten::slice.Tensor" or not is_float(node) or len(node.args) < 3:
        return None
    source, dim, start = node.args[:3]
    size, length = shape(source)[dim], shape(node)[dim]  # type: ignore[index]
    if length * 2 != size:
        return None
    node.args = (source, dim, size - length, END) if start == 0 else (source, dim, 0, length)
    return node


def next_row(gm: GraphModule, node: Node) -> Node | None:
    """Look up positions that are one too large, where the table has room."""
    if schema(node) != "aten::embedding.default":
        return None
    table, index = node.args[:2]
    source = index
    while isinstance(source, Node) and source.op == "call_function" and source.all_input_nodes:
        source = source.all_input_nodes[0]
    if not isinstance(index, Node) or (isinstance(source, Node) and source.op == "placeholder"):
        return None
    if shape(table)[0] <= 2 * shape(index)[-1]:
        return None
    return insert_before(gm, node, index, aten.add.Tensor, 1)
