"""The stages wired together: what users call."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
import platform
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from graphprobe import align, arguments, binding, devices, fxfile, graphview, inputs, judge, sides, streaming, untapped
from graphprobe.capturing import capture
from graphprobe.lanes import listing
from graphprobe.program import Program, as_is, copied, program
from graphprobe.records import ClaimRecord, ExactRow, Leftover, Replacement, Report

Side = sides.Side
Args = arguments.Args
Kwargs = arguments.Kwargs
Call = sides.Call
Progress = Callable[[int, int, str], None]
EVENTS = "graphprobe_events"  # where a graph that was transformed under observation carries its replacements


def diff(
    before: Side,
    after: Side,
    args: Args = (),
    kwargs: Kwargs = None,
    *,
    device: str | torch.device | None = None,
    exact: str = "auto",
    valid: torch.Tensor | None = None,
    events: Sequence[Replacement] | None = None,
    accept: Sequence[str] = (),
    allow: Sequence[str] = (),
    min_coverage: float = 0.9,
    memory: str = "resident",
    details: bool = False,
    after_args: Args | None = None,
    after_kwargs: Kwargs = None,
    progress: Progress | None = None,
) -> Report:
    """Compare two versions of a model region by region and say which operation makes them disagree.

    Each side is an nn.Module, an ExportedProgram, a GraphModule or the path of an ``.fx`` file. Without `args` and
    `kwargs` the inputs stored in ``before.fx`` are taken, else they are drawn from the graph. A list of tuples as
    `args` (or of dicts as `kwargs`) is a list of input sets, whose findings are joined. `exact` is "auto" (exact lanes
    except where both regions are one program), "always" or "never". `valid` is a [batch, tokens] mask of the positions
    that count. `events` are the replacements recorded while a transform ran. `accept` holds
    "NODE:KIND:BOUND" rules for changes that are meant, `allow` kinds that are. With `memory`
    "stream" the weights of both sides stay in their files, or in host memory, and come to `device` one by one, so that
    models larger than its memory can be compared; "resident" puts them there. With `details` regions, findings and
    outputs also say how the values of both versions differ: cosine, ulp, elements that differ, the worst slice.
    `after_args` and `after_kwargs` are what `after` is called with where that has another form: the same prompt
    padded, a batch that holds before's as a row. The smaller inputs must lie in the larger ones, and that slice is
    compared. Raises GraphprobeError on bad input.
    """
    arguments.check_options(exact, accept, allow, min_coverage, device, events)
    options = _Options(
        device, memory, exact, valid, events, tuple(accept), tuple(allow), min_coverage, details, progress
    )
    sets = arguments.input_sets(args, kwargs)
    theirs = arguments.other_sets(after_args, after_kwargs, len(sets))
    with _frozen(), devices.faults():
        return judge.join([_diff(before, after, *one, options, other) for one, other in zip(sets, theirs, strict=True)])


@contextlib.contextmanager
def _frozen() -> Iterator[None]:
    """Let the garbage collector leave alone what is there already: models and their graphs are many small objects, and
    what a comparison writes would have them all walked again and again."""
    if gc.get_freeze_count():  # someone else keeps objects frozen, and there is but one freezer
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@dataclasses.dataclass(frozen=True, eq=False)
class _Options:
    """What `diff` was asked for, the same for every input set."""

    device: str | torch.device | None
    memory: str
    exact: str
    valid: torch.Tensor | None
    events: Sequence[Replacement] | None
    accept: Sequence[str]
    allow: Sequence[str]
    min_coverage: float
    details: bool
    progress: Progress | None


def _diff(
    before: Side,
    after: Side,
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None,
    options: _Options,
    other: Call | None = None,
) -> Report:
    """Compare on one input set."""
    started = time.perf_counter()
    stream = streaming.stream_to(options.device, options.memory)
    other = other or sides.stored_apart(before, after, args, kwargs)
    (gm_before, gm_after), args, kwargs = sides.graphs(
        (before, after), args, kwargs, mapped=stream is not None, other=other
    )
    valid = options.valid
    if stream is not None:
        valid = None if valid is None else valid.to(stream.device)
    elif options.device is not None:
        device = torch.device(options.device)
        call = (args, kwargs, other)
        gm_before, gm_after, (args, kwargs, other), valid = sides.to_device(device, gm_before, gm_after, call, valid)
    left, right, bound = binding.programs(gm_before, gm_after, args, kwargs, stream, other)
    notes: list[str] = []
    # with inputs of another form on one side, what is padding there is left out by the slice that is compared
    redrawn, leaks = (None, False) if other else binding.redrawn(left, right, bound, valid, notes)
    replaced = tuple(options.events if options.events is not None else gm_after.meta.get(EVENTS, ()))
    left, right, claims = _aligned(left, right, replaced, bound)
    judging: dict[str, Any] = {"exact": options.exact, "detailed": options.details, "progress": options.progress}
    judgement = judge.judge(left, right, claims, bound, redrawn=redrawn, leaks=leaks, **judging)
    for side, model, one in (("before", before, left), ("after", after, right)):
        notes.append(untapped.note(side, model, one, bound, args, kwargs))
    judgement.notes += [said for said in notes if said]
    report = judge.report(judgement, accept=options.accept, allow=options.allow, min_coverage=options.min_coverage)
    if other and report.verdict == "unknown" and (said := align.moved_along(left.inputs, bound)):
        report = dataclasses.replace(report, notes=(*report.notes, said))
    return dataclasses.replace(
        report,
        before=graphview.view(gm_before, "before"),
        after=graphview.view(gm_after, "after"),
        environment=environment(bound),
        seconds=time.perf_counter() - started,
    )


def _aligned(
    left: Program, right: Program, events: Sequence[Replacement], bound: inputs.Inputs
) -> tuple[Program, Program, align.Alignment]:
    """Align two programs; those that are returned may have views written into them."""
    found = align.quick(left, right, events, bound)
    if found is not None:
        return left, right, found
    left, right = copied(left), copied(right)
    return left, right, align.align(left, right, events, bound)


@dataclasses.dataclass(frozen=True)
class Pairing:
    """An alignment as records: the claims, and what nothing claims on either side, with the reason."""

    claims: tuple[ClaimRecord, ...]
    unmatched: tuple[str, ...]  # value-making nodes of after without a partner
    evidence: dict[str, int]
    left_before: tuple[Leftover, ...]
    left_after: tuple[Leftover, ...]
    ran: bool  # whether the graphs were run to compare their values


def alignment(
    before: Side,
    after: Side,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    events: Sequence[Replacement] | None = None,
    after_args: tuple[Any, ...] | None = None,
    after_kwargs: dict[str, Any] | None = None,
    run: bool = True,
) -> Pairing:
    """Pair the nodes of two versions without judging them.

    Both sides, the inputs and `events` are those of `diff`. Where there are inputs, given or stored, and `run` is set,
    values are compared too; else nothing is run, and graphs without weights or metadata will do, also texts
    (dumps of AutoDeploy or of `run`, what torch.fx prints). Raises GraphprobeError.
    """
    matching = _matched(
        before, after, args, kwargs, arguments.other_sets(after_args, after_kwargs, 1)[0], run, events=events
    )
    left, right = matching.before, matching.after
    records = tuple(dict.fromkeys(align.record(c, left, right) for c in matching.alignment.claims))
    rest_before, rest_after = align.leftovers(matching)
    evidence = dict(Counter(one.evidence for one in records))
    alone = tuple(one.node for one in rest_after if one.why not in align.MET)
    return Pairing(records, alone, evidence, rest_before, rest_after, matching.bound is not None)


def explain(
    before: Side,
    after: Side,
    node: str,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    after_args: tuple[Any, ...] | None = None,
    after_kwargs: dict[str, Any] | None = None,
    run: bool = True,
    draw: bool = False,
) -> str:
    """Say why a node of either side was or was not matched, and what came nearest; with `draw`, also without inputs.

    Raises GraphprobeError on bad input, and for a name that no node has.
    """
    matching = _matched(before, after, args, kwargs, arguments.other_sets(after_args, after_kwargs, 1)[0], run, draw)
    return align.explained(matching, node)


def _matched(
    before: Side,
    after: Side,
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None,
    other: Call | None,
    run: bool,
    draw: bool = False,
    events: Sequence[Replacement] | None = None,
) -> align.Matching:
    texts = [sides.is_text(s) for s in (before, after)]
    stored = [
        fxfile.load_inputs(s) if isinstance(s, (str, os.PathLike)) and not text else None
        for s, text in zip((before, after), texts, strict=True)
    ]
    runs = not any(texts) and run and (draw or bool(args) or bool(kwargs) or any(s is not None for s in stored))
    bound: inputs.Inputs | None = None
    if runs or sides.is_plain_module(before) or sides.is_plain_module(after):
        other = other or sides.stored_apart(before, after, args, kwargs)
        (gm_before, gm_after), args, kwargs = sides.graphs((before, after), tuple(args), kwargs, other=other)
        left, right, bound = binding.programs(gm_before, gm_after, args, kwargs, other=other)
    else:  # nothing to run on
        gm_before, gm_after = (capture(sides.read(s)) for s in (before, after))
        left, right = as_is(gm_before), as_is(gm_after)
    missing = any(gm.meta.get(fxfile.MISSING) for gm in (gm_before, gm_after))
    replaced = tuple(events if events is not None else gm_after.meta.get(EVENTS, ()))
    return align.match(copied(left), copied(right), replaced, bound if runs and not missing else None)


def operators(graph: Side, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> tuple[ExactRow, ...]:
    """Say how exact arithmetic evaluates each operator of a graph: one of each kind is run in float64.

    The graph and its inputs are given as in `diff`. A file without weights is not run. Raises GraphprobeError on bad
    input.
    """
    (gm,), args, kwargs = sides.graphs((graph,), tuple(args), kwargs)
    if gm.meta.get(fxfile.MISSING):
        return listing.list_operators(as_is(gm), None)
    one = program(gm, args, kwargs)
    bound = inputs.bind(gm, args, kwargs, "the graph")
    inputs.check(one, bound, "the graph", inputs.device_of(gm))
    binding.concretise(one, bound)
    return listing.list_operators(one, binding.as_before_takes(one, bound))


def environment(bound: inputs.Inputs) -> dict[str, str]:
    """Say where the comparison ran."""
    device = next((v.device for v in bound.values() if isinstance(v, torch.Tensor)), torch.device("cpu"))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": f"{device.type} ({name})",
        "platform": platform.system(),
    }
