"""Rule 4: quantisation is a bounded change, not an error; and a bug must not hide behind it.

Stored codes stand for an effective weight, codes made on the fly for what was rounded. If both obey the bound of
`judge.codes`, the effective weight is put into both exact lanes, rounding on the fly is taken out of both, and rule 1
is asked again: what is left is a defect, however honest the codes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.fx import Node

from graphprobe import nodes, provenance
from graphprobe.chains import FP8, Chain, chains
from graphprobe.judge.codes import Fit, Grid, code_fit, fit, float8_fit
from graphprobe.judge.constants import ask_constants
from graphprobe.judge.effective import Effective, Finder
from graphprobe.judge.packing import flip
from graphprobe.judge.same import Sameness, Variant, ask
from graphprobe.lanes import exact
from graphprobe.lanes.regions import Region
from graphprobe.lanes.relaxed import relaxed_call
from graphprobe.lanes.replay import Replay
from graphprobe.quantizers import FAKE_QUANTIZERS, Affine

RULE = "4 quantization"
_GATHERS = {"aten::embedding", "aten::index", "aten::index_select", "aten::gather"}


def ask_quantization(replay: Replay, region: Region, plain: Sameness) -> Sameness | None:
    """Ask rule 1 with quantisation taken out of both sides; None where nothing here is quantised.

    What is left of the difference then has the last word: it is a defect beside the quantisation.
    """
    made = {side: chains(getattr(region, side)) for side in ("before", "after")}
    relaxed = {n for side in made for chain in made[side] for n in chain.members}
    stored, lost = _stored(replay, region, relaxed)
    if not relaxed and not stored:
        return _gathered(replay, region, plain) if lost else None
    variant = Variant({e.weight: e.override for e in stored}, relaxed)
    answer = ask(replay, region, variant)
    fits = [(_weight_name(e), fit(e.wanted, e.held, e.grid, _activation(replay, region, e))) for e in stored]
    for side in ("before", "after"):
        fits += _chain_fits(replay, region, side, made[side])
    for name, found in fits:
        if not found.holds:
            return dataclasses.replace(plain, rule=RULE, note=f"{name}: {found.why}")
    if not fits:
        return None
    if answer.same is False and any(e.factor is not None for e in stored):
        # what was folded into the weight was folded into a bias, too: computed ahead, in its own precision
        answer = (
            ask_constants(replay, region, answer, variant, {n for e in stored for n in (e.weight, *e.made_of)})
            or answer
        )
    if not answer.same:
        note = f"beside an honest quantisation ({_summary(fits)})"
        return dataclasses.replace(answer, rule=RULE, note=note) if answer.same is False else answer
    return Sameness(
        True, answer.spread, rule=RULE, kind="quantization", note=_summary(fits), better="before", exact=plain.exact
    )


def _stored(replay: Replay, region: Region, relaxed: set[Node]) -> tuple[list[Effective], bool]:
    """Return the effective weights of the codes of both sides, and whether codes are left that stand for none."""
    found: list[Effective] = []
    lost = False
    for side in ("after", "before"):
        finder = Finder(replay, region, side, relaxed)
        for leaf in finder.codes():
            effective = finder.find(leaf)
            if effective is None:
                lost = True
            elif all(e.weight is not effective.weight for e in found):
                found.append(effective)
    return found, lost


def _activation(replay: Replay, region: Region, effective: Effective) -> torch.Tensor | None:
    """Return what the weight is multiplied with, [tokens, columns] float64, where the frontier holds exactly that."""
    columns = effective.wanted.shape[1]
    for p, _ in region.frontier:
        value = replay.values.get(p)
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.shape[-1:] == (columns,):
            return value.double().reshape(-1, columns)
    return None


# --- codes made on the fly ------------------------------------------------------------------------------------------


def _chain_fits(replay: Replay, region: Region, side: str, made: list[Chain]) -> list[tuple[str, Fit]]:
    if not made:
        return []
    values = replay.exact_values(side, region)
    program = replay.plan.before if side == "before" else replay.plan.after

    def value_of(node: Node) -> Any:
        return exact.lift(program.attribute(node)) if node.op == "get_attr" else values[node]

    fits = []
    for chain in made:
        name = f"{provenance.target_name(chain.source)} rounded to codes"
        if chain.fake:
            affine = _fake_operands(chain.last, value_of)
            fits.append((name, code_fit(affine.relaxed(), affine.codes().double(), chain.bounds())))
            continue
        codes, unrounded = values[chain.last], _unrounded(chain, value_of)
        if chain.dtype() in FP8:
            fits.append((name, float8_fit(unrounded, codes, chain.dtype() or torch.float8_e4m3fn)))
            continue
        bounds = chain.bounds()
        helps = any(
            chain is not c and _feeds(chain, c) for c in made
        )  # a zero point: one number, all levels of its own
        fits.append((name, code_fit(unrounded, codes.double(), None if helps else bounds)))
    return fits


def _unrounded(chain: Chain, value_of: Callable[[Node], Any]) -> torch.Tensor:
    """Evaluate a chain on what really reached it, without rounding."""
    local: dict[Node, Any] = {}

    def operand(node: Node) -> Any:
        return local[node] if node in local else value_of(node)

    for node in chain.path:
        args = torch.fx.map_arg(node.args, operand)
        kwargs = torch.fx.map_arg(node.kwargs, operand)
        target, args, kwargs = relaxed_call(node, args, kwargs, node in chain.members)
        local[node] = target(*args, **kwargs)
    value = local[chain.last]
    assert isinstance(value, torch.Tensor)
    return value.double()


def _fake_operands(node: Node, value_of: Callable[[Node], Any]) -> Affine:
    """Return the operands of a fake quantiser."""
    args, kwargs = torch.fx.map_arg(node.args, value_of), torch.fx.map_arg(node.kwargs, value_of)
    return FAKE_QUANTIZERS[nodes.schema_name(node)](*args, **kwargs)


def _feeds(chain: Chain, other: Chain) -> bool:
    """Whether the codes of one chain are an operand of the other's path: its zero point."""
    seen, stack = set(), [n for member in other.path for n in member.all_input_nodes if n not in other.path]
    while stack:
        node = stack.pop()
        if node in chain.members:
            return True
        if node not in seen and node is not other.source:
            seen.add(node)
            stack.extend(node.all_input_nodes)
    return False


