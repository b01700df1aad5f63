"""What Inductor does, told to a listener while it compiles: passes, pattern matches, the graph that is lowered."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

from torch.fx import GraphModule, Node

from graphprobe import torch_private

_SUBSYSTEMS = {"pre_grad_passes": "pre_grad", "joint_graph_passes": "joint", "post_grad_passes": "post_grad"}
_PATTERNS = ("lowering_pattern", "graph_pattern", "replacement_pattern")


class Listener(Protocol):
    """Is told what happens."""

    def phase(self, stage: str, gm: GraphModule) -> None:
        """A stage begins or has ended with this graph as its whole."""

    def enter(self, stage: str, name: str, gm: GraphModule) -> None:
        """A pass begins."""

    def leave(self, stage: str, name: str, gm: GraphModule) -> None:
        """A pass has ended."""

    def match(self, name: str, kind: str, match: Any, node: Node, apply: Callable[[], None]) -> None:
        """A pattern has matched at a node; `apply` rewrites it."""

    def lowered(self, gm: GraphModule) -> None:
        """Code is about to be generated for this graph."""

    def falls_back(self, node: str) -> bool:
        """Whether the operation is left to its eager kernel."""
        ...


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Tell the listener what Inductor does inside the block. Raises PipelineError where this torch has other names."""
    with ExitStack() as stack:
        for name, hook in _hooks(listener).items():
            stack.enter_context(torch_private.replaced(name, hook(torch_private.fetch(name))))
        yield


def _hooks(listener: Listener) -> dict[str, Callable[[Any], Any]]:
    return {
        "observer_enter": lambda original: _entering(original, listener),
        "observer_exit": lambda original: _leaving(original, listener),
        "joint_passes": lambda original: _phase(original, listener, "joint"),
        "post_grad_passes": lambda original: _phase(original, listener, "post_grad"),
        "lowering": lambda original: _lowering(original, listener),
        "disable_subsystem": lambda original: _fallback(original, listener),
        **{name: (lambda original, kind=name: _matching(original, listener, kind)) for name in _PATTERNS},  # type: ignore[misc]
    }


def _entering(original: Any, listener: Listener) -> Any:
    def enter(self: Any) -> Any:
        listener.enter(_SUBSYSTEMS.get(self.subsystem, ""), self.passname, self.gm)
        return original(self)

    return enter


def _leaving(original: Any, listener: Listener) -> Any:
    def leave(self: Any, *error: Any) -> Any:
        result = original(self, *error)
        if any(one is not None for one in error):  # it raises: what it leaves behind is no graph of the pipeline
            return result
        listener.leave(_SUBSYSTEMS.get(self.subsystem, ""), self.passname, self.gm)
        return result

    return leave


def _phase(original: Any, listener: Listener, stage: str) -> Any:
    depth = 0

    def passes(gm: GraphModule, *args: Any, **kwargs: Any) -> Any:
        nonlocal depth
        if depth == 0:  # it calls itself for the bodies of control flow
            listener.phase(stage, gm)
        depth += 1
        try:
            result = original(gm, *args, **kwargs)
        finally:
            depth -= 1
        if depth == 0:
            listener.phase(stage, result if isinstance(result, GraphModule) else gm)
        return result

    return passes


def _matching(original: Any, listener: Listener, kind: str) -> Any:
    def apply(self: Any, match: Any, graph: Any, node: Node) -> None:
        handler = getattr(self, "handler", None)
        name = getattr(self, "pattern_name", None) or getattr(handler, "__name__", "") or type(self).__name__
        listener.match(name, kind, match, node, lambda: original(self, match, graph, node))

    return apply


def _lowering(original: Any, listener: Listener) -> Any:
    def init(self: Any, gm: GraphModule, *args: Any, **kwargs: Any) -> None:
        if type(self).__name__ == "GraphLowering" and not kwargs.get("is_const_graph"):  # not the bodies within it
            listener.lowered(gm)
        original(self, gm, *args, **kwargs)

    return init


def _fallback(original: Any, listener: Listener) -> Any:
    def disable_subsystem(backend: str, subsystem: str, info: Callable[[], str] | None = None) -> bool:
        if subsystem == "lowerings" and info is not None and listener.falls_back(info()):
            return True
        return bool(original(backend, subsystem, info))  # torch's own environment variables go on working

    return staticmethod(disable_subsystem)
