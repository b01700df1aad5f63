"""Kinds of defect that show a signature are named: "looks like a missing scale", never "is".

A table of signs, the most telling first; each measures the exact values of a guilty region, or evaluates it again with
one thing as `before` has it, and says what it looks like or nothing.
"""

from __future__ import annotations

from collections.abc import Callable

from torch.fx import Node

from graphprobe.judge.culprit import Culprit
from graphprobe.judge.hints import layers, masks, numbers, orders, overflow, ratios, scales, trials, weights
from graphprobe.judge.hints.look import Look
from graphprobe.lanes.regions import Region
from graphprobe.lanes.replay import Replay

#: Asked in this order; the first that recognises its sign has the word.
SIGNS: tuple[Callable[[Look], str | None], ...] = (
    layers.layer,
    numbers.training,
    trials.other_argument,
    numbers.other_number,
    weights.weight,
    trials.cast_for_view,
    masks.boolean_added,
    masks.values,
    ratios.constant_ratio,
    ratios.constant_distance,
    ratios.addend,
    orders.halves,
    orders.transposed,
    orders.permuted,
    trials.swapped,
    orders.rearranged,
    scales.scale,
    trials.dropped,
    ratios.slice_ratios,
    trials.wired,
    masks.reach,
)


#: Of a region in which all numbers agree, and only infinities and mask values stand elsewhere.
OF_CLASSES = (
    trials.other_argument,
    weights.weight,
    trials.cast_for_view,
    masks.boolean_added,
    masks.values,
    masks.reach,
)


def hint(replay: Replay, region: Region, culprit: Culprit) -> tuple[str, Node | None]:
    """Say what a guilty region looks like, or '', and which operation a trial has shown to be to blame, if one has.

    The values of its frontier must have been fetched.
    """
    look = Look(replay, region, culprit)
    try:
        if look.agrees(look.raw[1]):  # then nothing but what the native dtype does can differ
            return overflow.overflow(look), None
    except Exception:  # operators that cannot be evaluated here
        return "", None
    for sign in SIGNS if bool(look.change.any()) else OF_CLASSES:
        look.proved.clear()
        try:
            said = sign(look)
        except Exception:  # a hint is a courtesy: values that a sign does not fit say nothing
            continue
        if said:
            return said, next(iter(look.proved), None)
    return "", None
