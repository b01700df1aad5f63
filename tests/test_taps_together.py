"""Small values that are read together, as on a GPU, tell the same as when each is read alone."""

from __future__ import annotations

import pytest
import torch

import graphprobe
import models
import test_taps
from graphprobe.taps import insertion, operators
from test_taps import (  # noqa: F401  collected here again, under the fixture
    test_a_value_is_read_before_it_is_changed_in_place,
    test_a_written_part_gives_a_row_for_the_part_and_one_for_the_whole,
    test_every_value_is_observed_once_and_rightly,
    test_writes_of_every_kind_are_observed,
)
from test_taps_calls import (  # noqa: F401
    test_a_size_that_depends_on_data_is_counted_and_cannot_be_kept,
    test_one_capture_of_a_dynamic_program_serves_all_sizes,
)


@pytest.fixture(autouse=True)
def _together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(insertion, "_WAITING", {"cpu"})


def tapped(probe: graphprobe.Probe) -> list[int]:
    """Return how many values each tap of the graph reads."""
    found = []
    for node in probe.graph.graph.nodes:
        if node.target is operators.TAP_SEVERAL:
            found.append(len(node.args[0]))
        elif node.target is operators.TAP:
            found.append(1)
    return found


def test_a_small_model_needs_few_taps_and_says_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, args, kwargs = models.tiny("llama")
    together = graphprobe.instrument(model)
    first = together(*args, **kwargs)
    monkeypatch.setattr(insertion, "_WAITING", set())
    alone = graphprobe.instrument(model)
    assert test_taps.same(first, alone(*args, **kwargs))
    assert together.taps == alone.taps
    assert len(tapped(together)) < len(tapped(alone)) / 10
    assert sum(tapped(together)) == sum(tapped(alone))


def test_what_waits_holds_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(insertion, "_HELD", 3000)

    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(9):
                x = x + 1
            return x

    probe = graphprobe.instrument(Model())
    probe(torch.zeros(250))  # a thousand bytes each
    assert tapped(probe) == [3, 3, 3]
    probe(torch.zeros(insertion._SMALL))  # four times as large as what waits
    assert tapped(probe) == [1] * 9
