"""``graphprobe lint``: defects of a graph that can be seen without running it."""

from __future__ import annotations

import argparse

from graphprobe.cli import output

SUMMARY = "list the defects of a graph, such as lost metadata, without running it"
DESCRIPTION = """\
Look for what a graph transform leaves behind when it is careless: nodes without meta["val"] (their shape and dtype,
which later transforms and memory planners read) and more. Each defect is named with its node, source line and remedy.
Exit status: 0 nothing found, 1 something found, 2 trouble.
"""
EXAMPLES = """\
  graphprobe lint after.fx
  graphprobe lint after.fx --json
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("file", metavar="FILE.fx", help="the graph")


def run(options: argparse.Namespace) -> int:
    """Load, lint, print. Raises FxFileError."""
    import graphprobe
    from graphprobe import render

    found = graphprobe.lint(graphprobe.load(options.file, weights=False))
    if options.json:
        output.print_json(found)
    else:
        print(render.lint_text(found))
    return 1 if found else 0
