"""A user's own DOT laid over a picture of ours: notes, colours, and edges that no graph knows of."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from graphprobe.errors import RenderError
from graphprobe.render.scene import plain

_DEFAULTS = ("node", "edge", "graph")  # names under which pydot lists the defaults of a graph


def merge(dot: str, notes: str, boxes: Mapping[str, str]) -> str:
    """Return the picture `dot` with the nodes and edges of `notes` in it, both DOT text.

    A node of `notes` that is called like an operation stands for the box that shows it, `boxes` mapping the one to the
    other: its attributes go over those of the box. Other nodes and all edges are added. Clusters of `notes` are
    taken apart: a box lies in the cluster of its module already. Raises RenderError where `notes` is no DOT.
    """
    added: list[str] = []
    for graph in _parsed(notes):
        defaults = {name: _attributes(_first(graph, name)) for name in ("node", "edge")}
        for part in _nested(graph):
            added += [_node(node, boxes, defaults["node"]) for node in part.get_nodes() if _name(node) not in _DEFAULTS]
            added += [_edge(edge, boxes, defaults["edge"]) for edge in part.get_edges()]
    body, closing, _ = dot.rpartition("}")
    return body + "".join(f"\t{line}\n" for line in added) + closing + "\n"


def _parsed(notes: str) -> list[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydot's parser uses old names of its own parser
        try:
            import pydot

            graphs = pydot.graph_from_dot_data(notes)
        except ImportError as error:
            raise RenderError("reading DOT needs the package pydot: pip install 'graphprobe[pictures]'") from error
        except Exception as error:  # the parser's errors come through, of several classes
            raise RenderError(f"this is no DOT that pydot can read: {error}") from error
    if not graphs:
        raise RenderError("this is no DOT that pydot can read: it must be 'digraph { ... }'")
    return list(graphs)


def _nested(graph: Any) -> Iterator[Any]:
    yield graph
    for part in graph.get_subgraphs():
        yield from _nested(part)


def _first(graph: Any, name: str) -> Any:
    found = graph.get_node(name)
    return found[0] if found else None


def _attributes(element: Any) -> dict[str, str]:
    return {} if element is None else {str(key): str(value) for key, value in element.get_attributes().items()}


def _node(node: Any, boxes: Mapping[str, str], defaults: dict[str, str]) -> str:
    name = _name(node)
    # the defaults of the notes are for what they add, not for boxes that they only speak of
    attributes = _attributes(node) if name in boxes else {**defaults, **_attributes(node)}
    return f"{_end(name, boxes)}{_listed(attributes)}"


def _edge(edge: Any, boxes: Mapping[str, str], defaults: dict[str, str]) -> str:
    ends = (_unquoted(str(end)) for end in (edge.get_source(), edge.get_destination()))
    tail, head = (_end(end, boxes) for end in ends)
    return f"{tail} -> {head}{_listed({**defaults, **_attributes(edge)})}"


def _name(node: Any) -> str:
    return _unquoted(str(node.get_name()))


def _end(name: str, boxes: Mapping[str, str]) -> str:
    found = boxes.get(name)
    return _quoted(plain(found) if found is not None else name)


def _unquoted(text: str) -> str:
    return text[1:-1].replace('\\"', '"') if len(text) > 1 and text.startswith('"') and text.endswith('"') else text


def _quoted(text: str) -> str:
    return '"' + text.replace('"', '\\"') + '"'


def _listed(attributes: Mapping[str, str]) -> str:
    # values come from pydot as they were written, quotes and all
    words = [f"{key}={value if value else _quoted('')}" for key, value in attributes.items()]
    return f" [{' '.join(words)}]" if words else ""
