"""How often does the judge name the right operation, and how often does it cry wolf?

    python benchmarks/accuracy.py --count 200 [--seed N] [--models llama,gpt2] [--json FILE]

Draws changes of exported graphs (tests/corpus/mutations.py) with a seed that is printed, and counts by class:
*exact* (one finding, whose region has at most 8 value-making operations and contains the changed one), *near* (the
changed operation lies in some finding), *wrong* (findings elsewhere only), *missed* (no finding, though the function
changed), *silent* (the change has no effect on these inputs, and none was reported), false alarms on benign rewrites.
"""

from __future__ import annotations

import argparse
import collections
import json
import pathlib
import random
import sys
import time
import warnings

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "tests"))

import torch

import graphprobe
from corpus import mutations
from graphprobe.lanes import exact
from graphprobe.program import program
from models import tiny

MODELS = ("llama", "qwen3", "gpt2", "bert", "mistral", "mixtral", "conv")
UNSEEN = "unseen"


def effect(before, after, kwargs, args) -> bool:
    """Whether the change moves the outputs in float64 arithmetic, by running both graphs lifted."""
    outs = []
    for gm in (before, after):
        p = program(gm, args, kwargs)
        from graphprobe import inputs

        bound = inputs.bind(gm, args, kwargs, "before")
        outs.append(lifted_run(p, bound))
    worst = 0.0
    for x, y in zip(*outs, strict=True):
        if not isinstance(x, torch.Tensor):
            continue
        if x.shape != y.shape:
            return True
        d = torch.nan_to_num(x.double()) - torch.nan_to_num(y.double())
        if not torch.equal(x.isnan(), y.isnan()):
            return True
        worst = max(worst, float(d.norm() / (torch.nan_to_num(x.double()).norm() + 1e-300)))
    return worst > 1e-11


def lifted_run(p, bound):
    env = {n: exact.lift(bound[path]) for path, n in p.inputs.items() if path in bound}
    with torch.no_grad():
        for n in p.live:
            if n.op == "get_attr":
                env[n] = exact.lift(p.attribute(n))
            elif n.op == "call_function":
                a, k = (torch.fx.map_arg(v, env.__getitem__) for v in (n.args, n.kwargs))
                t, a, k = exact.lifted_call(n, a, k)
                env[n] = t(*a, **k)
    return [env[n] for n in p.outputs.values()]


def classify(report, mutant, changed, has_effect) -> str:
    grave = [f for f in report.findings if f.kind not in ("rounding", "identical")]
    if mutant.benign:
        return "unknown" if report.verdict == "unknown" else "false alarm" if grave else "fine"
    if not grave:
        if report.verdict == "unknown":
            return "unknown"
        return "missed" if has_effect else "silent"
    hit = [f for f in grave if changed & {*f.before, *f.after, f.culprit}]
    size = 99
    if hit:
        row = next((r for r in report.regions if (r.before, r.after) == hit[0].outputs), None)
        size = (
            len([n for n in hit[0].after if not report.after.by_name[n].is_view]) if row and report.after.nodes else 0
        )
    if hit and len(grave) == 1 and size <= 8:
        return "exact"
    return "near" if hit else "wrong"


def show(report) -> None:
    """Print what the judge said of one change."""
    print(f"     {report.verdict}, resolution {report.coverage.resolution:.2f}, {report.coverage.unknown} unknown")
    for f in [f for f in report.findings if f.kind != "rounding"][:4]:
        print(f"     {f.kind} {f.module_path} {f.op} {f.culprit} {f.outputs}")
        print(f"       exact {f.exact} S {f.spread} {f.rule} {f.hint}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--levels", default="ids,modules,values")
    parser.add_argument("--benign", type=float, default=0.33)
    parser.add_argument("--show", action="store_true")
    parser.add_argument("--json")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    seed = options.seed if options.seed is not None else int(time.time())
    print(f"seed {seed}, torch {torch.__version__}")
    rng = random.Random(seed)
    captured = {}
    table = collections.defaultdict(collections.Counter)
    started = time.time()
    for i in range(options.count):
        name = rng.choice(options.models.split(","))
        dtype = rng.choice([torch.float32, torch.bfloat16])
        level = rng.choice(options.levels.split(","))
        key = (name, dtype)
        if key not in captured:
            model, args, kwargs = tiny(name, dtype)
            captured[key] = (graphprobe.capture(model, args, kwargs), args, kwargs)
        gm, args, kwargs = captured[key]
        mutant = mutations.draw(gm, rng, rng.random() < options.benign)
        if mutant is None:
            continue
        after = mutations.strip(mutant.gm, level)
        renamed = dict(zip((n.name for n in mutant.gm.graph.nodes), (n.name for n in after.graph.nodes), strict=True))
        changed = {*mutant.nodes, *(renamed.get(n, n) for n in mutant.nodes)}
        try:
            report = graphprobe.diff(gm, after, args, kwargs)
            has = True if mutant.benign else effect(gm, mutant.gm, kwargs, args)
            result = classify(report, mutant, changed, has)
        except Exception as error:
            result = f"error {type(error).__name__}"
            if options.show:
                import traceback

                traceback.print_exc()
        table[("benign" if mutant.benign else "defect", level)][result] += 1
        table[("benign" if mutant.benign else "defect", mutant.change)][result] += 1
        if options.show and result not in ("exact", "fine", "silent"):
            print(f"#{i} {name} {dtype} {level} {mutant.change} at {mutant.nodes}: {result}")
            show(report)
    for key in sorted(table):
        print(key, dict(table[key]))
    print(f"{options.count} changes in {time.time() - started:.0f} s")
    if options.json:
        pathlib.Path(options.json).write_text(json.dumps({"/".join(k): dict(v) for k, v in table.items()}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
