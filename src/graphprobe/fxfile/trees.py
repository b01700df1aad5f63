"""Structures of inputs and outputs (torch's pytrees) as JSON, and back.

Only classes that are registered with torch's pytrees come back as themselves. Two forms that torch's own reader takes
are refused, because it imports whatever module they name: enum contexts and ``defaultdict``. What cannot come back
becomes a dict (where its keys are known) or a tuple, with a note.
"""

from __future__ import annotations

import importlib
import json
from typing import Any

from torch.utils import _pytree as pytree

from graphprobe.fxfile.archive import Damage

_LEAF: dict[str, Any] = {"type": None, "context": None, "children_spec": []}
_UNSAFE = {"collections.defaultdict"}
_TRANSFORMERS = ("transformers.modeling_outputs.", "transformers.cache_utils.")


def dump(spec: Any) -> dict[str, Any]:
    """Return the structure as JSON; a class without a serialised name is stored under its qualified name."""
    if spec.is_leaf():
        return dict(_LEAF)
    children = [dump(child) for child in spec.children()]
    bare = pytree.TreeSpec(spec.type, spec.context, [])
    try:
        data = json.loads(pytree.treespec_dumps(bare))[1]
    except (NotImplementedError, TypeError, ValueError, AttributeError):
        context = spec.context if isinstance(spec.context, (list, tuple)) else []
        keys = list(context) if len(context) == len(children) and all(isinstance(k, str) for k in context) else None
        data = {"type": f"{spec.type.__module__}.{spec.type.__qualname__}", "context": json.dumps(keys)}
    return {"type": data["type"], "context": data["context"], "children_spec": children}


def load(data: Any, notes: list[str]) -> Any:
    """Return the TreeSpec; what stands in for a class that is unknown here is added to `notes`. Raises Damage."""
    _register_known(data)
    return pytree.treespec_loads(json.dumps([1, _known(data, notes)]))


def _known(data: Any, notes: list[str]) -> dict[str, Any]:
    kind, context, children = data["type"], data["context"], data["children_spec"]
    if kind is None:
        return dict(_LEAF)
    if not isinstance(kind, str) or not isinstance(children, list):
        raise Damage("a structure of inputs or outputs is malformed")
    inner = [_known(child, notes) for child in children]
    if kind in pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE and kind not in _UNSAFE and not _holds_enum(context):
        _check_dict(kind, context, len(inner))
        return {"type": kind, "context": context, "children_spec": inner}
    keys = _keys(context)
    if keys is not None and len(keys) == len(inner):
        notes.append(f"{kind} is not known here: a dict stands in for it. Import what defines it before loading")
        return {"type": "builtins.dict", "context": json.dumps(keys), "children_spec": inner}
    notes.append(f"{kind} is not known here: a tuple stands in for it. Import what defines it before loading")
    return {"type": "builtins.tuple", "context": "null", "children_spec": inner}


def _holds_enum(context: Any) -> bool:
    # looked for in the parsed context: in its text, "\\u005f" could hide an underscore
    if isinstance(context, str):
        try:
            context = json.loads(context)
        except ValueError:
            return False
    if isinstance(context, dict):
        return "__enum__" in context or any(_holds_enum(value) for value in context.values())
    return isinstance(context, list) and any(_holds_enum(value) for value in context)


def _check_dict(kind: str, context: Any, children: int) -> None:
    if kind in ("builtins.dict", "collections.OrderedDict"):
        keys = _keys(context)
        if keys is None or len(set(keys)) != children:
            raise Damage("a dict of inputs or outputs does not have one key for each value")


def _keys(context: Any) -> list[Any] | None:
    """Find the keys of a mapping in a context: a JSON list, or one inside defaultdict's description."""
    if isinstance(context, dict):
        found = context.get("dict_context")
    else:
        found = json.loads(context) if isinstance(context, str) else None
    plain = isinstance(found, list) and all(isinstance(key, (str, int)) for key in found)
    return found if plain else None


def _register_known(data: Any) -> None:
    """Import the two modules of transformers whose classes models return, if the file names one of them."""
    if not any(kind.startswith(_TRANSFORMERS) for kind in _kinds(data)):
        return
    try:
        importlib.import_module("transformers.modeling_outputs")
    except ImportError:
        return
    from graphprobe.caches import register_caches

    register_caches()


def _kinds(data: Any) -> list[str]:
    own = [data["type"]] if isinstance(data["type"], str) else []
    return own + [kind for child in data["children_spec"] for kind in _kinds(child)]


def keywords(spec: Any) -> list[Any]:
    """Return the keys of the keyword arguments in the structure of a graph's inputs."""
    if spec.type is tuple and spec.num_children == 2 and spec.child(1).type is dict:
        return list(spec.child(1).context)
    return []


def flatten(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """Flatten inputs: (leaves, structure as JSON)."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    return leaves, dump(spec)


def unflatten(leaves: list[Any], data: Any, notes: list[str]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Rebuild inputs from their leaves. Raises Damage where the file's structure is no (args, kwargs)."""
    spec = load(data, notes)
    if spec.num_leaves != len(leaves):
        raise Damage("the stored inputs do not fit their structure")
    try:
        args, kwargs = pytree.tree_unflatten(leaves, spec)
    except Exception as error:  # a registered class refuses what the file gives it
        raise Damage(f"the stored inputs cannot be rebuilt: {error}") from error
    if not isinstance(args, tuple) or not isinstance(kwargs, dict):
        raise Damage("the stored inputs are no (args, kwargs)")
    return args, kwargs
