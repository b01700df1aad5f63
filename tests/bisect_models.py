"""Small models that no other test of the compiler knows, and passes that spoil a graph of Inductor in one place."""

from __future__ import annotations

import operator
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx import Graph, Node

from corpus import text_models
from models import Case

aten = torch.ops.aten
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs g++ on a CPU")
#: Inductor's own hooks for passes of a user, each with the stage that it belongs to.
HOOKS = {
    "pre_grad_custom_pass": "pre_grad",
    "joint_custom_pre_pass": "joint",
    "joint_custom_post_pass": "joint",
    "post_grad_custom_pre_pass": "post_grad",
    "post_grad_custom_post_pass": "post_grad",
}
_TEXT: dict[str, tuple[str, dict[str, Any]]] = {
    "falcon": ("Falcon", {}),
    "phi": ("Phi", {}),
    "qwen2_moe": (
        "Qwen2Moe",
        {"num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48,
         "shared_expert_intermediate_size": 48},
    ),
}  # fmt: skip
NAMES = ("falcon", "gemma2", "gpt_neox", "opt", "phi", "qwen2_moe", "t5", "vit", "mamba")


def build(name: str, dtype: torch.dtype = torch.float32) -> Case:
    """Build one model in eval mode: (model, args, kwargs)."""
    if name not in ("t5", "vit", "mamba", *_TEXT):
        return text_models.build(name, dtype=dtype)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, args, kwargs = _of_transformers(name)
    return model.eval().to(dtype), tuple(a.to(dtype) if a.is_floating_point() else a for a in args), kwargs


def _of_transformers(name: str) -> Case:
    import transformers

    tokens = torch.randint(3, 128, (2, 12))
    if name == "t5":
        config = transformers.T5Config(
            vocab_size=128, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4, decoder_start_token_id=0
        )
        kwargs = {"input_ids": tokens, "decoder_input_ids": tokens[:, :7], "use_cache": False}
        return transformers.T5ForConditionalGeneration(config), (), kwargs
    if name == "vit":
        sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = transformers.ViTConfig(**sizes, image_size=32, patch_size=8)
        return transformers.ViTForImageClassification(config), (torch.randn(2, 3, 32, 32),), {}
    if name == "mamba":
        config = transformers.MambaConfig(vocab_size=128, hidden_size=64, num_hidden_layers=2, state_size=8)
        return transformers.MambaForCausalLM(config), (), {"input_ids": tokens, "use_cache": False}
    kind, more = _TEXT[name]
    config = getattr(transformers, f"{kind}Config")(**text_models._BASE, **more)
    kwargs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "use_cache": False}
    return getattr(transformers, f"{kind}ForCausalLM")(config), (), kwargs


# --- planted passes --------------------------------------------------------------------------------------------------


def mlp() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)).eval(), (torch.randn(4, 8),)


@dataclass
class Spoil:
    """A pass that puts `make(graph, node)` behind one drawn node that holds floating numbers."""

    make: Callable[[Graph, Node], Node]
    seed: int = 0
    name: str = ""  # of the node, once it was drawn: compiled again, the same is spoilt

    def __call__(self, graph: Graph) -> None:
        if not self.name:
            there = [n.name for n in graph.nodes if n.op.startswith("call") and n.users and _is_floating(n)]
            self.name = random.Random(self.seed).choice(there)
        for node in [n for n in graph.nodes if n.name == self.name]:
            with graph.inserting_after(node):
                new = self.make(graph, node)
            new.meta.update({k: v for k, v in node.meta.items() if k in ("val", "example_value", "tensor_meta")})
            node.replace_all_uses_with(new, delete_user_cb=lambda user, new=new: user is not new)  # type: ignore[misc]


def _value(node: Node) -> Any:
    return node.meta.get("val", node.meta.get("example_value"))


def _is_floating(node: Node) -> bool:
    value = _value(node)
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.numel() > 8


def too_large(graph: Graph, node: Node) -> Node:
    """One percent too large; before AOTAutograd in Python's way."""
    return graph.call_function(aten.mul.Tensor if "val" in node.meta else operator.mul, (node, 1.01))


def infinite(graph: Graph, node: Node) -> Node:
    return graph.call_function(aten.div.Scalar, (node, 0.0))


def no_lowering(graph: Graph, node: Node) -> Node:
    """Wrong, and nothing that Inductor can generate code for."""
    return graph.call_function(operator.mul, (node, 1.01))


def no_shape(graph: Graph, node: Node) -> Node:
    return graph.call_function(aten.view.default, (node, [3, 5, 7, 11]))


def out_of_luck(graph: Graph, node: Node) -> Node:
    raise RuntimeError("out of luck")
