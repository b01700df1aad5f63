"""Two sentences for a newcomer, with the numbers."""

from __future__ import annotations

from graphprobe.records import Finding


def number(x: float | None) -> str:
    """Show a relative error: '3.3e-03', '0', '-' where it was not measured."""
    if x is None:
        return "-"
    return "0" if x == 0 else f"{x:.1e}"


def explain(finding: Finding) -> str:
    """Say what was found, what it means for the finding's kind, and what to do next where something is to be done."""
    where = f" in {finding.module_path}" if finding.module_path else ""
    what = f"{finding.op}{where}" if finding.located else f"{region(finding)}{where}"
    said = _SENTENCES[finding.kind](finding, what)
    step = _next(finding)
    said = said[:1].upper() + said[1:] if not finding.located else said
    return f"{said} Next: {step}." if step else said


def region(f: Finding) -> str:
    """Name a piece too large for one of its operations to be named."""
    side, names = ("after", f.after) if f.after else ("before", f.before)
    end = f.outputs[side == "after"]
    return f"the region of {len(names)} operations" + (f" that ends in {end}" if end else "")


def _next(f: Finding) -> str:
    """Suggest one step, by what the finding looks like, else by its kind."""
    looks = [part for part in f.hint.split("; ") if part.startswith("looks like")]
    kinds = " ".join(part.partition(":")[0] for part in looks)  # behind it the user's own names follow
    for words, step in _STEPS:
        if words in (" ".join(looks) if ":" in words else kinds):
            return step
    if f.kind != "semantic" or f.rule.startswith(("3", "4")):
        return ""
    if not f.located:
        return "draw both sides (graphprobe diff --png)"
    line = f"compare {f.source}" if f.source else f"compare {f.culprit or f.op}"
    return f"{line} with what before does there (graphprobe diff --png draws both sides)"


#: What a finding may look like -> what to look at first.
_STEPS = (
    ("never loaded", "look whether the checkpoint has this name, and whether loading it was strict"),
    ("each other's places: with", "look how checkpoint names are mapped to these two weights"),
    ("damaged weight", "look whether the checkpoint is whole, and what converted it"),
    ("training mode", "call .eval() on the model before it is captured"),
    ("an overflow", "keep this value in a wider dtype (bfloat16 or float32), or scale it down before"),
    ("not tied", "tie the weights after loading, or load both"),
    ("another weight of the layer", "look how checkpoint names are mapped within a layer"),
    ("another layer's weight", "look how checkpoint names are mapped to layers"),
    ("transposed weight", "look in which order this layer stores rows and columns"),
    ("adapter", "look at the adapter's scale (alpha / r), and whether it was merged twice"),
    ("wrong rows", "look at padding and slicing of this weight"),
    ("of the weight", "look how this weight was split, joined or sharded"),
    (".view() was meant", "read stored bytes with .view(dtype); .to(dtype) converts numbers"),
    ("epsilon", "take epsilon from the model's configuration"),
    ("left out", "look which step of the conversion drops it"),
    ("missing scale", "multiply by the scale, or fold it into a weight"),
    ("inverted scale", "look whether the scale is meant to multiply or to divide"),
    ("transposed scale", "look along which dimension the scale belongs"),
    ("scale of other", "look how scales are ordered beside the rows of codes"),
    ("root of a scale", "look whether sqrt(d) or d is meant"),
    ("root was meant", "look whether sqrt(d) or d is meant"),
    ("another constant", "take the number from the model's configuration"),
    ("doubled sum", "count the reductions on this path, and what each rank adds before them"),
    ("ranks", "count the reductions on this path, and what each rank adds before them"),
    ("missing addend", "add it back, or look which match of the fusion dropped it"),
    ("off by one", "look at both ends of the range: < or <=, 0 or 1"),
    ("boolean mask", "turn it into 0 and -inf first, or use masked_fill"),
    ("hides nothing", "fill with -inf or the dtype's lowest number"),
    ("mask", "draw both masks and compare them row by row"),
    ("split order", "look in which order the fused weight was joined"),
    ("order", "look how dimensions are split, joined and permuted here"),
    ("swapped operands", "exchange the two inputs"),
    ("wrong operand", "look which value this operation is meant to take"),
    ("wrong dimensions", "look at the shapes before and after this view"),
)


