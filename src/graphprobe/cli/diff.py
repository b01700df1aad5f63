"""``graphprobe diff``: which operation makes two graphs disagree?"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
from typing import TYPE_CHECKING

from graphprobe.cli import output
from graphprobe.records import VERDICTS

if TYPE_CHECKING:
    from graphprobe.records import Report

SUMMARY = "find the operation that makes two graphs disagree"
DESCRIPTION = """\
Run both graphs side by side on the same inputs and ask every operation: do you agree, did you introduce the
disagreement or pass it on, and would you agree if arithmetic were exact? The answer is a verdict (identical, rounding,
quantization, precision, semantic, nonfinite, structural, unknown) and the first operation that is to blame.

Inputs are those stored in the files, unless --inputs gives others; without either they are drawn to fit the graph. Two
files with inputs of another form (the same prompt padded, a batch that holds it as a row) are compared slice by slice.
Exit status: 0 the same (identical, rounding, or allowed), 1 different, 2 trouble or too little compared.
"""
EXAMPLES = """\
  graphprobe diff before.fx after.fx
  graphprobe diff before.fx after.fx --inputs prompt.safetensors --png culprit.png --html report.html
  graphprobe diff before.fx after.fx --allow quantization --json -o report.json
  graphprobe diff before.fx after.fx --explain mul_12
  graphprobe diff before.fx after.fx --accept 'layers.3.mlp*:semantic:1e-3'
"""

_DEFAULTS = {"exact": "auto", "min_coverage": 0.9, "memory": "resident"}


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("before", metavar="BEFORE.fx", help="the graph that is trusted")
    parser.add_argument("after", metavar="AFTER.fx", help="the graph that is in question")
    run_group = parser.add_argument_group("what is run")
    run_group.add_argument("--inputs", metavar="FILE", help="inputs: .json, .safetensors, .npz, .pt or another .fx")
    run_group.add_argument(
        "--after-inputs", metavar="FILE", help="inputs of AFTER where they have another form (padded)"
    )
    run_group.add_argument("--device", metavar="DEVICE", help="run there, e.g. cuda or cuda:1 (where the weights are)")
    run_group.add_argument(
        "--memory",
        choices=("resident", "stream"),
        default="resident",
        help="where weights are: all on the device, or in their files, from which they come one by one (stream)",
    )
    run_group.add_argument(
        "--exact",
        choices=("auto", "always", "never"),
        default="auto",
        help="exact arithmetic: not for pieces that are plainly the same (auto), for all, for none",
    )
    run_group.add_argument(
        "--details",
        action="store_true",
        help="also measure cosine, ulp, how many elements differ, and the worst slice",
    )
    judge = parser.add_argument_group("what is tolerated")
    judge.add_argument(
        "--allow", metavar="KIND", action="append", default=[], choices=VERDICTS, help="let findings of this kind pass"
    )
    judge.add_argument(
        "--accept",
        metavar="NODE:KIND:BOUND",
        action="append",
        default=[],
        help="let a finding of this kind at a node or module path (may hold *) pass while its error is below BOUND",
    )
    judge.add_argument(
        "--min-coverage",
        type=_share,
        default=0.9,
        metavar="SHARE",
        help="share of operations that must be judged closely, else the verdict is unknown (0.9)",
    )
    files = parser.add_argument_group("what is written")
    files.add_argument("-o", "--output", metavar="FILE.json", help="the whole report, to be drawn again later")
    files.add_argument("--png", metavar="FILE", help="a picture of the first diverging subgraph (also .svg, .dot)")
    files.add_argument("--html", metavar="FILE", help="the report as one self-contained page")
    files.add_argument(
        "--explain", metavar="NODE", help="only say why this node was or was not matched, and what came nearest"
    )
    files.add_argument("--verbose", action="store_true", help="print every judged region, not only the findings")


def run(options: argparse.Namespace) -> int:
    """Compare and print. Raises FxFileError, InputError, MismatchError, OperatorError, RenderError."""
    if options.explain:
        return _explain(options)
    _check_targets(options)
    report = dataclasses.replace(_compare(options), command=_command(options))
    try:
        if options.output:
            output.write_text(options.output, report.to_json(indent=2) + "\n")
    finally:  # what was found is told in any case
        _print(report, options)
    # pictures come last: where one cannot be drawn, the answer has been printed
    if options.html:
        report.to_html(options.html)
    if options.png:
        report.render(options.png)
    return report.exit_code


def _print(report: Report, options: argparse.Namespace) -> None:
    if options.json:
        print(report.to_json(indent=2))
    else:
        from graphprobe import render

        print(render.text(report, verbose=options.verbose))


def _command(options: argparse.Namespace) -> str:
    """Return the command line that gives this report again; what is written where is left out."""
    words = ["graphprobe", "diff", options.before, options.after]
    single = ("inputs", "after_inputs", "device", "exact", "min_coverage", "memory")
    for name in single:
        value = getattr(options, name)
        if value is not None and value != _DEFAULTS.get(name):
            words += [f"--{name.replace('_', '-')}", f"{value:g}" if isinstance(value, float) else str(value)]
    words += ["--details"] if options.details else []
    for name in ("allow", "accept"):
        for value in getattr(options, name):
            words += [f"--{name}", value]
    return shlex.join(words)


def _compare(options: argparse.Namespace) -> Report:
    import graphprobe
    from graphprobe.cli import inputs

    args, kwargs = inputs.inputs_from_file(options.inputs) if options.inputs else ((), None)
    theirs = inputs.inputs_from_file(options.after_inputs) if options.after_inputs else (None, None)
    with output.Progress() as progress:
        return graphprobe.diff(
            options.before,
            options.after,
            args,
            kwargs,
            device=inputs.device(options.device) if options.device else None,
            exact=options.exact,
            accept=tuple(options.accept),
            allow=tuple(options.allow),
            min_coverage=options.min_coverage,
            memory=options.memory,
            details=options.details,
            after_args=theirs[0],
            after_kwargs=theirs[1],
            progress=progress,
        )


def _explain(options: argparse.Namespace) -> int:
    from graphprobe import api
    from graphprobe.cli import inputs

    args, kwargs = inputs.inputs_from_file(options.inputs) if options.inputs else ((), None)
    theirs = inputs.inputs_from_file(options.after_inputs) if options.after_inputs else (None, None)
    sides = (options.before, options.after)
    told = api.explain(*sides, options.explain, args, kwargs, after_args=theirs[0], after_kwargs=theirs[1], draw=True)
    print(told)
    return 0


def _check_targets(options: argparse.Namespace) -> None:
    output.check_target(options.output)
    output.check_target(options.html)
    output.check_target(options.png, ".png", ".svg", ".dot")


def _share(text: str) -> float:
    value = float(text)
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"must lie between 0 and 1, not {text}")
    return value
