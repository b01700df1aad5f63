"""Graphs of one rank, with collectives that return before they are done: in a process of its own, which has a group."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import graphprobe

OPS = torch.ops._c10d_functional


class Decoder(nn.Module):
    """Two layers of an MLP; `split` runs what the only rank of a tensor-parallel group runs."""

    def __init__(self, split: bool, bug: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.split, self.bug = split, bug
        self.up = nn.ModuleList(nn.Linear(32, 96) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(96, 32) for _ in range(2))

    def reduced(self, x: torch.Tensor) -> torch.Tensor:
        return OPS.wait_tensor(OPS.all_reduce(x, "sum", group())) if self.split else x

    def gathered(self, x: torch.Tensor) -> torch.Tensor:
        if not self.split:
            return x
        own = OPS.wait_tensor(OPS.reduce_scatter_tensor(x, "sum", 1, group()))
        return OPS.wait_tensor(OPS.all_gather_into_tensor(own, 1, group()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i, (up, down) in enumerate(zip(self.up, self.down, strict=True)):
            y = down(torch.relu(up(self.gathered(x))))
            if self.bug == "scale" and i:
                y = y * 1.01
            if self.bug == "twice" and i:
                y = self.reduced(y)
                y = y + y
            x = x + self.reduced(y)
        return torch.sin(x)


class Together(nn.Module):
    """Several sums are started at once."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        one, two = OPS.all_reduce_coalesced([x * 2, y.exp()], "sum", group())
        return OPS.wait_tensor(one) + OPS.wait_tensor(two)


def group() -> str:
    world = dist.group.WORLD
    assert world is not None
    return world.group_name


def _observed(dtype: torch.dtype) -> dict[str, Any]:
    """What is said of each pair; whether taps read what the collectives have brought."""
    x, found = torch.randn(4, 8, 32, dtype=dtype), dict[str, Any]()
    whole = Decoder(False).to(dtype)
    for bug in ("", "scale", "twice"):
        other = Decoder(True, bug).to(dtype)
        for turned in (False, True):
            sides = (other, whole) if turned else (whole, other)
            for again in range(1 if bug else 3):
                report = graphprobe.diff(*sides, (x,))
                found[f"{bug} {turned} {again}"] = [report.verdict, [f.op for f in report.findings]]
    probe = graphprobe.instrument(Decoder(True).to(dtype))
    probe(x)
    found["taps"] = [[t.op, t.nan, t.max] for t in probe.taps if "c10d" in t.op and not t.derived]
    together = Together(), (x.float(), x.float())
    report = graphprobe.diff(together[0], Together(), together[1])
    found["together"] = report.verdict
    return found


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch has no gloo")
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_what_is_in_flight_is_never_read(dtype: str) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parent)])}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, dtype], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    taps = found.pop("taps")
    assert [op for op, _, _ in taps] == ["_c10d_functional.wait_tensor.default"] * 6  # the others hold nothing yet
    assert not any(nan for _, nan, _ in taps) and all(most < 100 for _, _, most in taps)
    assert found.pop("together") == "identical"
    for name, (verdict, ops) in found.items():
        bug, turned, _ = name.split(" ")
        if not bug:
            assert verdict == "identical", (name, verdict, ops)
        else:
            wanted = {"scale": "mul", "twice": "add"}[bug]
            assert verdict == "semantic" and len(ops) == 1, (name, verdict, ops)
            assert turned == "True" or wanted in ops[0], (name, ops)


if __name__ == "__main__":
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    print(json.dumps(_observed(getattr(torch, sys.argv[1]))))
    dist.destroy_process_group()
