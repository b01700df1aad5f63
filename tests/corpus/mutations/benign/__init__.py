"""Benign rewrites: the same function written otherwise. Each is ``(gm, node) -> the node that carries it, or None``."""

from __future__ import annotations

from corpus.mutations.benign import arithmetic, layouts, norms, products
from corpus.mutations.graphs import Change

BENIGN: dict[str, Change] = {
    "commute": arithmetic.commute,
    "divide for multiply": arithmetic.divide_for_multiply,
    "subtract the negative": arithmetic.subtract_the_negative,
    "square": arithmetic.square,
    "times one": arithmetic.times_one,
    "scale before product": arithmetic.scale_before_product,
    "sum in another order": arithmetic.sum_in_another_order,
    "linear as matmul": products.linear_as_matmul,
    "linear as einsum": products.linear_as_einsum,
    "linear with stored transpose": products.linear_with_stored_transpose,
    "split K": products.split_k,
    "split rows": products.split_rows,
    "in chunks": products.in_chunks,
    "padded": products.padded,
    "joined projections": products.joined_projections,
    "in float32": products.in_float32,
    "addmm as matmul": products.addmm_as_matmul,
    "conv as product": products.conv_as_product,
    "attention as math": norms.attention_as_math,
    "softmax by hand": norms.softmax_by_hand,
    "softmax by log": norms.softmax_by_log,
    "layer norm by hand": norms.layer_norm_by_hand,
    "layer norm from moments": norms.layer_norm_from_moments,
    "batch norm by hand": norms.batch_norm_by_hand,
    "rsqrt by hand": norms.rsqrt_by_hand,
    "mean by sum": norms.mean_by_sum,
    "silu by hand": arithmetic.silu_by_hand,
    "gelu by hand": arithmetic.gelu_by_hand,
    "relu as clamp": arithmetic.relu_as_clamp,
    "transpose twice": layouts.transpose_twice,
    "computed twice": layouts.computed_twice,
    "cat by scatter": layouts.cat_by_scatter,
    "transpose as permute": layouts.transpose_as_permute,
    "heads folded into batch": layouts.heads_folded_into_batch,
    "embedding as index": layouts.embedding_as_index,
    "masked by where": layouts.masked_by_where,
    "constant ahead": layouts.constant_ahead,
    "weight in float32": layouts.weight_in_float32,
}
