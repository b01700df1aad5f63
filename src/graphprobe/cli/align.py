"""``graphprobe align``: which node of one graph claims which of the other, and why."""

from __future__ import annotations

import argparse
import fnmatch

from graphprobe.cli import output
from graphprobe.records import ClaimRecord

SUMMARY = "show which node of one graph must equal which of the other, and why"
DESCRIPTION = """\
Pair the operations of two graphs and name the evidence for every pair: replacements recorded with a transform, ids,
module path and occurrence, casts, structure, values, layouts, slots, weights. A pair marked with ? is not certain: if
it fails, diff finds out whether the pair or the operation is wrong. --no-run never runs the graphs.
Exit status: 0 where every operation of AFTER has a partner, 1 where some have none, 2 trouble.
"""
EXAMPLES = """\
  graphprobe align before.fx after.fx
  graphprobe align before.fx after.fx --node '*softmax*'
  graphprobe align before.fx after.fx --json
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("before", metavar="BEFORE.fx", help="the graph that is trusted")
    parser.add_argument("after", metavar="AFTER.fx", help="the graph that is in question")
    parser.add_argument("--node", metavar="GLOB", default="*", help="only nodes of either graph that match")
    parser.add_argument("--no-run", action="store_true", help="do not run the graphs to compare their values")


def run(options: argparse.Namespace) -> int:
    """Load, align, print. Raises FxFileError and InputError."""
    from graphprobe import api

    found = api.alignment(options.before, options.after, run=not options.no_run)
    claims = [c for c in found.claims if _matches(c, options.node)]
    alone = [n for n in found.unmatched if fnmatch.fnmatchcase(n, options.node)]
    if options.json:
        output.print_json({"claims": claims, "unmatched": alone})
    else:
        print(_text(claims, alone))
    return 1 if found.unmatched else 0


def _matches(claim: ClaimRecord, pattern: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for name in (claim.before, claim.after))


def _text(claims: list[ClaimRecord], alone: list[str]) -> str:
    from tabulate import tabulate

    rows = [(c.after, c.before, c.evidence + ("" if c.certain else " ?")) for c in claims]
    lines = [tabulate(rows, headers=("after", "before", "evidence")), "", f"{len(claims)} claims"]
    if alone:
        lines.append(f"{len(alone)} operations of after without a partner: {', '.join(alone[:20])}")
    return "\n".join(lines)
