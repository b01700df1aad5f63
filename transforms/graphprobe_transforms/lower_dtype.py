"""A graph in float32 is lowered to a 16-bit dtype."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from graphprobe import nodes
from graphprobe.pipeline import Applied, NotApplied, Outcome
from graphprobe_transforms import graphs
from graphprobe_transforms.graphs import aten

#: Operators that stay in float32, with casts around them where their inputs are narrow.
WIDE = {
    aten.pow.Tensor_Scalar,
    aten.rsqrt.default,
    aten.softmax.int,
    aten.cos.default,
    aten.sin.default,
    aten.exp.default,
    aten.log.default,
    aten.cumsum.default,
}


@dataclass(frozen=True)
class LowerDtype:
    """Lower a float32 graph to `dtype`: weights, inputs of operators, results.

    float32 stays where the graph writes a cast to it, in the operators of `WIDE`, in what depends on no input and no
    weight (rotary tables, masks), and wherever all inputs are float32 for one of these reasons. Numbers beyond the
    largest of `dtype` become that. Tried on llama, qwen2, qwen3, mistral, gpt2 and bert.
    """

    dtype: Literal["bfloat16", "float16"] = "bfloat16"
    name: ClassVar[str] = "lower_dtype"
    stage: ClassVar[str] = "post_load_fusion"

    def apply(self, gm: GraphModule) -> Outcome:
        """Lower `gm`."""
        if any(nodes.is_mutating(node) for node in gm.graph.nodes):
            return NotApplied("the graph writes into its tensors")
        lowering = _Lowering(gm, getattr(torch, self.dtype))
        changed = tuple(node.name for node in list(gm.graph.nodes) if not node._erased and lowering.lower(node))
        if not changed:
            return NotApplied("nothing is computed in float32")
        lowering.return_narrow()
        graphs.tidy(gm, ())
        return Applied(changed)


@dataclass
class _Lowering:
    """Walks a graph from its inputs on and decides for each value whether it stays float32."""

    gm: GraphModule
    dtype: torch.dtype
    wide: set[Node] = field(default_factory=set)  # float32 for a reason
    casts: dict[tuple[Node, torch.dtype], Node] = field(default_factory=dict)
    narrow: dict[int, tuple[torch.Tensor, torch.nn.Parameter]] = field(default_factory=dict)  # id of the wide -> both

    def lower(self, node: Node) -> bool:
        """Lower one node; whether it changed."""
        value = graphs.tensor(node)
        if node.op == "get_attr" and value is not None and value.dtype == torch.float32:
            return self._lower_weight(node)
        if node.op != "call_function" or nodes.returns_nothing(node):
            return False
        floats = [n for n in node.all_input_nodes if {torch.float32, self.dtype} & set(_dtypes(n))]
        if self._stays_wide(node, floats):
            self._cast_inputs(node, [n for n in floats if n not in self.wide], torch.float32)
            self._mark_wide(node)
            return False
        self._cast_inputs(node, [n for n in floats if torch.float32 in _dtypes(n)], self.dtype)
        return self._retype(node)

    def _lower_weight(self, node: Node) -> bool:
        if not isinstance(graphs.weight(self.gm, node), torch.nn.Parameter):
            self.wide.add(node)  # tables and statistics
            return False
        held = graphs.weight(self.gm, node)
        if held.dtype == torch.float32:  # else another node reads it, too, and it is narrow already
            narrow = held.detach().to(self.dtype)
            # one that has several names, as a tied embedding, stays one
            _, held = self.narrow.setdefault(id(held), (held, torch.nn.Parameter(narrow, requires_grad=False)))
        graphs.put_weight(self.gm, node, held)
        return True

    def _stays_wide(self, node: Node, floats: list[Node]) -> bool:
        if torch.float32 not in _dtypes(node) or self._is_beyond(node.args):
            return False
        if _casts_itself(node) or node.target in WIDE:
            return True
        return all(n in self.wide for n in floats)

    def _mark_wide(self, node: Node) -> None:
        self.wide.add(node)
        self._retype(node)

    def _cast_inputs(self, node: Node, sources: list[Node], dtype: torch.dtype) -> None:
        if _casts_itself(node):
            return
        chosen = {source: self._cast(node, source, dtype) for source in sources}

        def swap(source: Node) -> Node:
            return chosen.get(source, source)

        node.args = map_arg(node.args, swap)
        node.kwargs = map_arg(node.kwargs, swap)

    def _cast(self, place: Node, source: Node, dtype: torch.dtype) -> Node:
        value = graphs.tensor(source)
        if value is None or value.dtype == dtype:
            return source
        if (source, dtype) not in self.casts:
            after = source.next if source.op != "placeholder" else self._first_call()
            cast = self.casts[source, dtype] = graphs.insert(after, aten.to.dtype, (source, dtype), like=place)
            if dtype == torch.float32:
                self.wide.add(cast)
        return self.casts[source, dtype]

    def _first_call(self) -> Node:
        found: Node = next(node for node in self.gm.graph.nodes if node.op not in ("placeholder", "get_attr"))
        return found

    def _is_beyond(self, args: Any) -> bool:
        """Whether a number among the arguments is finite and too large for `dtype`: a mask's."""
        largest = torch.finfo(self.dtype).max
        numbers = [v for v in torch.utils._pytree.tree_leaves(args) if isinstance(v, float)]
        return any(largest < abs(number) < math.inf for number in numbers)

    def _retype(self, node: Node) -> bool:
        """Clamp constants that `dtype` cannot hold and compute ``val`` anew; whether it changed."""
        largest = torch.finfo(self.dtype).max

        def clamp(value: Any) -> Any:
            return math.copysign(largest, value) if isinstance(value, float) and self._is_beyond(value) else value

        if self._is_beyond(node.args):
            node.args = torch.utils._pytree.tree_map(clamp, node.args, is_leaf=lambda v: isinstance(v, Node))
        was = _dtypes(node)
        node.meta["val"] = graphs.evaluate(node)
        node.meta.pop("tensor_meta", None)
        if was == _dtypes(node):
            return False
        for assertion in [user for user in node.users if graphs.is_assertion(user)]:
            node.graph.erase_node(assertion)  # it asserts the old dtype
        return True

    def return_narrow(self) -> None:
        """Let the graph return what it has in the narrow dtype, floating outputs that stayed float32 included."""
        output = next(iter(self.gm.graph.find_nodes(op="output")))
        returned = [n for n in output.all_input_nodes if n.op == "call_function" and torch.float32 in _dtypes(n)]
        chosen = {n: graphs.insert(output, aten.to.dtype, (n, self.dtype), like=n) for n in returned}
        output.args = map_arg(output.args, lambda n: chosen.get(n, n))


def _casts_itself(node: Node) -> bool:
    """Whether the call says in which dtype it computes."""
    return any(isinstance(value, torch.dtype) for value in (*node.args, *node.kwargs.values()))


def _dtypes(node: Node) -> list[torch.dtype]:
    """Return the dtypes of a node's value or values."""
    leaves = torch.utils._pytree.tree_leaves(node.meta.get("val"))
    return [leaf.dtype for leaf in leaves if isinstance(leaf, torch.Tensor)]
