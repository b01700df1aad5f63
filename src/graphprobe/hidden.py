"""The hidden states of two versions of a model, layer by layer, paired and ready to be plotted."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from graphprobe import api, graphview
from graphprobe.errors import InputError, nearest
from graphprobe.records import ClaimRecord, Replacement
from graphprobe.render import layers_of
from graphprobe.render.layers import members
from graphprobe.render.spine import spine_of
from graphprobe.render.wiring import Wiring, wire
from graphprobe.taps import instrument
from graphprobe.taps.returned import module_outputs, value_names

START = "layers' input"


@dataclass(frozen=True)
class Hidden:
    """One state for each layer and side, float64 arrays [..., tokens, hidden]; `left_out` names layers without a pair.

    `tokens` are the ids of the tokens, where the inputs tell.
    """

    names: tuple[str, ...]
    before: tuple[Any, ...]
    after: tuple[Any, ...]
    left_out: tuple[str, ...] = ()
    tokens: tuple[str, ...] = ()


def hidden_states(
    before: GraphModule,
    after: GraphModule,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    states: str | None = None,
    events: Sequence[Replacement] | None = None,
) -> Hidden:
    """Run both versions on the same inputs and return what each layer hands on.

    `states` is a glob of module paths whose outputs are wanted instead of the layers'. A state of before is paired
    with what claims it in after, else with what the module of the same name returns there, if the same operator makes
    it. `events` are the replacements recorded while a transform ran. Raises InputError where there is nothing to pair.
    """
    given = dict(kwargs or {})
    wanted = _wanted(before, states)
    claims = api.alignment(before, after, tuple(args), given, events=events).claims
    partners = _partners(after, wanted, claims)
    pairs = [(name, node, partners[name]) for name, node in wanted.items() if name in partners]
    if not pairs:
        raise InputError(f"none of {', '.join(list(wanted)[:4])} has a partner in after: what is to be compared there?")
    found = []
    for gm, chosen in ((before, [node for _, node, _ in pairs]), (after, [node for _, _, node in pairs])):
        found.append(_run(gm, chosen, args, given))
    return Hidden(
        tuple(name for name, _, _ in pairs),
        tuple(found[0]),
        tuple(found[1]),
        tuple(name for name in wanted if name not in partners),
        _tokens(args, given, found[0][0].shape[:-1]),
    )


def _wanted(gm: GraphModule, states: str | None) -> dict[str, Node]:
    """Return the nodes of before whose values are asked for, by the name to be shown."""
    outputs = module_outputs(gm)
    if states is not None:
        found = {name: node for name, node in outputs.items() if fnmatch.fnmatchcase(name, states) and _is_state(node)}
        if not found:
            raise InputError(f"--states {states} matches no module that returns a tensor{nearest(states, outputs)}")
        return found
    wiring = wire(graphview.view(gm))
    found = {}
    for layer in layers_of(wiring.graph):
        # of several results it is the last that goes on: caches are handed out before it is computed
        returned = [node for name, node in outputs.items() if name in (layer, *_numbered(layer)) and _is_state(node)]
        if returned:
            found[layer] = returned[-1]
    if not found:
        raise InputError("this graph has no numbered layers; name the modules whose outputs are wanted: --states GLOB")
    start = _start(gm, wiring, next(iter(found)))
    return {START: start, **found} if start is not None else found


def _numbered(layer: str) -> tuple[str, ...]:
    return tuple(f"{layer}[{i}]" for i in range(8))


def _start(gm: GraphModule, wiring: Wiring, layer: str) -> Node | None:
    """Return the node whose value the residual stream brings into the first layer."""
    inside = members(wiring, (layer,))
    outside = spine_of(wiring, inside) - set(inside)
    by_name = {node.name: node for node in gm.graph.nodes}
    return by_name[outside.pop()] if len(outside) == 1 else None


def _is_state(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dim() >= 2 and value.is_floating_point()


def _partners(after: GraphModule, wanted: dict[str, Node], claims: Sequence[ClaimRecord]) -> dict[str, Node]:
    claimed: dict[str, str] = {}
    for claim in claims:
        if claim.certain or claim.before not in claimed:
            claimed[claim.before] = claim.after
    by_name = {node.name: node for node in after.graph.nodes}
    outputs = module_outputs(after)
    found = {}
    for name, node in wanted.items():
        partner = by_name.get(claimed.get(node.name, ""))
        if partner is None and name in outputs and outputs[name].target == node.target:
            partner = outputs[name]
        if partner is not None and _shape(partner) == _shape(node):
            found[name] = partner
    return found


def _shape(node: Node) -> tuple[Any, ...]:
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()


def _run(gm: GraphModule, nodes: list[Node], args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
    named = {node: name for name, node in value_names(gm).items() if node in set(nodes)}
    missing = [node.name for node in nodes if node not in named]
    if missing:
        raise InputError(f"the value of {missing[0]} cannot be kept: it is no tensor that the graph computes")
    probe = instrument(gm, keep=tuple(dict.fromkeys(named[node] for node in nodes)))
    with torch.no_grad():
        probe(*args, **kwargs)
    return [probe.tensors[named[node]].detach().to("cpu", torch.float64).numpy() for node in nodes]


def _tokens(args: Sequence[Any], kwargs: Mapping[str, Any], shape: tuple[int, ...]) -> tuple[str, ...]:
    """Return the ids of the tokens where an input of whole numbers has the states' shape."""
    for value in (*kwargs.values(), *args):
        if isinstance(value, torch.Tensor) and value.dtype == torch.int64 and tuple(value.shape) == tuple(shape):
            return tuple(str(token) for token in value.flatten().tolist())
    return ()
