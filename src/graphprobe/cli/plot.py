"""``graphprobe plot``: the hidden states of two versions, layer by layer and token by token."""

from __future__ import annotations

import argparse
import statistics
from typing import TYPE_CHECKING, Any

from graphprobe.cli import output
from graphprobe.errors import InputError

if TYPE_CHECKING:
    from graphprobe.hidden import Hidden
    from graphprobe.render.states import LayerStates

SUMMARY = "plot the hidden states of two versions, layer by layer and token by token"
DESCRIPTION = """\
Run both graphs on the same inputs, compare what each layer hands on, and say where the versions part and which block
adds nothing (as when its mask hides everything). With -o four plots are drawn below one another:
  tokens     the size of each token's state in both versions, and their correlation, in one layer
  steps      how much each layer changes the state: a block that adds nothing is a flat line
  histogram  the values of the state in one layer
  heatmap    the relative error of every token in every layer
Instead of two .fx files, two .safetensors of `graphprobe tap --keep` are taken, too: tensors of one name are compared.
"""
EXAMPLES = """\
  graphprobe plot before.fx after.fx
  graphprobe plot before.fx after.fx -o states.png
  graphprobe plot before.fx after.fx --states '*.mlp' --kind heatmap -o mlps.svg
  graphprobe plot before.safetensors after.safetensors --layer model.layers.3 -o states.png
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("before", metavar="BEFORE", help="the version that is trusted: .fx or .safetensors")
    parser.add_argument("after", metavar="AFTER", help="the version that is in question")
    parser.add_argument("-o", "--output", metavar="FILE", help="the plots: .png or .svg (none: only words)")
    parser.add_argument("--states", metavar="GLOB", help="outputs of these modules instead of the layers'")
    parser.add_argument("--layer", metavar="NAME", help="the layer of tokens and histogram (where they differ most)")
    parser.add_argument(
        "--kind", action="append", metavar="KIND", help="tokens, steps, histogram, heatmap; may be given again (all)"
    )
    parser.add_argument("--inputs", metavar="FILE", help="inputs: .json, .safetensors, .npz, .pt or another .fx")


def run(options: argparse.Namespace) -> int:
    """Run both, compare, say and draw. Raises FxFileError, InputError, RenderError."""
    from graphprobe import render
    from graphprobe.render.plots import KINDS

    found = _states(options)
    compared = render.compare_states(found.names, found.before, found.after, found.tokens)
    if options.output:
        render.plot_states(compared, options.output, kinds=options.kind or KINDS, layer=options.layer)
    if options.json:
        layers = [_facts(layer) for layer in compared.layers]
        output.print_json({"file": options.output, "layers": layers, "left_out": found.left_out})
        return 0
    print(render.states_text(compared))
    if found.left_out:
        print(f"left out, without a partner in after: {', '.join(found.left_out[:6])}")
    if options.output:
        print(f"\nwrote {options.output}")
    return 0


def _states(options: argparse.Namespace) -> Hidden:
    kept = [path for path in (options.before, options.after) if path.endswith(".safetensors")]
    if len(kept) == 1:
        raise InputError("give two .fx files or two .safetensors: one of each cannot be compared")
    if kept:
        return _kept(options.before, options.after, options.states or "*")
    from graphprobe import fxfile
    from graphprobe.cli import inputs
    from graphprobe.hidden import hidden_states

    before, after = fxfile.load(options.before), fxfile.load(options.after)
    args, kwargs = inputs.for_graph(before, options.before, options.inputs)
    return hidden_states(before, after, args, kwargs, states=options.states)


def _kept(before: str, after: str, glob: str) -> Hidden:
    """Read tensors that `graphprobe tap --keep` wrote; those of one name are a pair."""
    import fnmatch

    import torch

    from graphprobe.cli import inputs
    from graphprobe.hidden import Hidden

    sides = [inputs.inputs_from_file(path)[1] for path in (before, after)]
    chosen = [name for name in sides[0] if fnmatch.fnmatchcase(name, glob)]
    names = [name for name in sorted(chosen, key=_natural) if name in sides[1]]
    if not names:
        raise InputError(f"{before} and {after} have no tensor of one name that matches {glob}")
    arrays = [tuple(side[name].to(torch.float64).numpy() for name in names) for side in sides]
    return Hidden(tuple(names), arrays[0], arrays[1], tuple(name for name in chosen if name not in sides[1]))


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort layers.2 before layers.10."""
    import re

    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _facts(layer: LayerStates) -> dict[str, Any]:
    known = [value for value in layer.correlation if value is not None]
    return {
        "name": layer.name,
        "largest_error": max(layer.error, default=None),
        "median_error": statistics.median(layer.error) if layer.error else None,
        "correlation": min(known, default=None),
        "step_before": statistics.median(layer.step_before) if layer.step_before else None,
        "step_after": statistics.median(layer.step_after) if layer.step_after else None,
        "adds_nothing": layer.adds_nothing,
    }
