"""Rule 1, constants computed ahead: folded batch norms, rotary tables, scales multiplied into weights.

A constant that is bitwise the native value of an input-free node of the other side *is* that node. One without any
partner was computed in its own precision, so the change of the region when it is multiplied by ``1 + u_c xi`` is noise
that it may show; against that noise ``S <= 4`` is asked (an honest conv-bn folding measures about 1, an eps off by 10 %
8), and 8 of a single slice, where few numbers make for more scatter.

A 16-bit constant could hide a real defect in its noise. There the difference must also look like rounding: it touches
most slices of the tensor, not a row or two, and the constant is not nearly what the other side holds or computes.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch.fx import Node

from graphprobe import nodes
from graphprobe.judge.same import PLAIN, Compared, Sameness, Variant, ask, compare, slices, whole_ratio, worst_ratio
from graphprobe.lanes import exact
from graphprobe.lanes.regions import Region
from graphprobe.lanes.replay import Replay

RULE = "1 constants computed ahead"
WHOLE, SLICE = 4.0, 8.0
_DRAWS = 4
_HOPELESS = 100.0
_SMALLEST = 8  # elements of a weight that tell it from others
_SPREAD = 0.05  # a slice that shows less than this share of the constant's rounding shows none
_FLOATS = {torch.float64, torch.float32, torch.float16, torch.bfloat16}


def ask_constants(
    replay: Replay, region: Region, plain: Sameness, base: Variant = PLAIN, known: Collection[Node] = ()
) -> Sameness | None:
    """Ask rule 1 again with folded constants in their own precision; None where that explains nothing.

    `base` is how the exact lanes are evaluated anyway, and `known` are constants that it accounts for.
    """
    lone = {side: [n for n in _lone(replay, region, side) if n not in known] for side in ("before", "after")}
    if not lone["before"] and not lone["after"]:
        return None
    override: dict[Node, torch.Tensor] = {}
    for side, other in (("after", "before"), ("before", "after")):
        override |= _same_as_computed(replay, region, side, other, lone[side])
    variant = Variant({**override, **base.override}, base.relaxed)
    if override:
        answer = ask(replay, region, variant)
        if answer.same:
            return Sameness(True, answer.spread, rule=RULE, exact=answer.exact)
    rest = {side: [n for n in lone[side] if n not in override] for side in lone}
    return _within_rounding(replay, region, variant, rest)


def _lone(replay: Replay, region: Region, side: str) -> list[Node]:
    """Return the floating constants of a piece that no weight of the other piece stands for."""
    plan = replay.plan
    program = plan.before if side == "before" else plan.after
    partnered = set(plan.same_weight) | {plan.same_weight[n] for n in region.after if n in plan.same_weight}
    found = []
    for node in getattr(region, side):
        if node.op == "get_attr" and node not in partnered:
            value = program.attribute(node)
            computed = isinstance(value, torch.Tensor) and value.dtype in _FLOATS and nodes.INSERTED not in node.meta
            if computed and not _is_joined(replay, region, side, value):
                found.append(node)
    return found


def _is_joined(replay: Replay, region: Region, side: str, value: torch.Tensor) -> bool:
    """Whether a weight is bitwise a block of one of the other side, or the other way round: fused q, k and v, the
    shards of a product, the experts of a stack."""
    other = "after" if side == "before" else "before"
    program = replay.plan.after if side == "before" else replay.plan.before
    for node in getattr(region, other):
        theirs = program.attribute(node) if node.op == "get_attr" else None
        if isinstance(theirs, torch.Tensor) and theirs.dtype == value.dtype:
            mine, whole = value.detach(), theirs.detach()
            if _is_block(mine, whole) or _is_block(whole, mine):
                return True
    return False


def _is_block(part: torch.Tensor, whole: torch.Tensor) -> bool:
    """Whether a weight lies, as it is or transposed, in a whole that is larger along one dimension."""
    if part.numel() < _SMALLEST or not part.numel() < whole.numel():
        return False
    turned = (part, part.mT) if part.dim() > 1 else (part,)
    return any(_lies_along(one, whole, dim) for one in turned for dim in range(whole.dim()))


def _lies_along(part: torch.Tensor, whole: torch.Tensor, dim: int) -> bool:
    if whole.dim() == part.dim() + 1:
        part = part.unsqueeze(dim)
    if part.dim() != whole.dim() or part.shape[dim] > whole.shape[dim]:
        return False
    if any(p != w for d, (p, w) in enumerate(zip(part.shape, whole.shape, strict=True)) if d != dim):
        return False
    first, size = part[(0,) * part.dim()], part.shape[dim]
    corner = whole[tuple(slice(None) if d == dim else 0 for d in range(whole.dim()))]
    starts = (corner[: len(corner) - size + 1] == first).nonzero().flatten().tolist()
    return any(torch.equal(whole.narrow(dim, start, size), part) for start in starts)


def _same_as_computed(
    replay: Replay, region: Region, side: str, other: str, constants: list[Node]
) -> dict[Node, torch.Tensor]:
    """Map constants of one side to the exact value of the other side's input-free node they are bitwise equal to."""
    free = _input_free(region, other)
    if not constants or not free:
        return {}
    native, truth = replay.native(other, region), replay.exact_values(other, region)
    program = replay.plan.before if side == "before" else replay.plan.after
    found: dict[Node, torch.Tensor] = {}
    for constant in constants:
        value = program.attribute(constant).detach()
        for node in free:
            made = native[node]
            if not isinstance(made, torch.Tensor) or made.dtype != value.dtype or made.numel() != value.numel():
                continue
            exactly = exact.lift(truth[node]).reshape(value.shape)
            if torch.equal(made.reshape(value.shape), value) or _is_rounded(value, exactly):
                found[constant] = exactly
                break
    return found


