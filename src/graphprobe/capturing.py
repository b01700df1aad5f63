"""A model becomes an FX graph: through torch.export, with gradients off and with ids stamped on every node."""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import sys
from collections.abc import Iterator
from typing import Any

import torch

from graphprobe import nodes, provenance
from graphprobe.caches import register_caches
from graphprobe.errors import CaptureError

Model = torch.nn.Module | torch.export.ExportedProgram | torch.fx.GraphModule


def capture(
    model: Model,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
) -> torch.fx.GraphModule:
    """Capture a model as a runnable FX graph in which every node carries an id.

    An ``nn.Module`` is exported with `args` and `kwargs` (tensors of any shape the model takes; dimensions named in
    `dynamic_shapes` stay symbolic). An ``ExportedProgram`` is unlifted. A ``GraphModule`` is stamped where it is.
    Raises CaptureError with torch's reason, the module and what to try.
    """
    if isinstance(model, torch.export.ExportedProgram):
        provenance.stamp(model.graph_module)
        return unlift(model)
    if isinstance(model, torch.fx.GraphModule):
        provenance.stamp(model)
        return model
    if not isinstance(model, torch.nn.Module):
        raise CaptureError(
            f"cannot capture a {type(model).__name__}: give an nn.Module, an ExportedProgram or a GraphModule"
        )
    return unlift(export(model, args, kwargs, dynamic_shapes=dynamic_shapes))


def export(
    model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None, *, dynamic_shapes: Any = None
) -> torch.export.ExportedProgram:
    """Run ``torch.export.export`` under no_grad and stamp the program. Raises CaptureError."""
    register_caches()
    check_arguments(model, args, kwargs or {})
    said = io.StringIO()
    unwanted = ""
    try:
        with torch.no_grad(), quiet(), contextlib.redirect_stderr(said):
            program = torch.export.export(
                model, tuple(args), dict(kwargs or {}), dynamic_shapes=dynamic_shapes, strict=False
            )
    except Exception as error:
        # torch prints the graph so far, which explains nothing
        unwanted = f"{getattr(error, 'partial_fx_graph', '')}\n"
        raise CaptureError(_explain(model, error)) from error
    finally:
        sys.stderr.write(said.getvalue().replace(unwanted, "") if unwanted else said.getvalue())
    provenance.stamp(program.graph_module)
    return program


def unlift(program: torch.export.ExportedProgram) -> torch.fx.GraphModule:
    """Return the program as a GraphModule that owns its weights and has no guard calls."""
    with quiet():
        gm = program.module(check_guards=False)
    assert isinstance(gm, torch.fx.GraphModule)
    for node in list(gm.graph.nodes):
        if node.op == "call_module" and nodes.returns_nothing(node):
            gm.graph.erase_node(node)
    gm.recompile()
    return gm


def check_arguments(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise CaptureError where the arguments do not fit ``model.forward``."""
    if not isinstance(args, (tuple, list)):
        raise CaptureError(f"args must be a tuple of positional arguments, not a {type(args).__name__}")
    try:
        inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as error:
        raise CaptureError(
            f"the arguments do not fit {type(model).__name__}.forward: {error}. "
            "Give positional arguments as args=(...) and named ones as kwargs={...}"
        ) from error
    except ValueError:  # no signature to be had
        return


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence torch's warnings and logs while it copies and exports; what fails, raises, and is explained once."""
    # torch warns about its own internals (treespec classes), and logs a traceback of what it raises as well
    import warnings

    log = logging.getLogger("torch")
    level = log.level
    log.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def _explain(model: torch.nn.Module, error: Exception) -> str:
    reason = str(error).strip().split("\n\n")[0].strip() or type(error).__name__
    lines = [f"torch.export could not capture {type(model).__name__}: {type(error).__name__}: {reason[:800]}"]
    where = _failing_frame(error)
    if where:
        lines.append(f"  where: {where}")
    absent = [name for name, weight in model.named_parameters() if weight.is_meta]
    absent += [name for name, buffer in model.named_buffers() if buffer.is_meta]
    if absent and len(absent) < len(model.state_dict()):
        more = f" and {len(absent) - 3} more" if len(absent) > 3 else ""
        lines.append(f"  try: load {', '.join(absent[:3])}{more}, which is still on the meta device")
    else:
        lines.append(f"  try: {_advice(str(error))}")
    return "\n".join(lines)


def _failing_frame(error: BaseException) -> str:
    """Name the innermost frame of a module's forward: 'Attention.forward (model.py:12)'."""
    found = ""
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        owner = trace.tb_frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
        own = type(owner).__module__.startswith(("torch.export", "torch._export", "torch.fx"))  # wraps the model
        if isinstance(owner, torch.nn.Module) and code.co_name == "forward" and not own:
            found = f"{type(owner).__name__}.forward ({code.co_filename.rsplit('/', 1)[-1]}:{trace.tb_lineno})"
        trace = trace.tb_next
    return found


def _advice(text: str) -> str:
    table = (
        (("data-dependent", "GuardOnDataDependent", "Could not guard"),
         "a branch depends on tensor values; replace it by torch.where or torch.cond, or add torch._check"),
        (("Constraints violated", "specialized"),
         "a dimension in dynamic_shapes is fixed by the model; leave it out or use Dim.AUTO"),
        (("pytree", "unknown type", "not a known type", "unrecognized type"),
         "an input or output is a class torch does not know; register it with torch.utils._pytree.register_pytree_node "
         "or call the model with use_cache=False"),
        (("must have the same dtype", "type (float) and bias", "type (float) and weight", "same dtype"),
         "the model holds another dtype than its arguments; capture each version with arguments of its own dtype, "
         "graphprobe.capture(model, args), and compare the graphs: inputs are cast to what each takes"),
        (("No module named", "not found"), "an import inside forward fails; install what it needs"),
    )  # fmt: skip
    for words, advice in table:
        if any(word in text for word in words):
            return advice
    return (
        "run the model on the same arguments first; then torch.export.draft_export(model, args, kwargs) lists every "
        "obstacle at once"
    )
