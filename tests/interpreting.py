"""Triton's kernels without a GPU: the same checks in a process of their own, where Triton interprets them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

_START = """
import sys, warnings
sys.path.insert(0, {tests!r})
warnings.filterwarnings("ignore")  # numpy's, about values in lanes that are masked out
"""


def check(code: str) -> None:
    """Run code that imports from the tests and raises where something is wrong; skip where Triton cannot interpret."""
    pytest.importorskip("triton", minversion="3.8", reason="older interpreters fail on loops with numpy 2.4")
    code = _START.format(tests=str(Path(__file__).parent)) + code
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
