"""DOT text read back as a structure of boxes, links and clusters, so that tests ask nothing of strings.

The layout engine's own parser reads it: pydot's takes seconds where clusters are nested, so one test alone uses that.
"""

from __future__ import annotations

import html
import json
import re
import subprocess
from typing import Any

from graphprobe.render.engine import find_engine


class Picture:
    """A parsed DOT text: the attributes of boxes and links, and the titles of the clusters around each box."""

    def __init__(self, dot: str) -> None:
        engine = find_engine()
        assert engine is not None, "these tests need a layout engine: pip install graphviz-pure"
        done = subprocess.run([engine, "-Tdot_json"], input=dot.encode(), capture_output=True, check=True)
        parsed = json.loads(done.stdout)
        objects: list[dict[str, Any]] = parsed.get("objects", [])
        groups = [entry for entry in objects if "nodes" in entry or "subgraphs" in entry]
        plain = [entry for entry in objects if not entry["name"].startswith("cluster_") and "label" in entry]
        name = {entry["_gvid"]: entry["name"] for entry in objects}
        self.title = words(parsed["label"])
        self.boxes = {entry["name"]: entry for entry in plain if entry not in groups}
        self.links = {(name[e["tail"]], name[e["head"]]): e for e in parsed.get("edges", [])}
        ranked = [entry for entry in groups if entry.get("rank") == "same"]
        self.levels = [{name[member] for member in entry["nodes"]} for entry in ranked]
        self.clusters: dict[str, tuple[str, ...]] = {box: () for box in self.boxes}
        for entry in sorted(groups, key=lambda g: -len(g.get("nodes", ()))):
            if entry["name"].startswith("cluster_"):
                for member in entry["nodes"]:
                    self.clusters[name[member]] += (words(entry["label"]),)

    def text(self, name: str) -> str:
        """Return what a box says."""
        return words(self.boxes[name]["label"])

    def members(self, name: str) -> list[str]:
        """Return the operations behind a box, which its tooltip lists first."""
        return str(self.boxes[name]["tooltip"]).split("\n")[0].split(", ")

    def box_with(self, text: str) -> str:
        """Return the one box that says `text`."""
        found = [name for name in self.boxes if text in self.text(name)]
        assert len(found) == 1, f"{len(found)} boxes say {text!r}"
        return found[0]

    def with_fill(self, fill: str) -> list[str]:
        """Return the boxes of that fill."""
        return [name for name, box in self.boxes.items() if box["fillcolor"] == fill]


def words(label: str) -> str:
    """Return what a reader sees of an HTML-like label, line by line."""
    text = re.sub(r"<[^>]*>", " ", re.sub(r"<BR[^>]*>|</TR>", "\n", label))
    return "\n".join(line.strip() for line in html.unescape(text).splitlines() if line.strip())
