"""The words on a box: 'Linear (q_proj)', 'W[576x576]', '[1x5x576] bf16' in place of 'call_function linear_24'."""

from __future__ import annotations

import re
from collections.abc import Sequence

from graphprobe.records import NodeView
from graphprobe.render.places import weight_module
from graphprobe.render.roles import table_of
from graphprobe.render.wiring import Wiring, is_cast, unary_source

_DTYPES = {
    "bfloat16": "bf16",
    "float16": "fp16",
    "float32": "fp32",
    "float64": "fp64",
    "float8_e4m3fn": "e4m3",
    "float8_e5m2": "e5m2",
    "complex64": "c64",
    "complex128": "c128",
}
#: operator -> title; others keep their own name.
_TITLES = {
    "linear": "Linear",
    "addmm": "Linear",
    "torch_linear_simple": "Linear",
    "embedding": "Embedding",
    "layer_norm": "LayerNorm",
    "native_layer_norm": "LayerNorm",
    "rms_norm": "RMSNorm",
    "_fused_rms_norm": "RMSNorm",
    "torch_rmsnorm": "RMSNorm",
    "batch_norm": "BatchNorm",
    "group_norm": "GroupNorm",
    "native_batch_norm": "BatchNorm",
    "_native_batch_norm_legit_no_training": "BatchNorm",
    "scaled_dot_product_attention": "attention (sdpa)",
    "torch_attention": "attention",
    "split_with_sizes": "split",
    "_softmax": "softmax",
    "_to_copy": "to",
    "convert_element_type": "to",
    "_unsafe_view": "view",
    "t": "transpose",
    "__and__": "and",
    "__or__": "or",
}
#: Operators whose constants the output's shape or dtype already tells.
_PLAIN = {"view", "reshape", "expand", "_unsafe_view", "to", "_to_copy", "unsqueeze", "squeeze", "embedding", "flatten"}
#: Operators whose first constant is a dimension.
_ALONG = {
    "softmax",
    "_log_softmax",
    "_softmax",
    "log_softmax",
    "mean",
    "sum",
    "cat",
    "stack",
    "amax",
    "argmax",
    "cumsum",
}
#: What a weight is to its operation, behind a module path whose dots became underscores.
_LEAF = re.compile(r"^\w*?_?((?:input_|output_|weight_|block_)?(?:scale|zero_point|codes|packed)|weight|bias)$")
_MAX = 2**63 - 1  # what torch writes for 'to the end'
_TIMES = "\u00d7"
_SAID = 3  # constants in a title; an operator with more of them keeps them for the tooltip
_WEIGHTS = 4  # weights listed in a box
_WIDEST = 34  # characters of a line in a box


def short_op(node: NodeView) -> str:
    """Return the operator's bare name: 'mul' for aten.mul.Tensor, the last name of anything else."""
    parts = re.sub(r"\.default$", "", node.target).split(".")
    if parts[0] in ("aten", "prims", "higher_order") and len(parts) > 1:
        return parts[1]
    return parts[-1] if node.op == "call_function" else node.target


def title(wiring: Wiring, name: str) -> str:
    """Return what the operation is, with the module that owns it: 'Linear (q_proj)', 'mul 0.125', 'to bf16'."""
    node = wiring.node(name)
    if node.op in ("placeholder", "output"):
        return node.name
    if node.op == "get_attr":
        return node.target
    op = short_op(node)
    text = _TITLES.get(op, op)
    if op == "getitem" and wiring.inputs(name):
        source = short_op(wiring.node(wiring.inputs(name)[0]))
        return clip(f"{_TITLES.get(source, source)} [{', '.join(constants(node))}]")
    if is_cast(node):
        return clip(f"{text} {dtype(node.dtype)}".strip())
    owner = _owner(wiring, name)
    if owner:
        return _headed(text, f"({owner})")
    tables = [] if op != "mul" else [t for t in (table_of(wiring, i) for i in wiring.inputs(name)) if t]
    return _headed(" ".join([text, *tables[:1]]), _said(node))


