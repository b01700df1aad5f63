"""The stages wired together: what users call."""

from __future__ import annotations

import dataclasses
import os
import platform
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from graphprobe import align, fxfile, graphview, inputs, judge, nodes, streaming, untapped
from graphprobe.capturing import Model, capture
from graphprobe.devices import moved, redirect
from graphprobe.errors import InputError, MismatchError, OperatorError, nearest
from graphprobe.execute import run_program
from graphprobe.lanes import listing
from graphprobe.program import Program, copied, input_paths, output_paths, program
from graphprobe.records import VERDICTS, ClaimRecord, ExactRow, Leftover, Replacement, Report
from graphprobe.streaming import Stream

Side = Model | str | os.PathLike[str]
Args = tuple[Any, ...] | list[Any]  # one call's positional arguments, or a list of such tuples: several input sets
Kwargs = dict[str, Any] | list[dict[str, Any]] | None
Call = tuple[tuple[Any, ...], dict[str, Any]]
Value = TypeVar("Value")
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
    models larger than its memory can be compared; "resident" puts them there. `after_args` and `after_kwargs` are what
    `after` is called with where that has another form: the same prompt padded, a batch that holds before's as a row.
    The smaller inputs must lie in the larger ones, and that slice is compared. Raises GraphprobeError on bad input.
    """
    _check_options(exact, accept, allow, min_coverage)
    options = _Options(device, memory, exact, valid, events, tuple(accept), tuple(allow), min_coverage, progress)
    sets = _input_sets(args, kwargs)
    theirs = _other_sets(after_args, after_kwargs, len(sets))
    return judge.join([_diff(before, after, *one, options, other) for one, other in zip(sets, theirs, strict=True)])


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
    progress: Progress | None


def _input_sets(args: Args, kwargs: Kwargs) -> list[tuple[tuple[Any, ...], dict[str, Any] | None]]:
    """Return the (args, kwargs) of every call: one, unless `args` is a list of tuples or `kwargs` a list of dicts."""
    many_args = isinstance(args, list) and bool(args) and all(isinstance(one, tuple) for one in args)
    if not many_args and not isinstance(kwargs, list):
        return [(tuple(args), kwargs)]
    count = len(args) if many_args else len(kwargs or ())
    if isinstance(kwargs, list) and (len(kwargs) != count or not count):
        raise InputError(f"{count} sets of args and {len(kwargs)} of kwargs were given: give one of each per set")
    positional = args if many_args else [tuple(args)] * count
    named = kwargs if isinstance(kwargs, list) else [kwargs] * count
    return list(zip(positional, named, strict=True))


def _other_sets(args: Args | None, kwargs: Kwargs, count: int) -> list[Call | None]:
    """Return what after is called with in every input set: None where it takes the same as before."""
    if args is None and kwargs is None:
        return [None] * count
    sets = [(one, dict(named or {})) for one, named in _input_sets(() if args is None else args, kwargs)]
    if len(sets) != count:
        raise InputError(
            f"{count} input sets were given for before and {len(sets)} for after: give one of each per set"
        )
    return list(sets)


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
    other = other or _stored_apart(before, after, args, kwargs)
    (gm_before, gm_after), args, kwargs = _graphs((before, after), args, kwargs, mapped=stream is not None, other=other)
    valid = options.valid
    if stream is not None:
        valid = None if valid is None else valid.to(stream.device)
    elif options.device is not None:
        device = torch.device(options.device)
        call = (args, kwargs, other)
        gm_before, gm_after, (args, kwargs, other), valid = _to_device(device, gm_before, gm_after, call, valid)
    left, right, bound = _programs(gm_before, gm_after, args, kwargs, stream, other)
    notes: list[str] = []
    # with inputs of another form on one side, what is padding there is left out by the slice that is compared
    redrawn, leaks = (None, False) if other else _redrawn(left, right, bound, valid, notes)
    replaced = tuple(options.events if options.events is not None else gm_after.meta.get(EVENTS, ()))
    if not align.is_quick(left, right, replaced):
        left, right = copied(left), copied(right)  # alignment may write views into them
    alignment = align.align(left, right, replaced, bound)
    judgement = judge.judge(
        left, right, alignment, bound, redrawn=redrawn, leaks=leaks, exact=options.exact, progress=options.progress
    )
    sides = (("before", before, left), ("after", after, right))
    notes += [untapped.note(side, model, one, bound, args, kwargs) for side, model, one in sides]
    judgement.notes += [said for said in notes if said]
    report = judge.report(judgement, accept=options.accept, allow=options.allow, min_coverage=options.min_coverage)
    return dataclasses.replace(
        report,
        before=graphview.view(gm_before, "before"),
        after=graphview.view(gm_after, "after"),
        environment=environment(bound),
        seconds=time.perf_counter() - started,
    )


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
    values are compared too; else nothing is run, and graphs without weights or metadata will do. Raises
    GraphprobeError.
    """
    matching = _matched(before, after, args, kwargs, _other_sets(after_args, after_kwargs, 1)[0], run, events=events)
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
    matching = _matched(before, after, args, kwargs, _other_sets(after_args, after_kwargs, 1)[0], run, draw)
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
    stored = [fxfile.load_inputs(s) if isinstance(s, (str, os.PathLike)) else None for s in (before, after)]
    runs = run and (draw or bool(args) or bool(kwargs) or any(s is not None for s in stored))
    bound: inputs.Inputs | None = None
    if runs or _is_plain_module(before) or _is_plain_module(after):
        other = other or _stored_apart(before, after, args, kwargs)
        (gm_before, gm_after), args, kwargs = _graphs((before, after), tuple(args), kwargs, other=other)
        left, right, bound = _programs(gm_before, gm_after, args, kwargs, other=other)
    else:  # nothing to run on
        gm_before, gm_after = (
            capture(fxfile.load(s) if isinstance(s, (str, os.PathLike)) else s) for s in (before, after)
        )
        left, right = _as_is(gm_before), _as_is(gm_after)
    missing = any(gm.meta.get(fxfile.MISSING) for gm in (gm_before, gm_after))
    replaced = tuple(events if events is not None else gm_after.meta.get(EVENTS, ()))
    return align.match(copied(left), copied(right), replaced, bound if runs and not missing else None)


