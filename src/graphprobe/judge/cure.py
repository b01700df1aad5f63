"""Rule 10: run `after` freely once more, with before's region in place of after's, and see how much error goes.

Before's region runs on the free lane's own inputs; putting before's *value* there would cure everything upstream too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import Node

from graphprobe import nodes
from graphprobe.align.claims import Claim
from graphprobe.execute import Values, run_program
from graphprobe.lanes import elements, norms
from graphprobe.lanes.regions import Region
from graphprobe.lanes.replay import Replay


class Cures:
    """Knows before's outputs and the error of the free lane; asks once per finding: one forward run of after."""

    def __init__(
        self, replay: Replay, errors: Mapping[Claim, float], regions: Iterable[Region], identical: Iterable[Claim]
    ) -> None:
        """`errors` holds the relative error of every output in the free lane, as the lanes measured it; what is
        `identical` there has before's values, so that a run of after may go on from them."""
        self.replay = replay
        self.identical = [c for c in identical if nodes.same_dtype(c.before, c.after)]
        self.outputs = list(errors)
        frontiers = [n for r in regions for n in (*(p for p, _ in r.frontier), *r.loose_before)]
        replay.fetch([*(c.before for c in self.outputs), *frontiers])  # one run of before for all findings
        self.reference = {c.before: replay.values[c.before] for c in self.outputs}
        replay.fetch_masks([(c.before, c.after) for c in self.outputs])
        self.error = math.sqrt(sum(e * e for e in errors.values()))

    def share(self, regions: Sequence[Region]) -> float | None:
        """Return the share (0..1) of the output error that goes when these regions alone are replaced; None without
        error. More than one region stands for one finding where an operation that nothing claims feeds several."""
        if self.error == 0 or not self.outputs:
            return None
        replaced = {region.claim.after: self._in_place_of(region) for region in regions}
        order, held = self.replay.plan.after.order, self.replay.values
        first = min(order[n] for n in replaced)
        above = [c for c in self.identical if c.before in held and order[c.after] < first]
        try:
            values = run_program(
                self.replay.plan.after,
                self.replay.inputs,
                [c.after for c in self.outputs],
                replace=replaced,
                hold=[q for region in regions for _, q in region.frontier],
                skip=self.replay.plan.dead() - set(replaced),
                known={c.after: held[c.before] for c in above},
            )
        except Exception:  # the replaced value does not fit below: nothing can be said
            return None
        left = self._error(values)
        return max(0.0, min(1.0, 1.0 - left / self.error)) if left == left else 0.0

    def _in_place_of(self, region: Region) -> Callable[[Values], Any]:
        """Return what evaluates before's piece on the free lane's values."""

        def replaced(env: Values) -> Any:
            local: Values = {p: _to(env[q], p) for p, q in reversed(region.frontier)}
            local.update({p: self.replay.values[p] for p in region.loose_before})
            return _to(self.replay.run_piece("before", region, local)[region.claim.before], region.claim.after)

        return replaced

    def _error(self, values: Values) -> float:
        """Return the relative L2 errors of all outputs, joined; NaN counts as infinite."""
        total = 0.0
        for claim in self.outputs:
            if claim.after not in values:
                continue
            b, f = self.reference[claim.before], values[claim.after]
            if not isinstance(b, torch.Tensor) or b.shape != f.shape:
                continue
            bounds = elements.sentinel_bounds(claim.before, claim.after)
            total += relative_error(b, f, self.replay.mask(claim.before, claim.after), bounds) ** 2
        return math.sqrt(total)


def relative_error(b: torch.Tensor, f: torch.Tensor, moved: torch.Tensor | None, bounds: elements.Bounds) -> float:
    """Return ||f - b|| / ||b|| over the elements that count; infinite where the classes of elements differ."""
    work = elements.work_dtype(b, f)
    x, y = elements.keep(moved, elements.real(b).to(work), elements.real(f).to(work))
    difference, kept, wrong = elements.compared(x, y, bounds)
    if wrong is not None and bool(wrong.any()):
        return float("inf")
    top, bottom = float(norms.squares(difference)), float(norms.squares(kept))
    return math.sqrt(top / bottom) if bottom > 0 else (0.0 if top == 0 else float("inf"))


def _to(value: Any, like: Node) -> Any:
    wanted = nodes.tensor_val(like)
    if isinstance(value, torch.Tensor) and wanted is not None and wanted.dtype != value.dtype:
        return value.to(wanted.dtype)
    return value
