"""``graphprobe tap``: the statistics of every operation of one run."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphprobe.cli import output
from graphprobe.errors import InputError

if TYPE_CHECKING:
    from graphprobe.records import Tap

SUMMARY = "run a graph and list the range, mean and NaNs of every operation"
DESCRIPTION = """\
Run one graph with a tap on every operation that makes new values, and print the table: minimum, maximum, mean, root
mean square, and how many values are NaN, infinite or zero. The taps change nothing: the output is bitwise the same.
Inputs are those stored in the file, unless --inputs gives others; without either they are drawn to fit the graph.
"""
EXAMPLES = """\
  graphprobe tap before.fx
  graphprobe tap before.fx -o taps.json
  graphprobe tap before.fx --keep '*.mlp.*' -o tensors.safetensors
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("file", metavar="FILE.fx", help="the graph")
    parser.add_argument("--inputs", metavar="FILE", help="inputs: .json, .safetensors, .npz, .pt or another .fx")
    parser.add_argument("--device", metavar="DEVICE", help="run there, e.g. cuda (default: where the weights are)")
    parser.add_argument(
        "--memory",
        choices=("resident", "stream"),
        default="resident",
        help="where weights are: all on the device, or in their files, from which they come one by one (stream)",
    )
    parser.add_argument(
        "--checksum", action="store_true", help="with a checksum of each value's bits, the same on every device"
    )
    parser.add_argument("--keep", metavar="GLOB", help="keep the whole tensors of matching modules and operations")
    parser.add_argument(
        "-o", "--output", metavar="FILE", help="write the table (.json) or the kept tensors (.safetensors)"
    )


def run(options: argparse.Namespace) -> int:
    """Run under observation and print. Raises FxFileError, InputError."""
    import torch

    import graphprobe
    from graphprobe import render
    from graphprobe.cli import inputs

    _check_output(options)
    streams = options.memory == "stream"
    gm = graphprobe.load(options.file, mapped=streams)
    args, kwargs = inputs.for_graph(gm, options.file, options.inputs)
    if options.device and not streams:
        gm, args, kwargs = inputs.on_device(gm, args, kwargs, options.device)
    where = inputs.device(options.device) if options.device and streams else None
    probe = graphprobe.instrument(gm, keep=options.keep, memory=options.memory, device=where, checksum=options.checksum)
    try:
        with torch.no_grad():
            probe(*args, **kwargs)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:  # an operator of the graph refuses the inputs
        reason = (str(error).splitlines() or [""])[0]
        raise InputError(f"{options.file} cannot be run on these inputs: {type(error).__name__}: {reason}") from error
    if options.output:
        _write(options.output, probe.taps, dict(probe.tensors) if options.keep else {})
    if options.json:
        output.print_json(probe.taps)
    else:
        print(render.taps_text(probe.taps))
        if options.output:
            print(f"\nwrote {options.output}")
    return 0


def _check_output(options: argparse.Namespace) -> None:
    output.check_target(options.output)
    suffix = Path(options.output).suffix if options.output else ""
    if suffix not in ("", ".json", ".safetensors") or (options.output and not suffix):
        raise InputError(
            f"-o takes a .json file for the table or a .safetensors file for tensors, not {options.output}"
        )
    if suffix == ".safetensors" and not options.keep:
        raise InputError("-o FILE.safetensors writes the tensors that --keep GLOB keeps; give --keep, too")
    if options.keep and suffix != ".safetensors":
        raise InputError("--keep keeps tensors; say where they go with -o FILE.safetensors")


def _write(path: str, taps: tuple[Tap, ...], tensors: dict[str, Any]) -> None:
    if path.endswith(".json"):
        import json

        from graphprobe.records import to_data

        output.write_text(path, json.dumps(to_data(taps), indent=2) + "\n")
        return
    from safetensors.torch import save_file

    if not tensors:
        raise InputError("--keep matched nothing; `graphprobe tap FILE.fx` lists the names that there are")
    with output.whole_file(path) as partial:
        save_file({name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}, partial)
