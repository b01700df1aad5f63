"""How many claims are right, how much is claimed, and what does it cost?

    python benchmarks/alignment.py [--models llama,bert] [--rewrites fused] [--levels values] [--seed N] [--json FILE]
    python benchmarks/alignment.py --models smollm2,minilm       # trained weights; or a directory as save_pretrained
                                                                 # writes it. `make alignment-real` fetches both

Exports tiny models of many architectures with random weights, rewrites each in known ways (tests/corpus/rewrites.py),
takes evidence away step by step, plants one bug in every second graph, and counts: *precision*, the share of claims
that are right (tests/corpus/truth.py says what that means); *claims* per value-making operation; *recall*, the share
of what has a partner that is claimed; *resolution*, the share in a region of at most 16 operations. Levels:
events: everything; ids: no replacement events; modules: no ids either, and nothing is run; values: no metadata, no
names of nodes or weights, but inputs to run on; structure: the same and nothing is run.
Then the time of alignment alone, without the forwards, over graphs of 500 to 50,000 nodes.
"""

from __future__ import annotations

import argparse
import collections
import json
import pathlib
import sys
import time
import warnings
import zlib

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "tests"))
sys.path.remove(str(pathlib.Path(__file__).parent))  # where kernels.py would hide a package of that name

import torch

from corpus import growing, rewrites, text_models
from corpus.truth import Score, score, truth
from graphprobe import align, binding, inputs
from graphprobe.errors import InputError
from graphprobe.program import copied, program

RUNS = ("events", "ids", "values")  # levels at which the graphs are run


def measured(name: str, kind: str, pair, true, level: str, bug: int | None) -> Score | None:
    """Score one rewrite at one level of evidence, with a bug drawn from `bug` or without."""
    mutant = rewrites.planted(pair.after, zlib.crc32(repr((name, kind, bug)).encode())) if bug is not None else None
    if bug is not None and mutant is None:
        return None
    plain = mutant.gm if mutant else pair.after
    bare = rewrites.stripped(plain, level)
    renamed = dict(zip((n.name for n in bare.graph.nodes), (n.name for n in plain.graph.nodes), strict=True))
    events = pair.events if level == "events" else ()
    left, right = program(pair.before, pair.args, pair.kwargs), copied(program(bare, pair.args, pair.kwargs))
    bound = inputs.bind(pair.before, pair.args, pair.kwargs, "before")
    for one in (left, right):
        binding.concretise(one, bound)
    found = align.align(left, right, events, bound if level in RUNS else None)
    one = score(true, left, right, found, mutant, renamed)
    one.said += [f"(bug: {mutant.change} at {', '.join(mutant.nodes)})"] if mutant else []
    return one


def present(names: list[str]) -> list[str]:
    """Leave out the real models whose weights are not installed, and say so."""
    found = []
    for name in names:
        try:
            text_models.REAL.get(name, str)()
        except InputError as error:
            print(f"# {name}: skipped. {error}")
            continue
        found.append(name)
    return found


def table(options) -> dict[str, dict]:
    """Measure every architecture, rewrite and level; print one line a level and the worst rewrites."""
    sums: dict = collections.defaultdict(Score)
    for name in options.models:
        for kind in options.rewrites:
            started = time.perf_counter()
            try:
                draws = [
                    rewrites.REWRITES[kind](name, seed, options.dtype) for seed in (options.seed, options.seed + 1)
                ]
                true = truth(draws)
            except Exception as error:  # an architecture that a rewrite cannot take is said, not hidden
                print(f"# {name} {kind}: {type(error).__name__} {str(error)[:200]}")
                continue
            pair = draws[0]
            for level in options.levels:
                for bug in (None, *range(options.bugs)):
                    one = measured(name, kind, pair, true, level, bug)
                    if one is None:
                        continue
                    with_bug = "bug" if bug is not None else "-"
                    sums[level, with_bug] += one
                    sums[level, with_bug, kind] += one
                    if options.show:
                        print(f"{name} {kind} {level} {bug}: {line(one)}")
                        print("".join(f"     {said}\n" for said in one.said), end="")
                        print(f"     missed: {', '.join(one.missed)}")
            print(f"# {name}, {kind}: {time.perf_counter() - started:.1f} s", file=sys.stderr)
    print(f"{'level':12s} {'bug':4s} {HEAD}")
    for key in [k for k in sums if len(k) == 2]:
        print(f"{key[0]:12s} {key[1]:4s} {line(sums[key])}")
    print("\nby rewrite")
    for key in sorted(k for k in sums if len(k) == 3):
        print(f"{key[0]:10s} {key[1]:4s} {key[2]:16s} {line(sums[key])}")
    return {"/".join(key): figures(one) for key, one in sums.items()}


HEAD = "precision  claims/op  recall  resolution   claims  wrong"


def line(one: Score) -> str:
    """Put a score on one line."""
    return (
        f"{one.precision:9.5f}  {one.per_operation:9.3f}  {one.recall:6.4f}  {one.resolution:10.4f}"
        f"  {one.claims:7d}  {one.wrong:5d}"
    )


def figures(one: Score) -> dict:
    """Return a score as plain numbers."""
    return {
        "precision": one.precision,
        "claims_per_operation": one.per_operation,
        "recall": one.recall,
        "resolution": one.resolution,
        "claims": one.claims,
        "wrong": one.wrong,
    }


def curve(sizes: list[int]) -> list[dict]:
    """Time alignment beyond the forward runs, at the levels of evidence that cost the most."""
    rows = []
    print(f"\n{'nodes':>7s} {'level':10s} {'align s':>8s} {'forwards s':>10s} {'us/node':>8s} {'claimed':>8s}")
    for size in sizes:
        for row in growing.timed(size, ("ids", "modules", "values", "structure", "other")):
            rows.append(row)
            print(
                f"{row['nodes']:7d} {row['level']:10s} {row['seconds']:8.2f} {row['forwards']:10.2f} "
                f"{1e6 * row['seconds'] / row['nodes']:8.0f} {row['claimed']:8.3f}",
                flush=True,
            )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=lambda t: t.split(","), default=list(text_models.NAMES))
    parser.add_argument("--rewrites", type=lambda t: t.split(","), default=list(rewrites.REWRITES))
    parser.add_argument("--levels", type=lambda t: t.split(","), default=list(rewrites.LEVELS))
    parser.add_argument("--bugs", type=int, default=1, help="planted bugs, one graph each, for every combination")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", type=lambda t: getattr(torch, t), default=torch.float32)
    parser.add_argument(
        "--sizes", type=lambda t: [int(s) for s in t.split(",") if s], default=[500, 2000, 10000, 50000]
    )
    parser.add_argument("--show", action="store_true", help="print every combination and every wrong claim")
    parser.add_argument("--json")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    options.models = present(options.models)
    if not options.models:
        print("nothing was measured", file=sys.stderr)
        return 2
    print(f"seed {options.seed}, torch {torch.__version__}, {len(options.models)} architectures")
    result = {"seed": options.seed, "torch": torch.__version__, "scores": table(options), "curve": []}
    result["curve"] = curve(options.sizes)
    if options.json:
        pathlib.Path(options.json).write_text(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
