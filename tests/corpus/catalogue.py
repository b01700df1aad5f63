"""All cases of the corpus: importing this module registers them."""

from __future__ import annotations

from corpus import benign, defects_attention, defects_layers, defects_quantised
from corpus.records import CASES, Bug, Case, Truth, judged

__all__ = [
    "CASES",
    "Bug",
    "Case",
    "Truth",
    "benign",
    "defects_attention",
    "defects_layers",
    "defects_quantised",
    "judged",
]
