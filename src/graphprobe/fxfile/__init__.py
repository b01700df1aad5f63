"""``.fx`` files: a graph with its provenance, safe to open, portable, each tensor stored once.

`save` writes one, `load` reads it back as a runnable GraphModule, `load_inputs` returns the inputs stored with it.
"""

from graphprobe.fxfile.loading import load, load_inputs
from graphprobe.fxfile.saving import MISSING, save

__all__ = ["MISSING", "load", "load_inputs", "save"]
