"""What a transform is, and what it says of itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch.fx import GraphModule

#: The stages of a pipeline in their order, those of AutoDeploy.
STAGES = (
    "factory",
    "export",
    "post_export",
    "pattern_matcher",
    "sharding",
    "weight_load",
    "post_load_fusion",
    "cache_init",
    "visualize",
    "export_onnx",
    "compile",
)


@dataclass(frozen=True)
class NotApplied:
    """The transform changed nothing; why, and the node of the nearest miss where there was one."""

    reason: str
    node: str = ""


@dataclass(frozen=True)
class Applied:
    """The transform changed the graph; one name (a module path or node) for each place that matched.

    `misses` are the places that it looked at and left alone: a fusion that fires in one layer of fifty is news.
    """

    matches: tuple[str, ...]
    misses: tuple[NotApplied, ...] = ()


def commonest(misses: Sequence[NotApplied]) -> NotApplied:
    """Return the first of the misses that have the reason most of them have; there must be one."""
    reason, _ = Counter(miss.reason for miss in misses).most_common(1)[0]
    return next(miss for miss in misses if miss.reason == reason)


@dataclass(frozen=True)
class Unsaid:
    """The transform is a plain function that does not say what it matched: what was observed decides."""


Outcome = Applied | NotApplied


@runtime_checkable
class Transform(Protocol):
    """A graph pass: a frozen dataclass whose fields beside `name` and `stage` are its options."""

    @property
    def name(self) -> str: ...

    @property
    def stage(self) -> str: ...

    def apply(self, gm: GraphModule) -> Outcome | Unsaid:
        """Change `gm` where it stands and say what matched; `gm` is recompiled afterwards."""
        ...


@dataclass(frozen=True)
class Settings:
    """How a pipeline treats one transform: AutoDeploy's keys, with AutoDeploy's defaults."""

    enabled: bool = True
    stage: str = ""  # in place of the transform's own
    skip_on_error: bool = False  # undo it and go on, instead of ending the run
    run_graph_cleanup: bool = True  # after it: drop nodes and modules that nobody uses
    run_shape_prop: bool = False  # after it: compute every meta["val"] anew
    requires_clean_graph: bool = True  # before it: clean up where an earlier transform left the graph unclean
    requires_shape_prop: bool = False  # before it: compute every meta["val"] anew where the graph has changed
    expect_mem_change: bool = False  # a change of the weights' memory is meant, and not worth a note
