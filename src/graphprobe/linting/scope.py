"""What a rule looks at: one graph, its place in the whole, and what fake execution says about its nodes."""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from graphprobe import provenance
from graphprobe.linting.recompute import Recomputed, recompute
from graphprobe.records import Lint


@dataclass(frozen=True)
class Scope:
    """The root graph (path '') or the body of a control-flow operator at `path`."""

    gm: GraphModule
    path: str
    root: GraphModule
    autocast: tuple[Any, ...] = ()  # arguments of the torch.autocast that the body runs under
    only: frozenset[Node] | None = None  # the nodes whose values are computed again; None: all

    @functools.cached_property
    def recomputed(self) -> Recomputed:
        """The values that the graph's operators give on its placeholders, without real data."""
        with torch.autocast(*self.autocast) if self.autocast else contextlib.nullcontext():
            return recompute(self.gm, self.only)

    def issue(self, rule: str, node: Node, message: str, fix: str) -> Lint:
        """Make the record of a defect at a node."""
        return Lint(
            rule=rule,
            node=f"{self.path}/{node.name}" if self.path else node.name,
            message=message,
            fix=fix,
            target=provenance.target_name(node),
            source=provenance.source(node),
            module_path=provenance.module_path(node),
        )


def scopes(gm: GraphModule, only: frozenset[Node] | None = None) -> list[Scope]:
    """Return the root graph and every graph that a node of it reaches, outermost first, each once."""
    found = [Scope(gm, "", gm, only=only)]
    seen = {id(gm)}
    for scope in found:  # grows while it is walked
        for node in scope.gm.graph.nodes:
            inner = attribute(scope.gm, str(node.target)) if node.op in ("get_attr", "call_module") else None
            if isinstance(inner, GraphModule) and id(inner) not in seen:
                seen.add(id(inner))
                path = f"{scope.path}/{node.target}" if scope.path else str(node.target)
                found.append(Scope(inner, path, gm, _autocast_of(node) or scope.autocast, only))
    return found


def _autocast_of(body: Node) -> tuple[Any, ...]:
    for user in body.users:
        if user.target is torch.ops.higher_order.wrap_with_autocast:
            return tuple(user.args[:4])  # device type, dtype, enabled, cache
    return ()


def attribute(gm: torch.nn.Module, target: str) -> Any:
    """Return what a get_attr or call_module target names, None where nothing is there."""
    found: Any = gm
    for part in target.split("."):
        found = getattr(found, part, None)
    return found
