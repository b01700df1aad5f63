"""The command line: one module a subcommand, each of which parses, calls graphprobe, prints and gives an exit status.

A subcommand module holds ``SUMMARY`` (one line), ``DESCRIPTION`` and ``EXAMPLES`` (for its ``--help``),
``configure(parser)`` and ``run(options) -> int``. They import torch inside ``run`` only, so that ``--help`` is quick.
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from types import ModuleType

import graphprobe
from graphprobe.cli import align, bisect, capture, demo, diff, dumps, exact, lint, plot, run, show, tap
from graphprobe.errors import GraphprobeError

#: The subcommands, in the order of ``graphprobe --help``.
COMMANDS: dict[str, ModuleType] = {
    "demo": demo,
    "capture": capture,
    "diff": diff,
    "align": align,
    "tap": tap,
    "run": run,
    "bisect": bisect,
    "dumps": dumps,
    "lint": lint,
    "exact": exact,
    "show": show,
    "plot": plot,
}

SAME, DIFFERENT, TROUBLE, INTERRUPTED, BROKEN_PIPE = 0, 1, 2, 130, 141

EPILOG = """\
the usual way:
  graphprobe capture my_models:before -o before.fx
  graphprobe capture my_models:after -o after.fx
  graphprobe diff before.fx after.fx

exit status, as with diff(1): 0 the same, 1 different, 2 trouble. `graphprobe COMMAND --help` has examples.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (default: the process's own) and return its exit status; only argparse exits by itself."""
    options = _parser().parse_args(argv)
    command: ModuleType = options.command
    with warnings.catch_warnings():
        if not sys.warnoptions:  # torch's remarks about its own internals; python -W or PYTHONWARNINGS shows them
            warnings.simplefilter("ignore")
        try:
            _import(options.modules)
            status: int = command.run(options)
            if sys.stdout is not None:  # closed by the caller
                sys.stdout.flush()
        except GraphprobeError as error:
            print(f"graphprobe: {error}", file=sys.stderr)
            return TROUBLE
        except KeyboardInterrupt:
            print("\ngraphprobe: interrupted", file=sys.stderr)
            return INTERRUPTED
        except BrokenPipeError:
            _let_stdout_go()
            return BROKEN_PIPE
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EIO, errno.EDQUOT):
                traceback.print_exc()
                return TROUBLE
            _let_stdout_go()
            print(f"graphprobe: cannot write its output: {error.strerror}", file=sys.stderr)
            return TROUBLE
        except (
            Exception
        ):  # a defect here or in the user's own code: its traceback is what helps, and 1 means "different"
            traceback.print_exc()
            return TROUBLE
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="graphprobe",
        description=graphprobe.__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"graphprobe {graphprobe.__version__}")
    table = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        sub = table.add_parser(
            name,
            help=command.SUMMARY,
            description=command.DESCRIPTION,
            epilog=f"examples:\n{command.EXAMPLES}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.configure(sub)
        sub.add_argument(
            "--import",
            dest="modules",
            metavar="MODULE",
            action="append",
            default=[],
            help="import this module first: one that registers custom operators or float64 references",
        )
        sub.add_argument("--json", action="store_true", help="print the result as JSON instead of text")
        sub.set_defaults(command=command)
    return parser


def _import(modules: Sequence[str]) -> None:
    if modules:
        from graphprobe.cli import models  # late: it imports torch

        for name in modules:
            models.import_module(name)


def _let_stdout_go() -> None:
    # whoever read our output has gone; without this Python complains once more when it closes stdout
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):  # stdout is no real file, as in tests
        return