def _headed(head: str, rest: str) -> str:
    """Join an operation and what is said of it; where both are too long it is the rest that is shortened."""
    head = clip(head, _WIDEST)
    return f"{head} {clip(rest, max(10, _WIDEST - len(head) - 1))}".rstrip()


def _owner(wiring: Wiring, name: str) -> str:
    """Return the leaf module of an operation with weights, or of a lone activation."""
    node = wiring.node(name)
    path = wiring.place[name]
    matrices = [w for w in wiring.weight_inputs(name) if len(wiring.node(w).shape or ()) >= 2]
    if len(matrices) == 1:
        leaf = leaf_of(path)
        if leaf and not leaf.isdigit():
            return leaf
        return weight_module(wiring.node(wiring.origin(matrices[0])).target).rsplit(".", 1)[-1]
    if short_op(node) in ("linear", "addmm", "mm", "matmul") and wiring.kinds.get(path, "").endswith("Linear"):
        return leaf_of(path)  # its weight is computed first: dequantised, or joined of parts
    if _norms(node) and path and not leaf_of(path).isdigit() and wiring.weight_inputs(name):
        return leaf_of(path)
    if path in wiring.lone and re.search(r"Activation|SiLU|GELU|ReLU|Tanh|Sigmoid", node.module_type):
        return leaf_of(path)
    return ""


def leaf_of(path: str) -> str:
    """Return the last name of a module path."""
    return path.rpartition(".")[2]


def _norms(node: NodeView) -> bool:
    return _TITLES.get(short_op(node), "").endswith("Norm")


def detail_line(wiring: Wiring, name: str) -> str:
    """Return what the title left out in favour of a name: a norm's eps."""
    node = wiring.node(name)
    said = [word for word in _said(node).split(", ") if word] if _norms(node) and _owner(wiring, name) else []
    return f"eps {said[-1]}" if said else ""


def weight_lines(wiring: Wiring, name: str) -> list[str]:
    """Return one word for each weight folded into the box: 'W[576x576]', 'b[576]', 'codes[576x576] int8'."""
    origins = [wiring.node(wiring.origin(weight)) for weight in wiring.weight_inputs(name)]
    plain = {wiring.node(name).dtype, "float32", "bfloat16", "float16"}
    words = []
    for origin in sorted(origins, key=lambda origin: -len(origin.shape or ())):
        leaf = _LEAF.sub(r"\1", origin.target.rsplit(".", 1)[-1])
        leaf = {"weight": "W", "bias": "b"}.get(leaf, leaf)
        size = dims(origin.shape) if origin.shape else ""
        words.append(clip(f"{leaf}{size}{'' if origin.dtype in plain else ' ' + dtype(origin.dtype)}".rstrip()))
    return words if len(words) <= _WEIGHTS else [*words[: _WEIGHTS - 1], f"and {len(words) - _WEIGHTS + 1} more"]


def shape_line(node: NodeView) -> str:
    """Return '[1x5x576] bf16'; a scalar is 'scalar fp32'; '' where the node makes no tensor."""
    if node.shape is None:
        return ""
    return f"{dims(node.shape) if node.shape else 'scalar'} {dtype(node.dtype)}".strip()


def dims(shape: Sequence[int | str] | None) -> str:
    """Return '[1x5x576]'; symbolic dimensions keep their names."""
    return "" if shape is None else "[" + _TIMES.join(str(d) for d in shape) + "]"


def dtype(name: str | None) -> str:
    """Return the short name of a dtype: 'bf16', 'e4m3', 'int64'."""
    return _DTYPES.get(name or "", name or "")


def clip(text: str, width: int = _WIDEST) -> str:
    """Shorten a text in its middle to `width` characters."""
    if len(text) <= width:
        return text
    head = (width - 1) // 2
    return f"{text[:head]}…{text[len(text) - (width - 1 - head) :]}"