def operators(graph: Side, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> tuple[ExactRow, ...]:
    """Say how exact arithmetic evaluates each operator of a graph: one of each kind is run in float64.

    The graph and its inputs are given as in `diff`. A file without weights is not run. Raises GraphprobeError on bad
    input.
    """
    (gm,), args, kwargs = _graphs((graph,), tuple(args), kwargs)
    if gm.meta.get(fxfile.MISSING):
        return listing.list_operators(_as_is(gm), None)
    one = program(gm, args, kwargs)
    bound = inputs.bind(gm, args, kwargs, "the graph")
    inputs.check(one, bound, "the graph", inputs.device_of(gm))
    concretise(one, bound)
    return listing.list_operators(one, _as_before_takes(one, bound))


def _check_options(exact: str, accept: Sequence[str], allow: Sequence[str], min_coverage: float) -> None:
    if exact not in ("auto", "always", "never"):
        raise InputError(f"exact={exact!r}: it must be 'auto', 'always' or 'never'")
    if not 0 <= min_coverage <= 1:
        raise InputError(f"min_coverage={min_coverage}: it must lie between 0 and 1")
    unknown = [kind for kind in allow if kind not in VERDICTS]
    if unknown:
        raise InputError(
            f"allow={unknown[0]!r} is no kind{nearest(unknown[0], VERDICTS)}; kinds: {', '.join(VERDICTS)}"
        )
    for rule in accept:
        judge.parse_accept(rule)


def _graphs(
    sides: Sequence[Side],
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None,
    *,
    mapped: bool = False,
    other: Call | None = None,
) -> tuple[list[torch.fx.GraphModule], tuple[Any, ...], dict[str, Any]]:
    """Turn the sides into graphs and settle the inputs: given, stored with a side, or drawn; `other` are the last's."""
    given = bool(args) or bool(kwargs)
    if not given:
        for side in sides:
            stored = _stored_inputs(side)
            if stored is not None:
                args, kwargs, given = stored[0], stored[1], True
                break
    kwargs = dict(kwargs or {})
    loaded = [fxfile.load(s, mapped=mapped) if isinstance(s, (str, os.PathLike)) else s for s in sides]
    if not given:
        captured = [s for s in loaded if not _is_plain_module(s)]
        if not captured:
            raise InputError("no inputs were given, and a plain nn.Module has none to draw from: give args= or kwargs=")
        args, kwargs = inputs.draw(capture(captured[0]))
    calls = [(args, kwargs)] * len(loaded) if other is None else [*[(args, kwargs)] * (len(loaded) - 1), other]
    return [capture(s, *call) for s, call in zip(loaded, calls, strict=True)], args, kwargs


def _stored_apart(before: Side, after: Side, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> Call | None:
    """Return the inputs stored with after's file, where none are given and before's file holds some of other shapes."""
    if args or kwargs or not all(isinstance(s, (str, os.PathLike)) for s in (before, after)):
        return None
    mine, theirs = (fxfile.load_inputs(s) for s in (before, after))  # type: ignore[arg-type]
    if mine is None or theirs is None or _shapes(mine) == _shapes(theirs):
        return None
    return theirs


def _shapes(call: Any) -> list[tuple[int, ...] | None]:
    leaves = torch.utils._pytree.tree_leaves(call)
    return [tuple(v.shape) if isinstance(v, torch.Tensor) else None for v in leaves]


def _as_is(gm: torch.fx.GraphModule) -> Program:
    """Take a graph that will not be run as it stands."""
    return Program(gm, input_paths(gm), output_paths(gm), {})


def _stored_inputs(side: Side) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Return the inputs that a file or an ExportedProgram comes with, None where there are none."""
    if isinstance(side, torch.export.ExportedProgram):
        found = side.example_inputs
    else:
        found = fxfile.load_inputs(side) if isinstance(side, (str, os.PathLike)) else None
    return (tuple(found[0]), dict(found[1])) if found and any(found) else None


def _is_plain_module(side: Any) -> bool:
    return isinstance(side, torch.nn.Module) and not isinstance(side, torch.fx.GraphModule)


def _to_device(
    device: torch.device,
    before: torch.fx.GraphModule,
    after: torch.fx.GraphModule,
    call: Any,
    valid: torch.Tensor | None,
) -> tuple[torch.fx.GraphModule, torch.fx.GraphModule, Any, torch.Tensor | None]:
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError("device='cuda' was asked for, but torch sees no GPU here; leave device= out to run on the CPU")

    def there(value: Any) -> Any:
        return value.to(device) if isinstance(value, torch.Tensor) else value

    call, valid = torch.utils._pytree.tree_map(there, (call, valid))
    return moved(before, device), moved(after, device), call, valid


def _programs(
    gm_before: torch.fx.GraphModule,
    gm_after: torch.fx.GraphModule,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    stream: Stream | None = None,
    other: Call | None = None,
) -> tuple[Program, Program, inputs.Inputs]:
    """Make both graphs ready for the lanes and bind the inputs; the calling convention is before's."""
    theirs = other or (args, kwargs)
    bound = inputs.bind(gm_before, args, kwargs, "before")
    bound_after = inputs.bind(gm_after, *theirs, "after")
    if other is None:
        _check_names(gm_before, gm_after, kwargs)
    for gm in (gm_before, gm_after):
        _check_weights(gm)
    left = program(gm_before, *_where_it_is(gm_before, args, kwargs, stream))
    right = program(gm_after, *_where_it_is(gm_after, *theirs, stream))
    if other is not None:
        _check_inputs(right, bound_after, "after", gm_after, stream)
    right.inputs = _as_before_calls(right.inputs, gm_before, gm_after, len(theirs[0]))
    _check_inputs(left, bound, "before", gm_before, stream)
    if other is None:
        _check_signatures(left, right)
        _check_inputs(right, bound, "after", gm_after, stream)
    bound = _as_before_takes(left, bound)
    if other is not None:
        bound |= _apart(right, bound, _as_before_calls(bound_after, gm_before, gm_after, len(theirs[0])))
        _check_outputs(left, right)
    if stream is not None:
        left, right = _streamed(left, stream), _streamed(right, stream)
        bound = {path: v.to(stream.device) if isinstance(v, torch.Tensor) else v for path, v in bound.items()}
    for one in (left, right):
        concretise(one, bound)
    return left, right, bound


def _check_inputs(
    one: Program, bound: inputs.Inputs, side: str, gm: torch.fx.GraphModule, stream: Stream | None
) -> None:
    inputs.check(one, bound, side, inputs.device_of(gm) if stream is None else None)


def _apart(right: Program, bound: inputs.Inputs, theirs: inputs.Inputs) -> inputs.Inputs:
    """Give after's inputs that are not before's a path of their own; return what lies there."""
    out: inputs.Inputs = {}
    for path, node in list(right.inputs.items()):
        mine, value = bound.get(path), theirs.get(path)
        if path in theirs and not _equal(mine, value):
            right.inputs = {(align.OTHER + p if n is node else p): n for p, n in right.inputs.items()}
            out[align.OTHER + path] = value
    return out


def _equal(mine: Any, theirs: Any) -> bool:
    if not isinstance(mine, torch.Tensor) or not isinstance(theirs, torch.Tensor):
        return type(mine) is type(theirs) and bool(mine == theirs)
    return mine.shape == theirs.shape and torch.equal(mine, theirs.to(mine.dtype))


def _where_it_is(
    gm: torch.fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any], stream: Stream | None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the inputs where the weights are: a graph may have to be exported there before its weights come over."""
    if stream is None:
        return args, kwargs
    device = inputs.device_of(gm) or torch.device("cpu")
    there: tuple[tuple[Any, ...], dict[str, Any]] = torch.utils._pytree.tree_map_only(
        torch.Tensor, lambda value: value.to(device), (args, kwargs)
    )
    return there


def _streamed(one: Program, stream: Stream) -> Program:
    """Let a program compute on the stream's device and its weights come from where they are."""
    there = copied(one)
    there.stream = stream
    if stream.device.type != "cpu":
        redirect(there.gm, stream.device)
    return there


def _check_names(gm_before: torch.fx.GraphModule, gm_after: torch.fx.GraphModule, kwargs: dict[str, Any]) -> None:
    known = (*inputs.parameter_names(gm_before), *inputs.parameter_names(gm_after))
    for name, value in kwargs.items():
        tensors = [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]
        if tensors and name not in known:
            takes = ", ".join(dict.fromkeys(known))
            raise InputError(f"neither graph takes the input {name!r}{nearest(name, known)}. They take {takes}")


def _check_weights(gm: torch.fx.GraphModule) -> None:
    missing = gm.meta.get(fxfile.MISSING)
    if missing:
        raise OperatorError(
            f"a graph was loaded without the values of {len(missing)} weights ({missing[0]}, ...) and cannot be run: "
            'save it with weights="store" or "reference"'
        )


def _as_before_takes(left: Program, bound: inputs.Inputs) -> inputs.Inputs:
    """Cast floating inputs to the dtypes of before; after's are cast from there."""
    out = dict(bound)
    for path, node in left.inputs.items():
        wanted, value = nodes.tensor_val(node), bound.get(path)
        if wanted is not None and isinstance(value, torch.Tensor) and value.dtype != wanted.dtype:
            out[path] = value.to(wanted.dtype)
    return out


def _as_before_calls(
    paths: dict[str, Value], gm_before: torch.fx.GraphModule, gm_after: torch.fx.GraphModule, count: int
) -> dict[str, Value]:
    """What the caller gave by position binds to each side's own parameter; the path is called as before calls it."""
    mine, theirs = inputs.parameter_names(gm_before)[:count], inputs.parameter_names(gm_after)[:count]
    names = {t: m for m, t in zip(mine, theirs, strict=False)}

    def rename(path: str) -> str:
        head = next(
            (t for t in sorted(names, key=len, reverse=True) if path == t or path.startswith((t + ".", t + "["))), None
        )
        return path if head is None else names[head] + path[len(head) :]

    return {rename(path): value for path, value in paths.items()}


def _check_signatures(left: Program, right: Program) -> None:
    used_left = [p for p, n in left.inputs.items() if nodes.tensor_val(n) is not None]
    used_right = [p for p, n in right.inputs.items() if nodes.tensor_val(n) is not None]
    if len(used_left) != len(used_right):
        raise MismatchError(
            f"before takes {len(used_left)} tensors ({', '.join(used_left)}), after takes {len(used_right)} "
            f"({', '.join(used_right)}): capture both with the same inputs"
        )
    _check_outputs(left, right)


def _check_outputs(left: Program, right: Program) -> None:
    outputs_left = [p for p in left.outputs if not p.startswith("state:")]
    outputs_right = [p for p in right.outputs if not p.startswith("state:")]
    if len(outputs_left) != len(outputs_right):
        raise MismatchError(
            f"before returns {len(outputs_left)} values ({', '.join(outputs_left)}), after returns "
            f"{len(outputs_right)} ({', '.join(outputs_right)}): let both return the same"
        )


def concretise(one: Program, bound: inputs.Inputs) -> None:
    """Where shapes are symbolic or ``meta["val"]`` is missing, run the program once and note what its values are.

    The notes go to a copy of the graph: the caller's nodes are not touched.
    """
    if all(_is_concrete(n) for n in one.live):
        return
    copy = copied(one)
    try:
        values = run_program(copy, bound, [n for n in copy.live if n.op != "get_attr"], observe=_as_meta)
    except Exception:  # the run itself will say which node raises
        values = {}
    values.update((n, _as_meta(copy.held(n))) for n in copy.live if n.op == "get_attr" and values)
    for node, value in values.items():
        node.meta["val"] = value
    one.__dict__.update(copy.__dict__)


def _is_concrete(node: torch.fx.Node) -> bool:
    value = node.meta.get("val", ...)
    if value is ... and node.op != "get_attr":
        return False
    return not isinstance(value, torch.Tensor) or all(isinstance(d, int) for d in value.shape)


def _as_meta(value: Any) -> Any:
    return torch.utils._pytree.tree_map(
        lambda v: (
            torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device="meta")
            if isinstance(v, torch.Tensor) and v.layout == torch.strided
            else None  # sparse ones are compared where they become dense
            if isinstance(v, torch.Tensor)
            else v
        ),
        value,
    )


def _redrawn(
    left: Program, right: Program, bound: inputs.Inputs, valid: torch.Tensor | None, notes: list[str]
) -> tuple[inputs.Inputs | None, bool]:
    """Return inputs with fresh padding, if there is padding and if it really is hidden from the valid outputs of
    before; and whether it leaks into those of after: then what moves of after is no reason to leave it out."""
    padded = inputs.padding(bound, valid)
    if padded is None:
        return None, False
    redrawn = inputs.redraw(bound, padded)
    if _moves_valid(left, bound, redrawn, padded):
        notes.append("the padded positions reach the valid outputs of before: they are compared like all others")
        return None, False
    notes.append(f"{int(padded.sum())} padded positions are left out of every measure")
    leaks = _moves_valid(right, bound, redrawn, padded)
    if leaks:
        notes.append("the padded positions reach the valid outputs of after, but not those of before")
    return redrawn, leaks


def _moves_valid(one: Program, bound: inputs.Inputs, redrawn: inputs.Inputs, padded: torch.Tensor) -> bool:
    """Whether fresh padding moves an output where nothing is padded. An output that cannot be run moves nothing."""
    wanted = list(one.outputs.values())
    try:
        plain, again = run_program(one, bound, wanted), run_program(one, redrawn, wanted)
    except Exception:  # the lanes will say which node raises
        return False
    for node in wanted:
        x, y = plain[node], again[node]
        if isinstance(x, torch.Tensor) and x.shape[:2] == padded.shape and x.is_floating_point():
            counts = ~padded.to(x.device)
            if not torch.equal(torch.nan_to_num(x[counts]), torch.nan_to_num(y[counts])):
                return True
    return False


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
