"""How often does diff name the right operation on the corpus, and how do naive comparisons fare on the same models?

    python benchmarks/corpus.py [--seeds 0,1,2] [--only rotary,masks] [--show] [--json FILE]

The cases are planted bugs and benign changes made from the public record (tests/corpus/catalogue.py); three seeds draw
weights, inputs, depth, the wrong layer and the dtype. By class it counts *exact* (every bug named: kind, module,
operator, at most 8 operations, no more findings than places in which the graphs differ, and nothing else), *near* (a
finding in the wrong module's neighbourhood), *wrong* (findings elsewhere only), *missed*, and on benign changes *false
alarms*. Beside it, measured in the same run:

- *hooks*: every module's output against that of the same-named module, `allclose` with rtol 1e-3; the first that
  differs is blamed. Exact means the wrong module itself, near one above or below it.
- *same*: `torch._dynamo.utils.same` on the outputs with a float64 run of `before` as its reference; it can say that
  something is wrong (*found*), not where.
"""

from __future__ import annotations

import argparse
import collections
import copy
import json
import logging
import pathlib
import sys
import time
import warnings
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "tests"))

import torch
import torch.utils._pytree as pytree
from torch import nn
from torch._dynamo.utils import same

from corpus.catalogue import CASES, Case, Truth, judged

RTOL, ATOL = 1e-3, 1e-5
COLUMNS = ("exact", "near", "found", "wrong", "missed", "unknown", "error", "false alarm", "fine")
Table = dict[str, collections.Counter[str]]


def hooks(before: nn.Module, after: nn.Module, args: Any, kwargs: Any, truth: Truth) -> str:
    """Blame the first module whose output differs from that of the same name."""
    seen: list[dict[str, Any]] = []
    for model in (before, after):
        outputs: dict[str, Any] = {}
        handles = [m.register_forward_hook(_keeper(outputs, name)) for name, m in model.named_modules()]
        try:
            run(model, args, kwargs)
        finally:
            for handle in handles:
                handle.remove()
        seen.append(outputs)
    differing = [n for n, out in seen[1].items() if n in seen[0] and not close(seen[0][n], out)]
    if not truth.bugs:
        return "false alarm" if differing else "fine"
    if not differing:
        return "missed"
    first, wanted = differing[0], {bug.module for bug in truth.bugs}
    if first in wanted:
        return "exact"
    related = any(first.startswith(f"{w}.") or w.startswith(f"{first}.") or not first or not w for w in wanted)
    return "near" if related else "wrong"


def _keeper(outputs: dict[str, Any], name: str) -> Any:
    def keep(_module: nn.Module, _args: Any, output: Any) -> None:
        outputs.setdefault(name, output)

    return keep


def run(model: nn.Module, args: Any, kwargs: Any) -> Any:
    """Call a model on copies of its inputs, always from the same random state."""
    given, named = copy.deepcopy((args, kwargs))
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return model(*given, **named)


def close(x: Any, y: Any) -> bool:
    """Compare all tensors of two outputs as people do."""
    pairs = zip(pytree.tree_leaves(x), pytree.tree_leaves(y), strict=False)
    tensors = [(p, q) for p, q in pairs if isinstance(p, torch.Tensor) and isinstance(q, torch.Tensor)]
    return all(
        p.shape == q.shape and torch.allclose(p.double(), q.double(), rtol=RTOL, atol=ATOL, equal_nan=True)
        for p, q in tensors
    )


def outputs_same(before: nn.Module, after: nn.Module, args: Any, kwargs: Any, truth: Truth) -> str:
    """Ask torch's own accuracy check about the outputs."""
    wide = pytree.tree_map(
        lambda t: t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t, (args, kwargs)
    )
    try:
        reference = run(copy.deepcopy(before).double(), *wide)
    except Exception:  # a model that fixes a dtype somewhere: torch's check then goes without
        reference = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        agreed = same(
            run(before, args, kwargs), run(after, args, kwargs), reference, tol=RTOL, equal_nan=True,
            relax_numpy_equality=True, ignore_non_fp=True,
        )  # fmt: skip
    if not truth.bugs:
        return "fine" if agreed else "false alarm"
    return "missed" if agreed else "found"


def graphs(before: nn.Module, after: nn.Module, args: Any, kwargs: Any, truth: Truth, show: bool) -> str:
    """Ask graphprobe."""
    report, result = judged(before, after, args, kwargs, truth)
    if show and result not in ("exact", "fine"):
        print(f"    {report.verdict}, wanted {[(b.module, b.kind) for b in truth.bugs]}")
        for f in report.findings[:5]:
            print(f"      {f.kind} {f.module_path} {f.op} {f.culprit} exact {f.exact} {f.rule} | {f.hint[:120]}")
    return result


def one(case: Case, seed: int, show: bool) -> dict[str, str]:
    """Judge one case in the three ways."""
    out = {}
    for name, judge in (("graphprobe", graphs), ("hooks", hooks), ("same", outputs_same)):
        more = (show,) if judge is graphs else ()
        try:
            before, after, args, kwargs, truth = case.build(seed)
            out[name] = judge(before, after, args, kwargs, truth, *more)  # type: ignore[operator]
        except Exception as error:
            out[name] = "error"
            if show and judge is graphs:
                print(f"    {type(error).__name__}: {str(error)[:300]}")
    return out


def table(counts: dict[str, Table], title: str) -> str:
    """Return one table: a line a class, a group of columns a method."""
    lines = [f"{title:14}" + "".join(f"{name:>12}" for name in COLUMNS)]
    for method, rows in counts.items():
        lines.append(f"-- {method}")
        total: collections.Counter[str] = collections.Counter()
        for group in sorted(rows):
            total.update(rows[group])
            lines.append(f"{group:14}" + "".join(f"{rows[group][c] or '':>12}" for c in COLUMNS))
        lines.append(f"{'all':14}" + "".join(f"{total[c] or '':>12}" for c in COLUMNS))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--only", default="", help="names or classes, separated by commas")
    parser.add_argument("--show", action="store_true", help="print each case, and what was said of those that failed")
    parser.add_argument("--json")
    options = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    logging.getLogger("torch._dynamo.utils").setLevel(logging.CRITICAL)
    only, seeds = [o for o in options.only.split(",") if o], [int(s) for s in options.seeds.split(",")]
    chosen = [c for c in CASES.values() if not only or c.group in only or c.name in only]
    counts: dict[str, Table] = collections.defaultdict(lambda: collections.defaultdict(collections.Counter))
    started = time.time()
    for case in chosen:
        for seed in seeds:
            results = one(case, seed, options.show)
            for method, result in results.items():
                counts[method][case.group][result] += 1
            if options.show:
                print(
                    f"{case.group:13} {case.name} [{seed}] " + ", ".join(f"{m} {r}" for m, r in results.items()),
                    flush=True,
                )
    defects = sum(not c.benign for c in chosen)
    kinds = len({c.architecture for c in chosen})
    print(f"{defects} defects, {len(chosen) - defects} benign changes, {kinds} architectures, seeds {seeds}")
    print(f"torch {torch.__version__}, {time.time() - started:.0f} s")
    print(table(counts, "class"))
    if options.json:
        data = {m: {g: dict(c) for g, c in rows.items()} for m, rows in counts.items()}
        pathlib.Path(options.json).write_text(json.dumps(data, indent=1))
    good = counts["graphprobe"]
    return int(any(row["missed"] or row["false alarm"] or row["error"] for row in good.values()))


if __name__ == "__main__":
    sys.exit(main())