def source_name(wiring: Wiring, name: str) -> str:
    """Return what a value from elsewhere is to its reader: 'cos', 'attention mask', or its title and module."""
    node = wiring.node(name)
    if node.op == "placeholder":
        return node.name
    table = table_of(wiring, name)
    if table:
        return table
    if _is_mask(wiring, name):
        return "attention mask"
    place = wiring.place[name]
    text = title(wiring, unary_source(wiring, name) if node.is_view else name)
    return f"{text}, from {place}" if place else text


def _is_mask(wiring: Wiring, name: str) -> bool:
    """Whether a value descends from an input called mask, or is a square of truth values that no weight has touched."""
    node = wiring.node(name)
    if node.dtype == "bool":
        return True
    seen: set[str] = set()
    todo = [name]
    masks = False
    while todo and len(seen) < 200:
        current = todo.pop()
        if current in seen:
            continue
        seen.add(current)
        if any(len(wiring.node(w).shape or ()) >= 2 for w in wiring.weight_inputs(current)):
            return False
        masks = masks or "mask" in current or wiring.node(current).dtype == "bool"
        todo.extend(wiring.inputs(current))
    return masks and not todo


#: Arguments that the output's dtype and place already tell, and defaults.
_SILENT = re.compile(
    r"None|False|\[\]|(torch\.)?((b?float|u?int|complex|bool|e\dm\d)\w*|strided|\w+_format)|(cpu|cuda|meta)(:\d+)?"
)
_UNSAID = {"dtype", "layout", "device", "pin_memory", "memory_format", "non_blocking", "copy"}


def constants(node: NodeView) -> list[str]:
    """Return the arguments of an operation that are no values of the graph, numbers to six digits."""
    found = []
    parts = _split(re.sub(r"^\((.*)\)$", r"\1", node.args))
    for word in parts[:-1] if node.args.endswith("...)") else parts:  # the last of a long list is cut
        key, _, value = word.rpartition("=")
        if _mentions(value, node.inputs) or key in _UNSAID or _SILENT.fullmatch(value):
            continue
        found.append(f"{key}={number(value)}" if key else number(value))
    return found


def number(text: str) -> str:
    """Return a number to six digits and the largest integer as 'end'; other text unchanged."""
    if re.fullmatch(r"-?\d+", text):
        return "end" if int(text) >= _MAX else text
    try:
        return f"{float(text):.6g}"
    except ValueError:
        return text


def _said(node: NodeView) -> str:
    """Return an operation's constants as its title says them: '0.125', 'dim -1', 'dim 3 [0:32]'."""
    words = constants(node)
    op = short_op(node)
    if not words or op in _PLAIN:
        return ""
    if op == "slice":
        start, stop = (*words[1:3], "", "")[:2]
        return f"dim {words[0]} [{start}:{'' if stop == 'end' else stop}]"
    if "norm" in op:
        return ", ".join(w for w in words if not w.startswith("[") and w != "True")
    if "attention" in op:  # the scale; not a dropout of zero, nor how heads lie in memory
        return ", ".join(w for w in words if "=" in w or re.fullmatch(r"\d*\.\d+(e-?\d+)?", w))
    if op in _ALONG:
        return f"dim {words[0].strip('[]')}"
    told = [word for word in words if word != "True"]
    return ", ".join(told) if len(told) <= _SAID else ""


def _mentions(text: str, names: Sequence[str]) -> bool:
    if "%" in text:
        return True
    return any(word in names for word in re.findall(r"[A-Za-z_]\w*", text))


def _split(text: str) -> list[str]:
    """Split at the commas outside brackets."""
    parts, depth, current = [], 0, ""
    for char in text:
        depth += (char in "([{") - (char in ")]}")
        if char == "," and depth == 0:
            parts.append(current.strip())
            current = ""
        else:
            current += char
    parts.append(current.strip())
    return [part for part in parts if part]
