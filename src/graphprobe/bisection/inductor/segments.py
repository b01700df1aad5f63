"""The graphs of a recorded compilation in an order in which they can be compared, each with a name of its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import GraphModule

from graphprobe.bisection.inductor import snapshots
from graphprobe.bisection.inductor.snapshots import Piece, Snapshot


@dataclass(frozen=True, eq=False)
class Segment:
    """Neighbouring graphs of one piece that are called in the same way."""

    snapshots: tuple[Snapshot, ...]
    graphs: tuple[GraphModule, ...]
    inputs: tuple[Any, ...]
    labels: tuple[str, ...]


def segments_of(piece: Piece) -> list[Segment]:
    """Return one segment, two where AOTAutograd has changed the signature beyond what can be adapted."""
    border, labels = piece.boundary, labels_of(piece.snapshots)
    outer, inner = tuple(piece.snapshots[:border]), tuple(piece.snapshots[border:])
    graphs = tuple(snapshots.in_aten(s.gm, piece.inputs or ()) for s in outer)
    if not inner or piece.inputs is None:
        return [Segment(outer, graphs, piece.inputs or (), labels[:border])]
    if piece.adapter is not None:
        names = [str(n.target) for n in outer[0].gm.graph.find_nodes(op="placeholder")]
        adapted = tuple(piece.adapter.adapted(s.gm, names) for s in inner)
        return [Segment(outer + inner, graphs + adapted, piece.inputs, labels)]
    second = Segment(inner, tuple(s.gm for s in inner), piece.inner_inputs or (), labels[border:])
    return [Segment(outer, graphs, piece.inputs, labels[:border]), second]


def labels_of(taken: Sequence[Snapshot]) -> tuple[str, ...]:
    """Return the label of each snapshot; one that is there again is numbered."""
    met: Counter[str] = Counter()
    found = []
    for snapshot in taken:
        met[snapshot.label] += 1
        number = met[snapshot.label]
        found.append(snapshot.label + (f"#{number}" if number > 1 else ""))
    return tuple(found)
