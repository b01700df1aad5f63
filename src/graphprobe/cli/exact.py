"""``graphprobe exact``: how exact arithmetic evaluates each operator."""

from __future__ import annotations

import argparse

from graphprobe.cli import output
from graphprobe.errors import InputError

SUMMARY = "list the operators of a graph and the rule that judges each in exact arithmetic"
DESCRIPTION = """\
Run a graph once, one operator of each kind also in float64, and list by which rule `graphprobe diff` evaluates it
exactly: its own kernel, a float64 reference, torch's decomposition. An operator with none of these (a fused kernel of
your own) is judged by the size of its rounding alone, which a small bug can hide in: register a reference with
@graphprobe.exact_rule, and name the module that does so with --import. Without a file: the operators with a rule of
their own. Exit status: 0 every operator has an exact form, 1 some have none, 2 trouble.
"""
EXAMPLES = """\
  graphprobe exact before.fx
  graphprobe exact before.fx --import my_references
  graphprobe exact --list
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("file", metavar="FILE.fx", nargs="?", help="the graph")
    parser.add_argument("--list", action="store_true", help="list; all operators with a rule where no file is given")
    parser.add_argument("--inputs", metavar="FILE", help="inputs: .json, .safetensors, .npz, .pt or another .fx")


def run(options: argparse.Namespace) -> int:
    """List. Raises FxFileError, InputError."""
    if not options.file and not options.list:
        raise InputError("give a FILE.fx, or --list for all operators with a rule of their own")
    if not options.file and options.inputs:
        raise InputError("--inputs are for a graph: give a FILE.fx, too")
    from graphprobe import render
    from graphprobe.lanes import listing

    if options.file:
        from graphprobe import api
        from graphprobe.cli import inputs

        args, kwargs = inputs.inputs_from_file(options.inputs) if options.inputs else ((), None)
        rows = api.operators(options.file, args, kwargs)
    else:
        rows = listing.known_operators()
    if options.json:
        output.print_json(rows)
    else:
        print(render.exact_text(rows))
    return 1 if options.file and any(row.rule in listing.WEAK for row in rows) else 0
