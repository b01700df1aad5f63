"""`graphprobe.bisect`: which transform, and which match of it, made a model wrong."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree

from graphprobe import api, fxfile, inputs
from graphprobe.bisection import bench, built_in, oracle, store
from graphprobe.bisection.choice import is_inductor
from graphprobe.bisection.commands import Commands
from graphprobe.bisection.hunt import Hunt
from graphprobe.bisection.records import Bisection
from graphprobe.capturing import capture
from graphprobe.errors import InputError

Progress = Callable[[int, int, str], None]


def bisect(
    model: api.Side,
    args: tuple[Any, ...] | list[Any] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    pipeline: Any,
    check: oracle.Check | None = None,
    state: str | os.PathLike[str] | None = None,
    dynamic_shapes: Any = None,
    exact: str = "auto",
    valid: torch.Tensor | None = None,
    accept: Sequence[str] = (),
    allow: Sequence[str] = (),
    min_coverage: float = 0.9,
    progress: Progress | None = None,
    command: str = "",
) -> Bisection:
    """Say which transform of a pipeline made the model wrong, by which of its matches, and by which operation.

    `model` is an nn.Module, an ExportedProgram, a GraphModule (which goes into the first transform as it is) or an
    ``.fx`` file; `pipeline` is whatever ``Pipeline.of`` takes, "inductor" (PyTorch's own compiler), "decompositions"
    (those of torch.export, an operator each), "quantize_" or "pt2e" (torchao's quantisers: honest quantisation is
    then no fault). A trial runs a part of the pipeline on its own deep copy
    of the captured graph. It is judged by graphprobe.diff (under `exact`, `valid`, `accept`, `allow`, `min_coverage`),
    or by `check`: a function of the transformed graph that returns True, False or None (cannot judge), or a shell
    command (exit status 0 good, 125 cannot judge, others bad) with ``{before}`` and ``{after}`` as ``.fx`` files.
    Transforms and graphs that raise are bad, as are new NaNs. Answers are kept in the file `state`, from which an
    interrupted bisection goes on. `command` holds a shell's words for the model, for the commands that reproduce the
    trials. Raises GraphprobeError on bad input.
    """
    started = time.perf_counter()
    options: dict[str, Any] = {"exact": exact, "valid": valid, "accept": tuple(accept), "allow": tuple(allow)}
    options["min_coverage"] = min_coverage
    if is_inductor(pipeline):
        _refuse(check, state, dynamic_shapes)
        found = _compiler(model, tuple(args), kwargs, options, check, progress, command)
    else:
        captured = _captured(model, tuple(args), kwargs, dynamic_shapes, check is None)
        more = (("dynamic_shapes", "dynamic_shapes"),) if dynamic_shapes is not None else ()
        found = _transforms(
            captured, pipeline, options, check, state, progress, Commands(command, check, options, more)
        )
    return dataclasses.replace(found, seconds=time.perf_counter() - started)


def _transforms(
    captured: tuple[torch.fx.GraphModule, tuple[Any, ...], dict[str, Any]],
    pipeline: Any,
    options: dict[str, Any],
    check: oracle.Check | None,
    state: str | os.PathLike[str] | None,
    progress: Progress | None,
    commands: Commands,
) -> Bisection:
    """Search a pipeline that is a list of transforms, of which any part can run alone."""
    gm, args, kwargs = captured
    plan = built_in.plan(pipeline, gm, args, kwargs)
    meant = [kind for kind in built_in.tolerated(plan) if kind not in options["allow"]]
    options = {**options, "allow": (*options["allow"], *meant)}
    words = commands.model + "".join(f" --allow {kind}" for kind in meant if commands.model)
    commands = dataclasses.replace(commands, model=words, options=options)
    if args or kwargs:
        inputs.bind(gm, args, kwargs, "the model")
    entries = bench.entries_of(plan)
    named_files = store.files_in(check) if check is not None and not callable(check) else ""
    written = [(bench.text_of((entry,)), entry.transform) for entry in entries]
    key = store.key_of(gm, (args, kwargs), written, check, named_files, options)
    with oracle.made(check, gm, args, kwargs, options) as judge:
        hunt = Hunt(
            captured=gm,
            args=args,
            kwargs=kwargs,
            entries=entries,
            oracle=judge,
            store=store.Store.open(state, key),
            commands=commands,
            options=options,
            progress=progress,
        )
        found = hunt.run()
    leaves = {str(i): leaf for i, leaf in enumerate(pytree.tree_leaves((args, kwargs)))}
    return dataclasses.replace(found, notes=(*plan.notes, *found.notes), environment=api.environment(leaves))


def _refuse(check: Any, state: Any, dynamic_shapes: Any) -> None:
    """Raise InputError for what has no meaning where Inductor is the pipeline."""
    if check is not None and not callable(check):
        raise InputError("with pipeline='inductor' the check must be a function of what is called like the model")
    if state is not None:
        raise InputError(
            "with pipeline='inductor' nothing is kept in a state file: a search takes seconds; leave it out"
        )
    if dynamic_shapes is not None:
        raise InputError("with pipeline='inductor' shapes are what Dynamo makes of them: leave dynamic_shapes out")


def _compiler(
    model: api.Side,
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None,
    options: dict[str, Any],
    check: Any,
    progress: Progress | None,
    command: str,
) -> Bisection:
    from graphprobe.bisection import inductor  # late: Inductor takes seconds to import

    module, args, call = callable_model(model, args, kwargs)
    return inductor.bisect(module, args, call, options=options, check=check, progress=progress, command=command)


def callable_model(
    model: api.Side, args: tuple[Any, ...], kwargs: dict[str, Any] | None
) -> tuple[torch.nn.Module, tuple[Any, ...], dict[str, Any]]:
    """Return what torch.compile takes, and its inputs: given, stored with a file, or drawn from the graph."""
    if isinstance(model, (str, os.PathLike)):
        stored = fxfile.load_inputs(model)
        model = fxfile.load(model)
        args, kwargs = stored if not args and not kwargs and stored is not None else (args, kwargs)
    if isinstance(model, torch.export.ExportedProgram):
        model = model.module()
    if isinstance(model, torch.fx.GraphModule) and not args and not kwargs:
        args, kwargs = inputs.draw(capture(model))
    return model, args, dict(kwargs or {})


def _captured(
    model: api.Side, args: tuple[Any, ...], kwargs: dict[str, Any] | None, dynamic_shapes: Any, needs_inputs: bool
) -> tuple[torch.fx.GraphModule, tuple[Any, ...], dict[str, Any]]:
    """Return a graph that no trial will change, and the inputs: given, stored with a file, or drawn."""
    stored = None
    if isinstance(model, (str, os.PathLike)):
        stored = fxfile.load_inputs(model)
        model = fxfile.load(model)
    if not args and not kwargs and stored is not None:
        args, kwargs = stored
    if isinstance(model, torch.fx.GraphModule):
        model = oracle.deep_copy(model)
    gm = capture(model, args, kwargs, dynamic_shapes=dynamic_shapes)
    if not args and not kwargs and needs_inputs:
        args, kwargs = inputs.draw(gm)
    return gm, args, dict(kwargs or {})
