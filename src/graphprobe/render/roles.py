"""What an operation is for, and the colour that says so. Two visible tables; the first rule that fits decides."""

from __future__ import annotations

import re
from dataclasses import dataclass

from graphprobe.records import NodeView
from graphprobe.render.places import is_getitem
from graphprobe.render.wiring import CALLS, Wiring, is_cast, unary_source


@dataclass(frozen=True)
class Colour:
    """Fill and border of a box, both as #rrggbb; black text is readable on every fill."""

    fill: str
    line: str


#: role -> colour. Okabe-Ito hues, lightened: they differ in brightness as well, and every box says in words what it is.
COLOURS: dict[str, Colour] = {
    "norm": Colour("#fbf0b2", "#a38a00"),
    "attention": Colour("#f9d0bd", "#b5460f"),
    "rotary": Colour("#fde2b8", "#b57a00"),
    "MLP": Colour("#cfeade", "#00805c"),
    "MoE": Colour("#f3d2e6", "#a3457a"),
    "collective": Colour("#ddd3f5", "#5f45a8"),
    "state space": Colour("#e3e6b5", "#6f7a12"),
    "KV cache": Colour("#e9d8c8", "#7d5430"),
    "quantisation": Colour("#c5e6ee", "#00718c"),
    "cast": Colour("#ececec", "#777777"),
    "embedding": Colour("#cfe2f7", "#1f65ad"),
    "convolution": Colour("#d3edfa", "#2f86b5"),
    "view": Colour("#ffffff", "#aaaaaa"),
    "other": Colour("#ffffff", "#666666"),
    "input": Colour("#e4eefb", "#1f65ad"),
    "output": Colour("#e4eefb", "#1f65ad"),
}
#: The one red of every picture: a node whose meta["val"] is missing.
NO_VALUE = Colour("#ff8a80", "#b00020")
#: The residual stream.
SPINE = "#1f65ad"


@dataclass(frozen=True)
class Rule:
    """A role, and what of a node it looks at: the target, or the module's last names and class."""

    role: str
    target: str = ""
    module: str = ""


RULES = (
    Rule("quantisation", target=r"quant|_int_mm|scaled_mm|fp8|float8|int4|int8|fp4|mxfp|e4m3|e5m2"),
    Rule("collective", target=r"all_reduce|all_gather|reduce_scatter|all_to_all|c10d|wait_tensor|^dist\."),
    Rule("state space", target=r"selective_scan|mamba|\bssm|_ssm|ssd_|chunk_scan|causal_conv|gated_delta|\bgdn|_gdn"),
    Rule("embedding", target=r"embedding"),
    Rule("rotary", target=r"rope|rotary"),
    Rule("norm", target=r"rms_?norm|layer_?norm|group_?norm|batch_?norm|instance_norm|l2_?norm"),
    Rule("attention", target=r"scaled_dot_product|attention|sdpa|fmha|flash|flex"),
    Rule("convolution", target=r"conv(olution|[123]d|_transpose)"),
    Rule("MoE", target=r"moe|expert|grouped_mm"),
    Rule("norm", module=r"norm|(^|\.)ln_?\w{0,3}$"),
    Rule("rotary", module=r"rotary|rope"),
    Rule("MoE", module=r"expert|moe|router|^gate$"),
    Rule("state space", module=r"mamba|\bssm|mixer|linear_attn|delta_?net"),
    Rule("attention", module=r"attn|attention"),
    Rule("MLP", module=r"mlp|ffn|feed_?forward|(^|\.)fc_?\d*$|intermediate|swiglu|(Bert|Roberta|Electra|ViT)Output$"),
)
#: Number formats of quantised values, and those of plain ones.
_CODES = re.compile(r"u?int[1-8]$|float8|float4|float6")
_REAL = re.compile(r"b?float(16|32|64)$")
_WRITES = re.compile(r"index_copy|index_put|slice_scatter|scatter|\bcopy_?\b|\.cat\.")
_RULES = tuple((rule.role, re.compile(rule.target or rule.module, re.I), bool(rule.target)) for rule in RULES)


