"""Defects: one operation is made wrong. Each is ``(gm, node) -> the node that carries it, or None``."""

from __future__ import annotations

from corpus.mutations.defects import functions, operands, places, weights
from corpus.mutations.graphs import Change

DEFECTS: dict[str, Change] = {
    "constant 0.1%": functions.scale_constant(1.001),
    "constant 10%": functions.scale_constant(1.1),
    "constant sign": functions.scale_constant(-1.0),
    "epsilon": functions.epsilon,
    "exponent": functions.exponent,
    "filled with zero": functions.filled_with_zero,
    "swap operands": operands.swap_operands,
    "drop": operands.drop,
    "drop first": operands.drop_first,
    "operand twice": operands.operand_twice,
    "other operand": operands.other_operand,
    "no bias": operands.no_bias,
    "mask dropped": operands.mask_dropped,
    "keys for values": operands.keys_for_values,
    "wrong axis": places.wrong_axis,
    "swap dims": places.swap_dims,
    "view for transpose": places.view_for_transpose,
    "reversed heads": places.reversed_heads,
    "repeat order": places.repeat_order,
    "swap concat": places.swap_concat,
    "roll": places.roll,
    "mask off by one": places.off_by_one_mask,
    "slice off by one": places.slice_off_by_one,
    "other half": places.other_half,
    "next row": places.next_row,
    "wrong row": weights.other_weight("row"),
    "wrong row 1%": weights.other_weight("row 1%"),
    "wrong head": weights.other_weight("head"),
    "wrong element": weights.other_weight("element"),
    "weight transposed": weights.other_weight("transposed"),
    "weight zero": weights.other_weight("zero"),
    "weight rounded": weights.other_weight("rounded"),
    "weight of another layer": weights.weight_of_another_layer,
    "cast": functions.cast,
    "other function": functions.other_function,
    "gelu variant": functions.gelu_variant,
    "smallest": functions.smallest,
    "doubled": functions.doubled,
}