def _semantic(f: Finding, what: str) -> str:
    if f.rule.startswith("3"):
        return (
            f"{what} differs by {number(f.introduced)} on the same inputs, far more than rounding, and holds an "
            "operator that exact arithmetic does not know. Register its definition with graphprobe.exact_rule to "
            "learn whether it computes another function or the same one too coarsely."
        )
    if f.rule.startswith("4") and "beside" not in f.hint:
        return (
            f"{what} is quantised, but its codes and scales do not stand for before's weight or value to within half a "
            f"step. On the same inputs this shows as {number(f.introduced)}; look at how scales and zero points are "
            "chosen, laid out and applied."
        )
    if f.exact == 0 and f.spread == float("inf"):
        return (
            f"{what} computes another function than before: elements that are a number in one version are masked, "
            "infinite or NaN in the other. All others agree, with rounding removed (float64)."
        )
    words = (
        f"{what} computes another function than before: on the same inputs and with rounding removed (float64) the "
        f"results differ by {number(f.exact)}"
    )
    if f.spread is not None and f.spread != float("inf"):
        words += f", {f.spread:.0e} times the rounding noise of float64 itself"
    native = f"In the model's own precision this shows as {number(f.introduced)}"
    if f.floor is not None:
        native += f", against a rounding error of {number(f.floor)} that is normal here"
    note = " The difference is masked further down on these inputs, but it is there." if "masked" in f.rule else ""
    return f"{words}. {native}.{note}"


def _precision(f: Finding, what: str) -> str:
    return (
        f"{what} computes the same function as before, but too coarsely: it adds {number(f.introduced)}, more than "
        f"eight times what before's own precision ({number(f.floor)}) or the dtype of its result would explain. "
        "Raise the dtype in which this operation computes, or accept the loss with --accept."
    )


def _rounding(f: Finding, what: str) -> str:
    if f.rule.startswith("6"):
        return (
            f"{what} takes another decision where the scores are equal to within rounding: {f.hint}. "
            "Given the same decisions, both versions compute the same function, so this is not a bug."
        )
    if f.rule.startswith("3"):
        return f"{what} stays within rounding of before: it adds {number(f.introduced)}. But {f.hint}."
    exact = "are the same program" if f.exact in (0.0, None) else f"agree to {number(f.exact)} in exact arithmetic"
    return (
        f"{what} rounds differently: it adds {number(f.introduced)}, while both versions {exact}. "
        "This is not a bug, however large it looks further down."
    )


def _nonfinite(f: Finding, what: str) -> str:
    return (
        f"{what} turns finite inputs into NaN or infinity, where before stays finite. "
        "Look for an overflow of a narrow dtype, a division by zero or a fully masked row here."
    )


def _structural(f: Finding, what: str) -> str:
    why = f.hint or "it raises or has another shape"
    return f"{what} cannot be compared: {why}. The rest was judged as far as it ran."


def _quantization(f: Finding, what: str) -> str:
    return (
        f"{what} is quantised: it changes its result by {number(f.introduced)}, within what its bits explain. "
        "With the quantised values put into both versions, they compute the same function."
    )


def _unknown(f: Finding, what: str) -> str:
    return (
        f"{what} could not be judged: {f.hint or 'there is no exact arithmetic for it'}. "
        f"It differs from before by {number(f.introduced)} on the same inputs."
    )


_SENTENCES = {
    "semantic": _semantic,
    "precision": _precision,
    "rounding": _rounding,
    "identical": _rounding,
    "nonfinite": _nonfinite,
    "structural": _structural,
    "quantization": _quantization,
    "unknown": _unknown,
}
