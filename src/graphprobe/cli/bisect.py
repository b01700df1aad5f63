"""``graphprobe bisect``: which transform of a pipeline, and which match of it, made a model wrong."""

from __future__ import annotations

import argparse
import shlex
from typing import TYPE_CHECKING

from graphprobe.cli import capture, output
from graphprobe.cli import run as cli_run
from graphprobe.errors import InputError

if TYPE_CHECKING:
    from graphprobe.bisection.records import Bisection

SUMMARY = "find the transform, and the match of it, that made a model wrong"
DESCRIPTION = """\
Run parts of a pipeline over a model until it is known which transform makes it wrong: binary search over the first k
transforms, each suspect alone and the pipeline without it, delta debugging where transforms are wrong only together,
and the single match within the guilty one. Each part is judged by `graphprobe diff`, or by --check COMMAND: exit status
0 is good, 125 cannot be judged, any other is bad; {before} and {after} in it become .fx files. Transforms and graphs
that fail are bad, as are new NaNs.

SPEC is what `graphprobe capture` takes, or an .fx file; PIPELINE is what `graphprobe run` takes, or one that is built
in: `inductor`, PyTorch's own compiler, whose graphs are compared between its passes, and its generated code last;
`decompositions`, those of torch.export; `quantize_` and `pt2e`, torchao's quantisers.
Exit status: 0 nothing is wrong, 1 a transform is to blame, 2 it cannot be judged, or trouble.
"""
EXAMPLES = """\
  graphprobe bisect before.fx --pipeline fuse_rmsnorm,my_passes:fuse_gates,fuse_qkv
  graphprobe bisect my_models:net --pipeline passes.yaml --state bisect.json --html culprit.html
  graphprobe bisect my_models:net --pipeline inductor
  graphprobe bisect my_models:net --pipeline passes.yaml --check 'python still_speaks.py {after}'
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("spec", metavar="SPEC", help="an .fx file, pkg.mod:factory, or a model directory")
    what = parser.add_argument_group("what is searched")
    what.add_argument("--pipeline", metavar="PIPELINE", action="append", default=[], help="text or YAML file(s)")
    what.add_argument(
        "--transform",
        metavar="PKG.MOD:NAME",
        action="append",
        default=[],
        help="a transform of your own, as in `graphprobe run`",
    )
    judge = parser.add_argument_group("what is wrong")
    judge.add_argument("--check", metavar="COMMAND", help="a command that judges a graph, in place of graphprobe diff")
    judge.add_argument("--allow", metavar="KIND", action="append", default=[], help="as in `graphprobe diff`")
    judge.add_argument("--accept", metavar="NODE:KIND:BOUND", action="append", default=[], help="likewise")
    files = parser.add_argument_group("what is written")
    files.add_argument("--state", metavar="FILE", help="remember each trial there; run again, go on from there")
    files.add_argument("-o", "--output", metavar="FILE.json", help="the whole answer")
    files.add_argument("--html", metavar="FILE", help="the report of the guilty step as one self-contained page")
    capture.configure_inputs(parser)


def run(options: argparse.Namespace) -> int:
    """Search and print what was found. Raises GraphprobeError."""
    found = _found(options)
    if options.output:
        output.write_text(options.output, found.to_json(indent=2) + "\n")
    if options.html:
        if found.report is None:
            raise InputError(f"there is no report to write to {options.html}: {found.verdict}")
        found.report.to_html(options.html)
    print(found.to_json(indent=2) if options.json else found)
    return found.exit_code


def _found(options: argparse.Namespace) -> Bisection:
    import graphprobe

    plan = cli_run.plan(options.pipeline, options.transform)
    model, args, kwargs, shapes = cli_run.model_of(options)
    with output.Progress() as progress:
        return graphprobe.bisect(
            model,
            args,
            kwargs,
            pipeline=plan,
            check=options.check,
            state=options.state,
            dynamic_shapes=shapes,
            accept=tuple(options.accept),
            allow=tuple(options.allow),
            progress=progress,
            command=_words(options),
        )


def _words(options: argparse.Namespace) -> str:
    """Return the options that name the model, its inputs and what is tolerated, as `graphprobe run` takes them."""
    words = [options.spec]
    for name in ("dtype", "args", "kwargs", "inputs", "prompt", "length", "attn"):
        value = getattr(options, name)
        if value is not None:
            words += [f"--{name}", str(value)]
    for name in ("dynamic", "transform", "allow", "accept"):
        for value in getattr(options, name):
            words += [f"--{name}", value]
    return shlex.join(words)
