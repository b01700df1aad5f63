"""``graphprobe align``: which node of one graph claims which of the other, and why."""

from __future__ import annotations

import argparse
import fnmatch
from typing import TYPE_CHECKING

from graphprobe.cli import output
from graphprobe.records import ClaimRecord

if TYPE_CHECKING:
    from graphprobe.api import Pairing

SUMMARY = "show which node of one graph must equal which of the other, and why"
DESCRIPTION = """\
Pair the operations of two graphs and name the evidence for every pair: replacements recorded with a transform, ids,
structure, values (in another layout, or a slice of them, too), weights, module paths. A pair marked with ? is not
certain: if it fails, diff finds out whether the pair or the operation is wrong. What is left over on either side is
listed with the reason: eliminated, fused, rewritten, added.

Values are compared on the inputs stored in the files, or given with --inputs; without inputs, or with --no-run, nothing
is run. Two files with inputs of another form (a padded prompt, a row of a batch) are compared slice by slice. Texts
(.txt, .log, .py: dumps, what torch.fx prints) are paired by operators, shapes and the names of weights.
Exit status: 0 where every operation of AFTER has a partner, 1 where some have none, 2 trouble.
"""
EXAMPLES = """\
  graphprobe align before.fx after.fx
  graphprobe align before.fx after.fx --node '*softmax*'
  graphprobe align before.fx after.fx --explain mul_12
  graphprobe align before.fx after.fx --json
  graphprobe align dumps/001_export_export_to_gm.txt dumps/002_pattern_matcher_fuse_rmsnorm.txt
  graphprobe align aot.log fx_graph_readable.py
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("before", metavar="BEFORE", help="the graph that is trusted: .fx, or a text")
    parser.add_argument("after", metavar="AFTER", help="the graph that is in question")
    parser.add_argument("--inputs", metavar="FILE", help="inputs: .json, .safetensors, .npz, .pt or another .fx")
    parser.add_argument("--after-inputs", metavar="FILE", help="inputs of AFTER where they have another form")
    parser.add_argument("--node", metavar="GLOB", default="*", help="only nodes of either graph that match")
    parser.add_argument("--explain", metavar="NODE", help="why this node was or was not matched, and what came nearest")
    parser.add_argument("--no-run", action="store_true", help="do not run the graphs to compare their values")


def run(options: argparse.Namespace) -> int:
    """Load, align, print. Raises FxFileError and InputError."""
    from graphprobe import api
    from graphprobe.cli import inputs

    args, kwargs = inputs.inputs_from_file(options.inputs) if options.inputs else ((), None)
    theirs = inputs.inputs_from_file(options.after_inputs) if options.after_inputs else (None, None)
    sides, run_too = (options.before, options.after), not options.no_run
    if options.explain:
        print(
            api.explain(
                *sides, options.explain, args, kwargs, after_args=theirs[0], after_kwargs=theirs[1], run=run_too
            )
        )
        return 0
    found = api.alignment(*sides, args, kwargs, after_args=theirs[0], after_kwargs=theirs[1], run=run_too)
    claims = [c for c in found.claims if _matches(c, options.node)]
    alone = [n for n in found.unmatched if fnmatch.fnmatchcase(n, options.node)]
    if options.json:
        rest = {"left_before": list(found.left_before), "left_after": list(found.left_after)}
        output.print_json({"claims": claims, "unmatched": alone, "evidence": found.evidence, "ran": found.ran, **rest})
    else:
        print(_text(claims, found, options.node))
    return 1 if found.unmatched else 0


def _matches(claim: ClaimRecord, pattern: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for name in (claim.before, claim.after))


def _text(claims: list[ClaimRecord], found: Pairing, pattern: str) -> str:
    from tabulate import tabulate

    rows = [
        (c.after, c.before, c.evidence + ("" if c.certain else " ?"), f"{c.confidence:.2f}", c.view) for c in claims
    ]
    kinds = ", ".join(f"{count} by {kind}" for kind, count in sorted(found.evidence.items(), key=lambda k: -k[1]))
    lines = [tabulate(rows, headers=("after", "before", "evidence", "sure", "shown as")), "", f"{len(claims)} claims"]
    lines.append(f"in all {kinds}" + ("" if found.ran else "; nothing was run"))
    for side, rest in (("before", found.left_before), ("after", found.left_after)):
        shown = [one for one in rest if fnmatch.fnmatchcase(one.node, pattern)]
        if shown:
            lines += ["", f"{len(shown)} operations of {side} without a partner"]
            lines.append(tabulate([(one.node, one.why, one.detail) for one in shown], tablefmt="plain"))
    return "\n".join(lines)
