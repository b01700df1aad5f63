"""How often does diff name the right operation, how often does it cry wolf, and how many claims are right?

    python benchmarks/accuracy.py [--parts corpus,mutations,alignment] [--seeds 0,1,2] [--blocks 20] [--out DIR]
    python benchmarks/accuracy.py --parts alignment --models llama --sizes ,       # what only one part takes

Runs benchmarks/corpus.py (planted bugs and benign changes, with two naive comparisons on the same models),
benchmarks/mutations.py (drawn changes of exported graphs, so that nobody can tune to known cases) and
benchmarks/alignment.py (claims against known truth, with less and less evidence, and what aligning costs up to 50,000
nodes), each in a process of its own. Each prints its table and writes DIR/corpus.json, DIR/mutations.jsonl and
DIR/alignment.json. Exit status 1 if the corpus has a bug that was missed, a false alarm or an error.
"""

from __future__ import annotations

import argparse
import pathlib
import subprocess
import sys

HERE = pathlib.Path(__file__).parent
PARTS = ("corpus", "mutations", "alignment")


def main() -> int:
    """Run the parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=lambda t: t.split(","), default=list(PARTS))
    parser.add_argument("--seeds", default="0,1,2", help="of the corpus")
    parser.add_argument("--blocks", default="20", help="of the mutations, 12 cases each")
    parser.add_argument("--seed", help="of the mutations; drawn and printed otherwise")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/accuracy"), help="for the JSON")
    options, more = parser.parse_known_args()
    unknown = [name for name in options.parts if name not in PARTS]
    if unknown or (more and len(options.parts) != 1):
        parser.error(f"no such part: {unknown[0]}" if unknown else f"{more[0]}: name the part it is for with --parts")
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "mutations.jsonl").unlink(missing_ok=True)  # it is appended to
    arguments = {
        "corpus": ["--seeds", options.seeds, "--json", str(options.out / "corpus.json")],
        "mutations": ["--blocks", options.blocks, "--out", str(options.out / "mutations.jsonl")],
        "alignment": ["--json", str(options.out / "alignment.json")],
    }
    if options.seed:
        arguments["mutations"] += ["--seed", options.seed]
    failed = 0
    for name in options.parts:
        print(f"== {name}", flush=True)
        failed |= subprocess.call([sys.executable, str(HERE / f"{name}.py"), *arguments[name], *more])
    return failed


if __name__ == "__main__":
    sys.exit(main())
