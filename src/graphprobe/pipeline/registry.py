"""Where transforms come from: installed packages, and what a user names as ``pkg.mod:Name``."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import inspect
import os
import sys
from collections.abc import Mapping
from typing import Any

from graphprobe.errors import PipelineError, nearest
from graphprobe.pipeline import options
from graphprobe.pipeline.functions import FunctionTransform, from_any, function_name
from graphprobe.pipeline.transform import Transform

ENTRY_POINTS = "graphprobe.transforms"
Known = Mapping[str, Any]  # name -> entry point, transform class, function, transform or pass manager


def installed() -> dict[str, importlib.metadata.EntryPoint]:
    """Return the transforms that installed packages offer under the entry-point group ``graphprobe.transforms``."""
    return {point.name: point for point in importlib.metadata.entry_points(group=ENTRY_POINTS)}


def given(spec: str) -> dict[str, Any]:
    """Return {name: what it is} for ``pkg.mod:Name``, to be added to the known transforms. Raises PipelineError."""
    found = load(spec)
    name = getattr(found, "name", None)
    if isinstance(name, str):
        return {name: found}
    if (isinstance(found, type) and not _makes_passes(found)) or not callable(found):
        raise PipelineError(f"{spec} is no transform: a transform is a class with name, stage and apply, or a function")
    return {function_name(found): found}


def _makes_passes(kind: type) -> bool:
    """Whether the class's instances are called with a graph, as those of torch's PassBase are."""
    return not hasattr(kind, "apply") and any("__call__" in base.__dict__ for base in kind.__mro__)


def load(spec: str) -> Any:
    """Import what ``pkg.mod:Name`` names; modules in the current directory are found. Raises PipelineError."""
    module_name, _, path = spec.partition(":")
    if not module_name or not path:
        raise PipelineError(f"{spec!r} is not of the form pkg.mod:Name")
    here = os.getcwd()
    if here not in sys.path:  # as `python -m` does
        sys.path.insert(0, here)
    try:
        value: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise  # the module is there, but something that it imports is not
        raise PipelineError(f"{spec}: there is no module {error.name!r}, neither here nor installed") from error
    for part in path.split("."):
        if not hasattr(value, part):
            owner = getattr(value, "__name__", path)
            raise PipelineError(f"{spec}: {owner} has no {part!r}{nearest(part, dir(value))}")
        value = getattr(value, part)
    return value


def find(name: str, known: Known | None) -> Any:
    """Return what a pipeline means by a name or ``pkg.mod:Name``. Raises PipelineError."""
    if ":" in name:
        return load(name)
    names: Known = installed() if known is None else known
    if name not in names:
        raise PipelineError(
            f"there is no transform {name!r}{nearest(name, names)}; known are: {', '.join(sorted(names)) or 'none'}. "
            "A transform of your own is given as pkg.mod:Name"
        )
    found = names[name]
    if not isinstance(found, importlib.metadata.EntryPoint):
        return found
    try:
        return found.load()
    except (ImportError, AttributeError) as error:
        raise PipelineError(f"the transform {name} ({found.value}) cannot be loaded: {error}") from error


def make(name: str, given_options: Mapping[str, Any], known: Known | None) -> list[Transform]:
    """Make what a pipeline calls `name`: one transform, or the passes of a pass manager. Raises PipelineError."""
    found = find(name, known)
    if isinstance(found, type):
        made = options.instantiate(found, name, given_options)
        if _makes_passes(found):
            return list(from_any(made))
        if not isinstance(made, Transform):
            raise PipelineError(
                f"{name} ({found.__module__}.{found.__qualname__}) is no transform: it lacks name, stage or apply"
            )
        return [made]
    transforms = list(from_any(found))
    if not given_options:
        return transforms
    if len(transforms) != 1 or not isinstance(transforms[0], FunctionTransform):
        raise PipelineError(f"{name} is not a class or a function, so it takes no options")
    one = transforms[0]
    bound = options.bind_function(one.function, name, given_options)
    return [FunctionTransform(one.function, one.name, one.stage, tuple(sorted(bound.items())))]


def spec(transform: Transform) -> str:
    """Return the name under which `find` finds the transform: an installed name, else ``pkg.mod:Name``; the transform's
    own where there is no such name, as for a lambda.
    """
    source: Any = transform.function if isinstance(transform, FunctionTransform) else transform
    if inspect.ismethod(source) or isinstance(source, functools.partial):
        return transform.name
    source = source if inspect.isroutine(source) else type(source)
    module, qualname = getattr(source, "__module__", ""), getattr(source, "__qualname__", "")
    point = installed().get(transform.name)
    if point is not None and point.value == f"{module}:{qualname}":
        return transform.name
    return f"{module}:{qualname}" if module and "<" not in qualname else transform.name
