"""``pipeline="quantize_"`` and ``pipeline="pt2e"``: torchao's quantisers as transforms of a captured graph."""

from __future__ import annotations

import copy
import fnmatch
import importlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from graphprobe import inputs, nodes, provenance
from graphprobe.capturing import capture, quiet
from graphprobe.errors import PipelineError, nearest
from graphprobe.pipeline import Applied, NotApplied, Outcome
from graphprobe.pipeline.functions import adopt
from graphprobe.pipeline.registry import load

INPUTS = "graphprobe_inputs"  # where a graph that goes through a built-in pipeline carries (args, kwargs)
_ANNOTATION = "quantization_annotation"  # where a quantizer says what is to be quantised
_LINEAR = torch.ops.aten.linear.default


def inputs_of(gm: GraphModule) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return what a graph is run on: the caller's inputs, which it carries, else some that are drawn from it."""
    args, kwargs = gm.meta.get(INPUTS) or inputs.draw(gm)
    return copy.deepcopy(tuple(args)), copy.deepcopy(dict(kwargs))


@dataclass(frozen=True)
class Quantize:
    """torchao's ``quantize_``: each linear layer becomes what it becomes there, where it stands in the graph.

    `config` names a class of ``torchao.quantization``, `where` is a pattern for the modules that are quantised, and
    `first` limits it to that many of them.
    """

    config: str = "Int8WeightOnlyConfig"
    where: str = "*"
    first: int | None = None
    stage: str = field(default="weight_load", init=False)
    name: str = field(default="quantize_", init=False)

    def check(self) -> Any:
        """Return the config's class. Raises PipelineError where torchao, or the config, is not there."""
        quantization = _torchao("torchao.quantization")
        kind = getattr(quantization, self.config, None)
        if not isinstance(kind, type):
            known = [name for name in dir(quantization) if name.endswith("Config")]
            said = nearest(self.config, known) or f"; it has {', '.join(known)}"
            raise PipelineError(f"torchao.quantization has no {self.config!r}{said}")
        return kind

    def apply(self, gm: GraphModule) -> Outcome:
        """Quantise the linear layers of a graph. Raises PipelineError where torchao, or the config, is not there."""
        kind, quantize_ = self.check(), _torchao("torchao.quantization").quantize_
        unwrap = _torchao("torchao.utils").unwrap_tensor_subclass
        found = [node for node in gm.graph.find_nodes(op="call_function", target=_LINEAR) if self._takes(node)]
        done = []
        for node in found[: self.first]:
            layer = nn.Sequential(_layer(gm, node))
            quantize_(layer, kind())
            _put_in(gm, node, capture(unwrap(layer), (_example(node),)))
            done.append(_place(node))
        return Applied(tuple(done)) if done else NotApplied(f"no linear layer matches {self.where!r}")

    def _takes(self, node: Node) -> bool:
        weight = node.args[1]
        is_weight = isinstance(weight, Node) and weight.op == "get_attr"
        return is_weight and fnmatch.fnmatchcase(_place(node), self.where)


@dataclass(frozen=True)
class Pt2e:
    """torchao's quantisation of exported graphs: prepare, calibrate on the inputs, convert.

    `quantizer` names a function without arguments that makes a quantizer, "pkg.mod:name"; without it that is
    X86InductorQuantizer with static 8-bit codes. `first` limits it to the first operations that it annotates.
    """

    quantizer: str = ""
    first: int | None = None
    stage: str = field(default="weight_load", init=False)
    name: str = field(default="pt2e", init=False)

    def check(self) -> None:
        """Raise PipelineError where torchao is not there."""
        _torchao("torchao.quantization.pt2e.quantize_pt2e")

    def apply(self, gm: GraphModule) -> Outcome:
        """Quantise a graph. Raises PipelineError where torchao is not there."""
        pt2e = _torchao("torchao.quantization.pt2e.quantize_pt2e")
        quantizer = load(self.quantizer)() if self.quantizer else _x86()
        annotate = quantizer.annotate
        matches: list[str] = []

        def limited(model: GraphModule) -> GraphModule:
            annotated = annotate(model)
            matches.extend(_limit(annotated, self.first))
            return annotated  # type: ignore[no-any-return]

        quantizer.annotate = limited
        args, kwargs = inputs_of(gm)
        with torch.no_grad(), quiet():
            prepared = pt2e.prepare_pt2e(copy.deepcopy(gm), quantizer)
            prepared(*args, **kwargs)
            converted = pt2e.convert_pt2e(prepared)
        if not matches:
            return NotApplied("the quantizer annotates nothing")
        adopt(gm, converted, self.name)
        return Applied(tuple(matches))


