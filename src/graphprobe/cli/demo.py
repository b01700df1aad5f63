"""``graphprobe demo``: the whole story on a real language model."""

from __future__ import annotations

import argparse

from graphprobe.cli import output

SUMMARY = "see it find a planted bug in a real language model"
DESCRIPTION = """\
Capture a trained language model (SmolLM2-135M-Instruct, if the package that brings its weights is installed, else a
small built-in one), run a pipeline of graph transforms over it in which one has a planted bug, let the model talk
before and after, find the operation that is to blame, draw it, and then show that the honest pipeline passes.
Exit status: 0 if the bug was found and the honest pipeline passed, else 1.
"""
EXAMPLES = """\
  graphprobe demo
  graphprobe demo --model tiny --out pictures
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("--model", choices=("auto", "smollm2", "tiny"), default="auto", help="which model (auto)")
    parser.add_argument("--layer", type=int, metavar="N", help="the layer in which the bug is planted")
    parser.add_argument("--prompt", metavar="TEXT", help="what the model is asked")
    parser.add_argument("--out", metavar="DIR", default="out", help="directory for the pictures and reports (out)")


def run(options: argparse.Namespace) -> int:
    """Tell the story. Raises GraphprobeError where a named model is not there."""
    from graphprobe.demo import story

    say = (lambda _text: None) if options.json else print
    with output.Progress() as progress:
        told = story.tell(
            model=options.model,
            layer=options.layer,
            prompt=options.prompt,
            directory=options.out,
            say=say,
            progress=progress,
        )
    if options.json:
        output.print_json(told)
    return 0 if told.ok else 1
