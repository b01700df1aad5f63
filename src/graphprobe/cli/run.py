"""``graphprobe run``: a pipeline of graph transforms over a model, checked and dumped after each."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from graphprobe.cli import capture, output
from graphprobe.errors import InputError

if TYPE_CHECKING:
    from graphprobe.pipeline import Pipeline
    from graphprobe.records import RunReport

SUMMARY = "run a pipeline of graph transforms, with checks and dumps after each"
DESCRIPTION = """\
Run a list of graph transforms over a model under observation. After each one: what it matched, what it made, erased and
rewrote, how long it took, and which defects it left behind (lost or stale metadata, dead nodes, weights written in
place), in the name of the transform even if a later one mends them. --check diff compares the numbers with those of the
graph before it. --dump DIR (or the environment variable AD_DUMP_GRAPHS_DIR) writes each graph as text in AutoDeploy's
form, as .fx, and an index.html.

SPEC is what `graphprobe capture` takes, or an .fx file.
PIPELINE is text such as 'fuse_qkv,fuse_rmsnorm{where="*.3.*"}', or a YAML file in AutoDeploy's shape,
'transforms: {fuse_qkv: {stage: post_load_fusion, enabled: true}}'; further files are merged over the first.
Exit status: 0 all is well, 1 a check or a comparison found something, 2 a transform failed, or trouble.
"""
EXAMPLES = """\
  graphprobe run before.fx --pipeline fuse_rmsnorm,fuse_qkv -o after.fx
  graphprobe run ./SmolLM2 --prompt "Hello" --pipeline default.yaml --pipeline mine.yaml --dump dumps --check all
  graphprobe run my_models:net --transform my_passes:fuse_gates --check diff
  graphprobe run --list
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("spec", metavar="SPEC", nargs="?", help="an .fx file, pkg.mod:factory, or a model directory")
    what = parser.add_argument_group("what is run")
    what.add_argument("--pipeline", metavar="PIPELINE", action="append", default=[], help="text or YAML file(s)")
    what.add_argument(
        "--transform",
        metavar="PKG.MOD:NAME",
        action="append",
        default=[],
        help="a transform of your own (class, function or pass manager), known to the pipeline under its name; "
        "without --pipeline it is the pipeline",
    )
    what.add_argument("--list", action="store_true", help="list the transforms that are installed, and end")
    checks = parser.add_argument_group("what is looked at after each transform")
    checks.add_argument(
        "--check",
        metavar="NAME",
        action="append",
        default=[],
        help="lint (the default), diff, total, all, or one lint rule; may be given several times",
    )
    checks.add_argument("--allow", metavar="KIND", action="append", default=[], help="as in `graphprobe diff`")
    checks.add_argument("--accept", metavar="NODE:KIND:BOUND", action="append", default=[], help="likewise")
    files = parser.add_argument_group("what is written")
    files.add_argument("--dump", metavar="DIR", help="directory for the dumps; it must be empty or hold earlier ones")
    files.add_argument("--no-weights", action="store_true", help="leave the weights out of the dumps: not to be run")
    files.add_argument("-o", "--output", metavar="FILE.fx", help="the transformed graph")
    files.add_argument("--html", metavar="FILE", help="the comparison as one page; needs --check diff")
    capture.configure_inputs(parser)


def run(options: argparse.Namespace) -> int:
    """Run the pipeline and print what came of it. Raises GraphprobeError."""
    if options.list:
        return _list(options)
    if options.spec is None:
        raise InputError("give a model: graphprobe run SPEC --pipeline PIPELINE (or --list for the transforms)")
    report = _run(options)
    if options.html:
        from graphprobe import render

        render.write_run_html(report, options.html)
    if options.json:
        print(report.to_json(indent=2))
    else:
        print(report)
    return report.exit_code


def _run(options: argparse.Namespace) -> RunReport:
    import graphprobe

    pipeline = plan(options.pipeline, options.transform)
    model, args, kwargs, shapes = model_of(options)
    with output.Progress() as progress:
        report = graphprobe.run(
            model,
            args,
            kwargs,
            pipeline=pipeline,
            dump_dir=options.dump,
            dump_weights=not options.no_weights,
            check=tuple(options.check) or ("lint",),
            dynamic_shapes=shapes,
            accept=tuple(options.accept),
            allow=tuple(options.allow),
            progress=progress,
        )
    if options.output:
        with output.whole_file(options.output) as partial:
            graphprobe.save(report.gm, partial, args=args, kwargs=kwargs)
    return report


def plan(pipelines: list[str], transforms: list[str]) -> Pipeline | str:
    """Read --pipeline (one text, or YAML files) with the transforms of --transform known. Raises PipelineError.

    What is a pipeline only for a given model, "inductor" or "decompositions", is returned as it is.
    """
    from graphprobe.bisection import built_in
    from graphprobe.bisection.choice import is_inductor
    from graphprobe.pipeline import Pipeline, given, installed

    if len(pipelines) == 1 and (is_inductor(pipelines[0]) or pipelines[0] == built_in.DECOMPOSITIONS):
        return pipelines[0]

    mine: dict[str, Any] = {}
    for spec in transforms:
        mine |= given(spec)
    known = {**installed(), **built_in.TRANSFORMS, **mine}
    if not pipelines:
        if not mine:
            raise InputError("give a pipeline: --pipeline fuse_qkv,fuse_rmsnorm, --pipeline FILE.yaml or --transform")
        return Pipeline.parse(",".join(mine), known)
    files = [name for name in pipelines if name.endswith((".yaml", ".yml"))]
    if files and len(files) < len(pipelines):
        raise InputError("--pipeline takes either one text or YAML files, not both")
    return Pipeline.from_yaml(*files, known=known) if files else Pipeline.parse(",".join(pipelines), known)


def model_of(options: argparse.Namespace) -> tuple[Any, tuple[Any, ...], dict[str, Any], Any]:
    """Return the model that the options name, its inputs and its dynamic shapes. Raises InputError."""
    if options.spec.endswith(".fx"):
        from graphprobe import fxfile
        from graphprobe.cli import inputs

        stored = fxfile.load_inputs(options.spec)
        args, kwargs = inputs.inputs_from_file(options.inputs) if options.inputs else stored or ((), {})
        return options.spec, args, kwargs, None
    loaded = capture.load(options)
    return loaded.model, loaded.args, loaded.kwargs, capture.dynamic_shapes(loaded, options.dynamic)


def _list(options: argparse.Namespace) -> int:
    from graphprobe.pipeline import installed
    from graphprobe.render.numbers import wrap

    rows = []
    for name, point in sorted(installed().items()):
        found = point.load()
        summary = (found.__doc__ or "").strip().split("\n")[0]
        rows.append({"name": name, "stage": getattr(found, "stage", ""), "what": summary, "from": point.value})
    if options.json:
        output.print_json(rows)
    else:
        for row in rows:
            print(f"{row['name']} ({row['stage']})", *wrap(row["what"], "    "), sep="\n")
    return 0