QUANTIZERS = (Quantize, Pt2e)


def _torchao(name: str) -> Any:
    try:
        with quiet():
            return importlib.import_module(name)
    except ImportError as error:
        raise PipelineError(
            f"this pipeline needs torchao ({error}): pip install --no-deps torchao, in a version made for torch "
            f"{torch.__version__.partition('+')[0]}"
        ) from error


# --- quantize_ -------------------------------------------------------------------------------------------------------


def _place(node: Node) -> str:
    """Return the module that a linear operation is, by its weight where nothing else says it."""
    weight = node.args[1]
    return provenance.module_path(node) or (str(weight.target) if isinstance(weight, Node) else "").rpartition(".")[0]


def _layer(gm: GraphModule, node: Node) -> nn.Linear:
    weight, bias = (_tensor(gm, arg) for arg in (*node.args, None)[1:3])
    assert weight is not None
    rows, columns = weight.shape
    layer = nn.Linear(columns, rows, bias=bias is not None, device="meta", dtype=weight.dtype)
    layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return layer.eval()


def _tensor(gm: GraphModule, arg: Any) -> torch.Tensor | None:
    if not isinstance(arg, Node):
        return None
    value: Any = gm
    for part in str(arg.target).split("."):
        value = getattr(value, part)
    return value if isinstance(value, torch.Tensor) else None


def _example(node: Node) -> torch.Tensor:
    """Return something of the shape that the layer is given; symbolic dimensions get a size that nothing else has."""
    source, weight = node.args[0], node.args[1]
    assert isinstance(source, Node) and isinstance(weight, Node)
    value = nodes.tensor_val(source)
    if value is None:
        raise PipelineError(f"{node.name}: meta['val'] of its input is missing, so the layer's input has no shape")
    kept = nodes.tensor_val(weight)
    dtype = kept.dtype if kept is not None else value.dtype
    return torch.zeros([d if isinstance(d, int) else 8 for d in value.shape], dtype=dtype, device=value.device)


def _put_in(gm: GraphModule, node: Node, layer: GraphModule) -> None:
    """Put the graph of a quantised layer in the place of a linear operation."""
    holder = nn.Module()
    holder._parameters, holder._buffers, holder._modules = layer._parameters, layer._buffers, layer._modules
    path = f"{_place(node) or node.name}.quantized".replace(":", "_")
    gm.add_submodule(path, holder)
    made: dict[Node, Node] = {}
    with gm.graph.inserting_before(node):
        for one in layer.graph.nodes:
            if one.op == "placeholder":
                made[one] = node.args[0]  # type: ignore[assignment]
            elif one.op == "output":
                (result,) = one.all_input_nodes
                node.replace_all_uses_with(made[result])
            elif not nodes.returns_nothing(one):
                made[one] = _copied(gm, node, one, made, path)
    gm.graph.erase_node(node)
    gm.graph.eliminate_dead_code()


def _copied(gm: GraphModule, node: Node, one: Node, made: dict[Node, Node], path: str) -> Node:
    new = gm.graph.node_copy(one, made.__getitem__)
    if one.op == "get_attr":
        new.target = f"{path}.{one.target}"
    kept = {key: value for key, value in node.meta.items() if key in ("nn_module_stack", "stack_trace")}
    new.meta = {**kept, **({"val": one.meta["val"]} if "val" in one.meta else {})}
    return new


# --- pt2e ------------------------------------------------------------------------------------------------------------


def _x86() -> Any:
    module = _torchao("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
    return module.X86InductorQuantizer().set_global(module.get_default_x86_inductor_quantization_config())


def _limit(gm: GraphModule, first: int | None) -> Iterator[str]:
    """Yield the operations whose operands are annotated; from the one after the first so many on, take all away."""
    count = 0
    for node in gm.graph.nodes:
        annotation = node.meta.get(_ANNOTATION)
        quantised = bool(getattr(annotation, "input_qspec_map", None))
        if first is not None and count >= first and (quantised or count > first):
            node.meta.pop(_ANNOTATION, None)
            count += quantised
        elif quantised:
            count += 1
            yield node.name
