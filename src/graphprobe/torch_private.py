"""Every private name of torch that graphprobe's bisection of compilers rests on, with the versions it was seen in.

A private name is looked up here and nowhere else, so that a torch that has moved one gives one clear message. A test
looks every row up. (FX's node hooks have their own place, ``observe``.)
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from graphprobe.errors import PipelineError


@dataclass(frozen=True)
class Private:
    """One private name: where it is, what for, and where it was seen."""

    path: str  # "module:attribute.attribute"
    use: str
    seen: tuple[str, ...] = ("2.11", "2.12", "2.13")


TABLE: dict[str, Private] = {
    "compile_fx": Private("torch._inductor.compile_fx:compile_fx", "compile a Dynamo graph with Inductor"),
    "compile_fx_inner": Private("torch._inductor.compile_fx:compile_fx_inner", "lower a graph and generate its code"),
    "joint_passes": Private(
        "torch._inductor.compile_fx:_recursive_joint_graph_passes", "know where the joint-graph passes begin and end"
    ),
    "post_grad_passes": Private(
        "torch._inductor.compile_fx:_recursive_post_grad_passes", "know where the post-grad passes begin and end"
    ),
    "observer_enter": Private(
        "torch.fx.passes.graph_transform_observer:GraphTransformObserver.__enter__", "see each pass of Inductor begin"
    ),
    "observer_exit": Private(
        "torch.fx.passes.graph_transform_observer:GraphTransformObserver.__exit__", "see each pass of Inductor end"
    ),
    "lowering_pattern": Private(
        "torch._inductor.pattern_matcher:LoweringPatternEntry.apply",
        "see patterns match, and limit how many are applied",
    ),
    "graph_pattern": Private(
        "torch._inductor.pattern_matcher:GraphPatternEntry.apply", "see patterns match, and limit how many are applied"
    ),
    "replacement_pattern": Private(
        "torch._inductor.pattern_matcher:ReplacementPatternEntry.apply",
        "see patterns match, and limit how many are applied",
    ),
    "lowering": Private("torch._inductor.graph:GraphLowering.__init__", "see the graph that code is generated for"),
    "disable_subsystem": Private(
        "torch._inductor.compiler_bisector:CompilerBisector.disable_subsystem",
        "leave single operations to the eager kernels",
    ),
    "inductor_config": Private("torch._inductor.config:patch", "switch Inductor's caches and options for a while"),
    "aot_config": Private("torch._functorch.config:patch", "switch AOTAutograd's cache off for a while"),
    "tracing_context": Private("torch._guards:TracingContext.try_get", "read how AOTAutograd changed the signature"),
    "counters": Private("torch._dynamo.utils:counters", "name the rewrites within a pass of Inductor"),
}


def fetch(name: str) -> Any:
    """Return the private object that a row of the table names. Raises PipelineError where this torch has none."""
    owner, attribute = owner_of(name)
    return getattr(owner, attribute)


def require() -> None:
    """Look every row up, so that a torch that has moved one is refused before any work. Raises PipelineError."""
    for name in TABLE:
        fetch(name)


@contextmanager
def switched(name: str, options: Mapping[str, Any]) -> Iterator[None]:
    """Set options of one of torch's config modules inside the block. Raises PipelineError for one that it lacks."""
    owner, attribute = owner_of(name)
    for option in options:
        if not hasattr(owner, option):
            raise PipelineError(f"torch {torch.__version__} has no option {owner.__name__}.{option}")
    with getattr(owner, attribute)(dict(options)):
        yield


def owner_of(name: str) -> tuple[Any, str]:
    """Return the module or class that holds a private object, and its name there. Raises PipelineError."""
    row = TABLE[name]
    module_name, _, path = row.path.partition(":")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # torch warns of parts of its own while it imports them
            owner: Any = importlib.import_module(module_name)
        *inner, last = path.split(".")
        for part in inner:
            owner = getattr(owner, part)
        getattr(owner, last)
    except (ImportError, AttributeError) as error:
        raise PipelineError(
            f"torch {torch.__version__} has no {row.path} ({error}), which graphprobe needs to {row.use}; "
            f"it was seen in torch {', '.join(row.seen)}: use one of these"
        ) from error
    return owner, last


@contextmanager
def replaced(name: str, value: Any) -> Iterator[None]:
    """Put `value` in the place of a private object inside the block."""
    owner, attribute = owner_of(name)
    was = owner.__dict__[attribute]  # as it is stored: a classmethod stays one
    setattr(owner, attribute, value)
    try:
        yield
    finally:
        setattr(owner, attribute, was)
