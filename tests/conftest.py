"""Tests marked `gpu` are skipped where there is no CUDA device; no test may change what all of them share."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def shared_graphs_stay_as_they_are() -> Iterator[None]:
    """Fail the test that writes into a graph or into weights that other tests share, not a later one."""
    yield
    tools = sys.modules.get("transform_tools")
    changed = [] if tools is None else tools.changed()
    assert not changed, f"the test has changed the shared graphs {changed}: take with_own_weights(...)"
