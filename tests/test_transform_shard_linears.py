"""shard_linears: what is its own; what holds of every transform is in test_transforms.py."""

from __future__ import annotations

import pytest

from graphprobe.errors import PipelineError
from graphprobe.pipeline import Pipeline
from transform_cases import count
from transform_tools import captured, matches, reason

#: name -> layers that are cut by columns and by rows, in two decoder or encoder layers
LAYERS = {"llama": (10, 4), "qwen2": (10, 4), "qwen3": (10, 4), "mistral": (10, 4), "gpt2": (4, 4), "bert": (8, 4)}


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_is_cut_once_for_each_rank(name: str, world: int) -> None:
    column, row = LAYERS[name]
    before = captured(name)[0]
    done = Pipeline.parse(f"shard_linears{{world={world}}}").run(before)
    found = count(done.gm)
    assert len(matches(done)) == column + row
    assert found["graphprobe_transforms.all_gather.default"] == column
    assert found["graphprobe_transforms.all_reduce.default"] == row
    sharded = [n for n, _ in done.gm.named_parameters() if "weight_rank" in n]
    assert len(sharded) == world * (column + row)
    assert sum(p.numel() for p in done.gm.parameters()) == sum(p.numel() for p in before.parameters())


def test_sizes_that_do_not_divide_are_a_near_miss_that_is_named() -> None:
    done = Pipeline.parse("shard_linears{world=7}").run(captured("llama")[0])
    assert "not divisible by 7 ranks" in reason(done)


def test_one_rank_is_refused() -> None:
    with pytest.raises(PipelineError, match="at least 2 ranks"):
        Pipeline.parse("shard_linears{world=1}")