def role_of(wiring: Wiring, name: str) -> str:
    """Return the role of a node: a key of `COLOURS`."""
    node = wiring.node(name)
    if node.op == "placeholder":
        return "input"
    if node.op in ("output", "get_attr"):
        return "output" if node.op == "output" else "other"
    by_target = _matching(node.target, targets=True)
    if by_target == "quantisation" or _changes_codes(wiring, name):
        return "quantisation"
    if node.is_view or (is_getitem(node) and any(wiring.node(i).is_view for i in wiring.inputs(name))):
        return "view"
    if is_cast(node):
        return "cast"
    if _writes_cache(wiring, name):
        return "KV cache"
    role = by_target or module_role(wiring, wiring.place[name]) or "other"
    return "MoE" if role == "MLP" and "topk" in node.target else role  # elsewhere topk picks boxes, beams or tokens


def _changes_codes(wiring: Wiring, name: str) -> bool:
    """Whether an operation takes 8-bit-or-smaller codes and gives real numbers, or the other way round."""
    node = wiring.node(name)
    if node.op not in CALLS or node.dtype is None or node.is_view:
        return False
    weights = map(wiring.origin, wiring.weight_inputs(name))
    sources = {wiring.node(source).dtype or "" for source in (*wiring.inputs(name), *weights)}
    coded = any(_CODES.match(dtype) for dtype in sources)
    return coded != bool(_CODES.match(node.dtype)) and any(map(_REAL.match, (node.dtype, *sources)))


def _writes_cache(wiring: Wiring, name: str) -> bool:
    """Whether an operation puts new keys or values into a buffer or an input of the graph, in place or by copying."""
    node = wiring.node(name)
    if not _WRITES.search(node.target) or not node.inputs or len(node.shape or ()) < 3:
        return False
    kept = wiring.node(wiring.origin(node.inputs[0]))
    fits = kept.op in ("placeholder", "get_attr") and len(kept.shape or ()) == len(node.shape or ())
    return fits and kept.dtype == node.dtype and len(node.inputs) > 1


def module_role(wiring: Wiring, path: str) -> str:
    """Return the role that the names and classes of a module and those around it give; '' where they say nothing."""
    parts = path.split(".")
    for end in range(len(parts), 0, -1):
        # BERT calls everything around self-attention 'attention', its dense output and norm included: inner names win
        words = (wiring.kinds.get(".".join(parts[:end]), ""), parts[end - 1])
        found = next((role for word in words if (role := _matching(word, targets=False))), "")
        if found:
            return found
    return ""


def _matching(text: str, targets: bool) -> str:
    return next((role for role, pattern, is_target in _RULES if is_target == targets and pattern.search(text)), "")


def rotary_nodes(wiring: Wiring, names: list[str]) -> set[str]:
    """Return those of `names` that apply a rotary embedding: products with cos or sin, and what feeds and joins them.

    Covers x cos + rotate_half(x) sin and its interleaved forms; found by dataflow, as no module bears the name.
    """
    within = set(names)
    scaled = [n for n in names if _short(wiring.node(n)) == "mul"]
    products = {n for n in scaled if any(table_of(wiring, i) for i in (*wiring.inputs(n), *wiring.weight_inputs(n)))}
    found = set(products)
    for product in products:
        for source in wiring.inputs(product):
            found |= _rotated(wiring, source, within)
    for name in names:
        sources = wiring.inputs(name)
        if _short(wiring.node(name)) in ("add", "sub") and sources and all(s in products for s in sources):
            found.add(name)
    return found


def table_of(wiring: Wiring, name: str) -> str:
    """Return 'cos' or 'sin' where a value is that table behind views, casts and scalings; else ''."""
    source = wiring.node(unary_source(wiring, name))
    short = _short(source)
    if short in ("cos", "sin"):
        return short
    if source.op not in ("placeholder", "get_attr"):
        return ""
    leaf = re.search(r"(?:^|[._])(cos|sin)(?:$|[._])", source.name)
    return leaf.group(1) if leaf else ""


def _rotated(wiring: Wiring, name: str, within: set[str]) -> set[str]:
    """Return the negation, halves and concatenation of rotate_half above a product with sin."""
    if _short(wiring.node(name)) not in ("cat", "stack"):
        return set()
    found = {name}
    for source in wiring.inputs(name):
        if source in within and _short(wiring.node(source)) == "neg":
            found.add(source)
    return found & within


def _short(node: NodeView) -> str:
    parts = node.target.split(".")
    return parts[1] if parts[0] in ("aten", "prims") and len(parts) > 1 else parts[-1]
