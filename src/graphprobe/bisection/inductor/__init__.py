"""PyTorch's own compiler as a pipeline: its graphs are recorded between its passes, run as FX, and compared.

``recording`` compiles a model once and keeps every graph on the way; ``inquiry`` looks for the first wrong step.
"""

from graphprobe.bisection.inductor.entry import bisect

__all__ = ["bisect"]
