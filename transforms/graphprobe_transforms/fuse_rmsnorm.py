"""RMSNorm written out, with its casts to float32, becomes one ``aten.rms_norm``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch.fx import GraphModule, Node

from graphprobe.pipeline import NotApplied, Outcome
from graphprobe_transforms import graphs, matching
from graphprobe_transforms.graphs import arg, aten, is_call


@dataclass(frozen=True)
class _Match:
    """y = weight * cast(x32 * rsqrt(mean(x32 ** 2) + eps)), x32 = float32(x)."""

    x: Node
    weight: Node | None
    eps: float
    result: Node
    core: tuple[Node, ...]  # from the square to the normalised value, in graph order
    casts: tuple[Node, ...]  # to float32 and back, where they are written


@dataclass(frozen=True)
class FuseRmsNorm:
    """Fuse RMSNorm as llama, qwen2, qwen3 and mistral write it; `where` is a glob on the module path.

    The fused operator rounds once, at the end; written out, a 16-bit norm rounds before and after the weight.
    """

    where: str = "*"
    name: ClassVar[str] = "fuse_rmsnorm"
    stage: ClassVar[str] = "pattern_matcher"
    makes: ClassVar[tuple[str, ...]] = ("aten.rms_norm.default",)

    def apply(self, gm: GraphModule) -> Outcome:
        """Replace every match in `gm`."""
        roots = matching.anchors(gm, self.where, aten.rsqrt.default)
        nothing = f"there is no aten.rsqrt in a module that matches {self.where!r}"
        return matching.rewrite(gm, roots, match, _fuse, nothing)


def match(rsqrt: Node) -> _Match | NotApplied:
    """Match the norm around one ``rsqrt``, or say what is in the way."""
    shifted = arg(rsqrt, 0)
    if not is_call(shifted, aten.add.Tensor) or not isinstance(arg(shifted, 1), float) or shifted.kwargs:
        return NotApplied("rsqrt is not taken of a mean plus a constant", rsqrt.name)
    mean = arg(shifted, 0)
    if not is_call(mean, aten.mean.dim) or list(arg(mean, 1)) != [-1] or mean.args[2:] != (True,) or mean.kwargs:
        return NotApplied("the constant is not added to a mean over the last dimension", shifted.name)
    square = arg(mean, 0)
    if not is_call(square, aten.pow.Tensor_Scalar) or arg(square, 1) != 2:
        return NotApplied("the mean is not taken of a square", mean.name)
    wide = arg(square, 0)
    if len(graphs.users(rsqrt)) > 1:
        return NotApplied("an intermediate value is used elsewhere", rsqrt.name)
    scaled = graphs.only_user(rsqrt, aten.mul.Tensor)
    if scaled is None or wide not in scaled.args:
        return NotApplied("the reciprocal root is not multiplied with the value it came from", rsqrt.name)
    cast = graphs.only_user(scaled, aten.to.dtype)
    result = graphs.only_user(cast or scaled, aten.mul.Tensor)
    if result is None:
        return NotApplied("the normalised value is not multiplied with a weight alone", scaled.name)
    shared = next((n for n in (square, mean, shifted) if len(graphs.users(n)) != 1), None)
    if shared is not None:
        return NotApplied("an intermediate value is used elsewhere", shared.name)
    weight = next((a for a in result.all_input_nodes if a is not (cast or scaled)), None)
    casts = [n for n in (wide, cast) if is_call(n, aten.to.dtype)]
    x = arg(wide, 0) if wide in casts else wide
    return _checked(_Match(x, weight, arg(shifted, 1), result, (square, mean, shifted, rsqrt, scaled), tuple(casts)))


def _checked(m: _Match) -> _Match | NotApplied:
    if m.weight is None:
        return NotApplied("the norm has no weight", m.result.name)
    if lost := matching.unknown(m.x, m.weight, m.result, *m.core):
        return lost
    x, weight, result, *core = (graphs.known(node) for node in (m.x, m.weight, m.result, *m.core))
    if m.weight.op != "get_attr" or weight.shape != x.shape[-1:]:
        return NotApplied("the factor is not a weight of the size of the last dimension", m.result.name)
    if x.dtype != weight.dtype or x.dtype != result.dtype:
        return NotApplied("input, weight and result have different dtypes", m.result.name)
    if any(value.dtype.itemsize < 4 for value in core):
        return NotApplied("the norm is not computed in float32", m.result.name)
    return m


def _fuse(gm: GraphModule, m: _Match) -> list[Node]:
    weight = graphs.tensor(m.weight)
    assert weight is not None  # _checked has seen it
    args = (m.x, list(weight.shape), m.weight, m.eps)
    fused = graphs.insert(m.result, aten.rms_norm.default, args, like=m.result)
    graphs.replace(m.result, fused)
    graphs.erase_unused((*m.core, *m.casts))
    return [fused]
