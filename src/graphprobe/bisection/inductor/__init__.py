"""PyTorch's own compiler as a pipeline: its graphs are recorded between its passes, run as FX, and compared.

``recording`` compiles a model once and keeps every graph on the way; ``inquiry`` looks for the first wrong step.
"""

from graphprobe.bisection.inductor.entry import bisect
from graphprobe.bisection.inductor.running import run

__all__ = ["bisect", "run"]