# --- tables ---------------------------------------------------------------------------------------------------------


def _gathered(replay: Replay, region: Region, plain: Sameness) -> Sameness | None:
    """Ask the bound of rows read from a table of codes: the result of the region is the effective value itself."""
    if any(isinstance(v := replay.values.get(p), torch.Tensor) and v.is_floating_point() for p, _ in region.frontier):
        return None
    finder = Finder(replay, region, "after", ())
    for leaf in finder.codes():
        codes = finder.program.attribute(leaf).detach()
        truth, held = replay.exact("before", region), replay.exact("after", region)
        for fields in (1, 2, 4):
            moved = replay.exact("after", region, override={leaf: flip(codes, fields)})
            wide = truth.shape[-1]
            step = (moved - held).abs().reshape(-1, wide)
            if not bool((step > 0).any()):
                continue
            step = torch.where(torch.isfinite(step) & (step > 0), step, step.nan_to_num(0.0).amax(1, keepdim=True))
            float8 = codes.dtype if codes.dtype in FP8 else None
            grid = Grid(step, codes.dtype.itemsize * 8 // fields, float8, 2.0**-9)
            found = fit(truth.reshape(-1, wide), held.reshape(-1, wide), grid)
            if found.holds:
                note = _summary([("the table", found)])
                return Sameness(True, plain.spread, rule=RULE, kind="quantization", note=note, better="before")
    return None


# --- words ----------------------------------------------------------------------------------------------------------


def _weight_name(effective: Effective) -> str:
    bits = "8-bit float" if effective.grid.float8 else f"{effective.grid.bits}-bit"
    return f"{bits} weight {effective.weight.target}"


def _summary(fits: Iterable[tuple[str, Fit]]) -> str:
    parts = []
    for name, found in fits:
        how = f"{found.ratio:.1f} times the error of round-to-nearest" if found.ratio else "rounded to nearest"
        chosen = "" if found.nearest else ", chosen for the output instead of rounded to nearest"
        parts.append(f"{name}: {100 * found.inside:.1f} % within half a step, {how}{chosen}")
    return "; ".join(parts)
