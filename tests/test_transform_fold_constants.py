"""fold_constants: what is stored, the numbers, the metadata, and what is left to be computed."""

from __future__ import annotations

import pytest
import torch

import graphprobe
from graphprobe import nodes
from graphprobe.pipeline import Pipeline
from transform_cases import LANGUAGE, apply, case, count
from transform_tools import captured, reason


@pytest.mark.parametrize("name", LANGUAGE)
def test_nothing_that_no_input_reaches_is_left_to_compute(name: str) -> None:
    gm = case("fold_constants").run(name).gm
    fed: set[torch.fx.Node] = set(gm.graph.find_nodes(op="placeholder"))
    for node in gm.graph.nodes:
        if any(source in fed for source in node.all_input_nodes):
            fed.add(node)
        elif node.op == "call_function" and not nodes.returns_nothing(node):
            # a view of a weight costs nothing and is not stored a second time
            assert nodes.is_view(node) and node.all_input_nodes[0].op == "get_attr", node.name


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral"])
def test_rotary_tables_are_stored_as_the_graph_would_compute_them(name: str) -> None:
    gm = case("fold_constants").run(name).gm
    assert not {"aten.cos.default", "aten.sin.default", "aten.arange.default"} & count(gm).keys()
    before, _, kwargs = captured(name)
    assert torch.equal(gm(**kwargs).logits, before(**kwargs).logits)


class Noise(torch.nn.Module):
    """Random numbers depend on no input, and are no constants."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.randn(4)


def test_random_numbers_are_no_constants() -> None:
    done, _ = apply("fold_constants", Noise(), torch.zeros(4))
    assert "depends on an input" in reason(done)


def test_large_constants_are_left_to_be_computed() -> None:
    gm = captured("llama")[0]
    small = Pipeline.parse("fold_constants{max_elements=1}").run(gm)
    assert all(buffer.numel() <= 1 for name, buffer in small.gm.named_buffers() if name.startswith("_folded"))


class Dynamic(torch.nn.Module):
    """Positions of as many tokens as there are."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.arange(x.shape[0]).unsqueeze(1) * torch.arange(4)


def test_what_depends_on_a_symbolic_size_is_not_stored() -> None:
    shapes = {"x": {0: torch.export.Dim("n", min=2, max=64)}}
    gm = graphprobe.capture(Dynamic(), (torch.zeros(3, 4),), dynamic_shapes=shapes)
    done = Pipeline.parse("fold_constants").run(gm)
    assert torch.equal(done.gm(torch.zeros(7, 4)), Dynamic()(torch.zeros(7, 4)))
