"""How often does the judge name the right operation of a changed graph, and how often does it cry wolf?

    python benchmarks/mutations.py --blocks 20 --out /tmp/mutations.jsonl [--seed N] [--models llama,gpt2]
    python benchmarks/mutations.py --table /tmp/mutations.jsonl
    python benchmarks/mutations.py --again SEED/BLOCK/CASE          # one case again, in full

Draws models x layers x dtypes x levels of evidence x changes (tests/corpus/mutations) with a seed that is printed, and
appends one line a case. *exact*: one finding, whose region has at most 8 value-making operations and contains the
changed one. *near*: the changed operation lies in some finding. *wrong*: findings elsewhere only. *missed*: no finding,
though the outputs change in float64. *silent*: no finding and no effect on these inputs. *false alarm*: a finding on a
benign rewrite. `starcoder2` is an architecture whose failures nobody looked at; it is reported apart.
"""

from __future__ import annotations

import argparse
import collections
import json
import pathlib
import random
import sys
import time
import traceback
import warnings
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "tests"))

import torch

import graphprobe
from corpus import mutations
from corpus.mutations import scoring
from corpus.mutations.subjects import SUBJECTS, UNSEEN, subject
from graphprobe.program import needs_export

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
GOOD = ("exact", "fine", "silent")
CASES = 12  # of one model, which is captured once

Row = dict[str, Any]


def block(
    seed: int, number: int, models: list[str], device: str | None = None, only: int | None = None, show: bool = False
) -> list[Row]:
    """Draw one model and `CASES` changes of it; return a row for each."""
    rng = random.Random(f"{seed}/{number}")
    name, dtype, layers = rng.choice(models), rng.choice(list(DTYPES)), rng.choice((1, 2, 2, 3))
    model, args, kwargs = subject(name, DTYPES[dtype], layers, seed=rng.randrange(1000))
    before = captured(model, args, kwargs)
    rows = []
    for case in range(CASES):
        if only is not None and case != only:
            continue
        row = {"id": f"{seed}/{number}/{case}", "model": name, "dtype": dtype, "layers": layers}
        rows.append(row | one(before, (args, kwargs), random.Random(f"{seed}/{number}/{case}"), device, show))
        if gave_up(rows[-1]):
            break
    return rows


def gave_up(row: Row) -> bool:
    """Whether the GPU gave up (an index out of range does this): nothing runs on it any more in this process."""
    return any("the GPU gave up" in str(line) for line in row.get("findings", ()))


def captured(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.fx.GraphModule:
    """Capture once; what writes in place is made functional here, or every comparison would do it again."""
    before = graphprobe.capture(model, args, kwargs)
    if not any(needs_export(n) for n in before.graph.nodes):
        return before
    return graphprobe.capture(torch.export.export(model, args, kwargs, strict=False).run_decompositions({}))


def one(before: torch.fx.GraphModule, given: scoring.Inputs, rng: random.Random, device: str | None, show: bool) -> Row:
    """Change a graph once and judge it."""
    benign, level = rng.random() < 0.36, rng.choice(scoring.LEVELS)
    mutant = None
    while mutant is None:
        mutant = mutations.draw(before, rng, benign)
    after = mutations.strip(mutant.gm, level)
    row: Row = {"level": level, "benign": benign, "change": mutant.change, "nodes": mutant.nodes}
    started = time.perf_counter()
    try:
        report = graphprobe.diff(before, after, *given, device=device)
        effect = mutant.benign or scoring.has_effect(before, mutant, given)
        row["result"] = scoring.classify(report, mutant, scoring.renamed(mutant.gm, after), effect)
        row["verdict"], row["resolution"] = report.verdict, round(report.coverage.resolution, 3)
        grave = [f for f in report.findings if f.kind != "rounding"]
        row["findings"] = [(f.kind, f.culprit, f.outputs, f.rule, f.hint[:120]) for f in grave[:3]]
        if show:
            print(report)
    except Exception as error:
        row["result"] = f"error {type(error).__name__}"
        row["findings"] = traceback.format_exc().splitlines()[-12:]
    return row | {"seconds": round(time.perf_counter() - started, 2)}


def table(rows: list[Row]) -> str:
    """Count results by class, apart for what was seen while building and what was not."""
    lines = []
    for title, models in (("", set(SUBJECTS)), ("never looked at: ", set(UNSEEN))):
        mine = [r for r in rows if r["model"] in models]
        for benign in (False, True):
            group = [r for r in mine if r["benign"] is benign]
            if group:
                lines += _section(f"{title}{'benign rewrites' if benign else 'defects'}", group)
    return "\n".join(lines)


def _section(title: str, rows: list[Row]) -> list[str]:
    lines = [f"{title}: {len(rows)}  {_counts(rows)}"]
    active = [r for r in rows if not r["result"].startswith("silent")]
    good = sum(r["result"] in GOOD for r in active)
    lines.append(f"  right in {100 * good / max(len(active), 1):.2f} % of the {len(active)} that have an effect")
    for key in ("level", "dtype", "model", "change"):
        groups = collections.defaultdict(list)
        for row in rows:
            groups[row[key]].append(row)
        lines += [f"    {key} {value}: {_counts(groups[value])}" for value in sorted(groups)]
    return lines


def _counts(rows: list[Row]) -> str:
    return ", ".join(f"{k} {v}" for k, v in collections.Counter(r["result"] for r in rows).most_common())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=8, help=f"of {CASES} cases each")
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--models", default=",".join(SUBJECTS))
    parser.add_argument("--device", help="where both graphs are run, as for diff; changes are made on the CPU")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no block after so many")
    parser.add_argument("--out", help="append one line a case to this file")
    parser.add_argument("--table", help="print the table of such a file")
    parser.add_argument("--again", help="SEED/BLOCK/CASE, with the same --models")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    models = options.models.split(",")
    if options.table:
        print(table([json.loads(line) for line in pathlib.Path(options.table).read_text().splitlines()]))
        return 0
    if options.again:
        seed, number, case = map(int, options.again.split("/"))
        print(json.dumps(block(seed, number, models, options.device, case, show=True), indent=1))
        return 0
    seed = options.seed if options.seed is not None else time.time_ns() % 1_000_000
    print(f"seed {seed}, torch {torch.__version__}", flush=True)
    started, rows = time.perf_counter(), []
    for number in range(options.blocks):
        if time.perf_counter() - started > options.seconds:
            break
        made = block(seed, number, models, options.device)
        rows += made
        if options.out:
            with pathlib.Path(options.out).open("a") as file:
                file.writelines(json.dumps(row) + "\n" for row in made)
        for row in made:
            if row["result"] not in GOOD:
                print(json.dumps(row), flush=True)
        if gave_up(made[-1]):
            print("nothing runs on the GPU any more in this process; go on with another seed")
            break
    print(table(rows))
    print(f"{len(rows)} cases in {time.perf_counter() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
