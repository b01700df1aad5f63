"""How often does diff name the right operation, and how often does it cry wolf? The corpus, and beside it mutations.

    python benchmarks/accuracy.py [--seeds 0,1,2] [--blocks 20] [--seed N]

Runs benchmarks/corpus.py (planted bugs and benign changes, with two naive comparisons on the same models) and then
benchmarks/mutations.py (drawn changes of exported graphs, so that nobody can tune to known cases), each in a process of
its own. Exit status 1 if the corpus has a bug that was missed, a false alarm or an error.
"""

from __future__ import annotations

import argparse
import pathlib
import subprocess
import sys

HERE = pathlib.Path(__file__).parent


def main() -> int:
    """Run both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2", help="of the corpus")
    parser.add_argument("--blocks", default="20", help="of the mutations, 12 cases each")
    parser.add_argument("--seed", help="of the mutations; drawn and printed otherwise")
    options = parser.parse_args()
    mutations = ["--blocks", options.blocks, *(["--seed", options.seed] if options.seed else [])]
    failed = 0
    for name, arguments in (("corpus", ["--seeds", options.seeds]), ("mutations", mutations)):
        print(f"== {name}", flush=True)
        failed |= subprocess.call([sys.executable, str(HERE / f"{name}.py"), *arguments])
    return failed


if __name__ == "__main__":
    sys.exit(main())
