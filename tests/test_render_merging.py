"""A user's own DOT over a picture of ours, read back as a structure."""

from __future__ import annotations

import pytest

from graphprobe import render
from graphprobe.errors import RenderError
from render_reading import Picture
from render_samples import llama

NOTES = """
digraph mine {
    node [shape=note];
    "scale_1" [color=red, penwidth=5, xlabel="is this right?"];
    idea [label="ask \\"Ana\\" first"];
    idea -> scale_1 [style=dotted];
    subgraph cluster_x { more -> idea; }
}
"""


def test_nodes_called_like_operations_mark_their_boxes_and_others_are_added() -> None:
    plain, merged = Picture(render.dot_layer(llama(), 1)), Picture(render.dot_layer(llama(), 1, notes=NOTES))
    assert set(merged.boxes) - set(plain.boxes) == {"idea", "more"}
    box = merged.boxes["scale_1"]
    assert (box["color"], box["penwidth"], box["xlabel"]) == ("red", "5", "is this right?")
    # what the notes do not speak of stays as it was, shape included
    assert {key: box[key] for key in ("label", "fillcolor", "shape")} == {
        key: plain.boxes["scale_1"][key] for key in ("label", "fillcolor", "shape")
    }
    assert merged.clusters["scale_1"] == plain.clusters["scale_1"]
    assert merged.boxes["idea"]["shape"] == "note" and 'ask "Ana" first' in merged.text("idea")
    assert merged.links[("idea", "scale_1")]["style"] == "dotted" and ("more", "idea") in merged.links


def test_an_operation_within_a_folded_box_marks_that_box() -> None:
    merged = Picture(render.dot_graph(llama(12), limit=30, notes="digraph { scale_7 [color=red] why -> scale_7 }"))
    assert merged.boxes["module model.layers.7"]["color"] == "red"
    assert ("why", "module model.layers.7") in merged.links


@pytest.mark.parametrize("notes", ["digraph { a -> ", "no dot at all", "{}"])
def test_notes_that_are_no_dot_get_one_sentence(notes: str) -> None:
    with pytest.raises(RenderError, match="no DOT"):
        render.dot_layer(llama(), 1, notes=notes)