def _is_rounded(value: torch.Tensor, truth: torch.Tensor) -> bool:
    """Whether a constant is what the exact values round to in its own precision."""
    ulp = torch.finfo(value.dtype).eps * torch.exp2(torch.floor(torch.log2(value.double().abs().clamp(min=1e-300))))
    near = torch.isfinite(value) & ((value.double() - truth).abs() <= 0.51 * ulp)
    return bool((near | (value.double() == truth)).all())  # an infinity is what no number rounds to


def _input_free(region: Region, side: str) -> list[Node]:
    """Return the operations of a piece that no input of the region reaches."""
    free = region.constant(side)
    return [n for n in getattr(region, side) if n in free and n.op != "get_attr"]


def _within_rounding(
    replay: Replay, region: Region, variant: Variant, constants: dict[str, list[Node]]
) -> Sameness | None:
    found = compare(replay, region, variant)
    if not isinstance(found, Compared) or bool(found.wrong.any()) or not found.truth.is_floating_point():
        return None
    noises, coarse = list[torch.Tensor](), False
    sides = []
    for side, plain in (("before", found.truth), ("after", found.other)):
        program = replay.plan.before if side == "before" else replay.plan.after
        values = {n: program.attribute(n).detach() for n in constants[side]}
        if side == "before":  # a 16-bit weight that after does not use is no reason for noise
            values = {n: v for n, v in values.items() if v.dtype.itemsize >= 4}
        coarse = coarse or any(v.dtype.itemsize < 4 for v in values.values())
        sides += [(side, plain, values)] if values else []
    for draw in range(_DRAWS):
        for side, plain, values in sides:
            rounded = {n: _rounded(v, draw) for n, v in values.items()}
            noisy = replay.exact(side, region, override={**variant.override, **rounded}, relaxed=variant.relaxed)
            noises.append(torch.nan_to_num(noisy - plain))
        if noises and whole_ratio(found.difference, noises) > _HOPELESS * WHOLE:
            return None  # further draws scatter, but not by so much
    if not noises:
        return None
    spread, where = worst_ratio(found.difference, noises)
    if coarse and _resembles_computed(replay, region, constants):
        return None
    if (
        whole_ratio(found.difference, noises) > WHOLE
        or spread > SLICE
        or (coarse and not _touches_all(found.difference, noises))
    ):
        return None
    note = "a constant was computed ahead, in 16 bits: a defect below its rounding would not show" if coarse else ""
    return Sameness(True, spread, where, rule=RULE, exact=found.relative, note=note)


def _resembles_computed(replay: Replay, region: Region, constants: dict[str, list[Node]]) -> bool:
    """Whether a constant nearly holds what the other side holds or computes: then it is that value, wrongly rounded."""
    for side, other in (("after", "before"), ("before", "after")):
        free = _input_free(region, other)
        native = replay.native(other, region) if constants[side] and free else {}
        for constant in constants[side]:
            value = _value(replay, side, constant).double().reshape(-1)
            weights = [exact.lift(_value(replay, other, n)) for n in getattr(region, other) if n.op == "get_attr"]
            for made in (*(native[n] for n in free), *weights):
                if isinstance(made, torch.Tensor) and _is_near(made, value):
                    return True
    return False


def _is_near(made: torch.Tensor, value: torch.Tensor) -> bool:
    if not made.is_floating_point() or made.numel() != value.numel():
        return False
    made = made.double().reshape(-1)
    return bool(torch.linalg.vector_norm(made - value) < 0.1 * torch.linalg.vector_norm(value))


def _value(replay: Replay, side: str, node: Node) -> torch.Tensor:
    program = replay.plan.before if side == "before" else replay.plan.after
    value: torch.Tensor = program.attribute(node)
    return value.detach()


def _rounded(value: torch.Tensor, draw: int) -> torch.Tensor:
    generator = torch.Generator(device=value.device).manual_seed(1000 + draw)
    xi = torch.rand(value.shape, generator=generator, dtype=torch.float64, device=value.device) * 2 - 1
    return value.double() * (1 + torch.finfo(value.dtype).eps / 2 * xi)


def _touches_all(difference: torch.Tensor, noises: list[torch.Tensor]) -> bool:
    for dim in range(difference.dim()):
        if difference.shape[dim] > 1:
            ratio = slices(difference, dim) / torch.stack([slices(n, dim) for n in noises]).amax(0)
            if float(torch.nan_to_num(ratio).median()) < _SPREAD:
                return False
    return True
