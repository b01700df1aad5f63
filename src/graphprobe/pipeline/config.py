"""The YAML form of a pipeline, in AutoDeploy's shape: ``transforms: {name: {stage: ..., enabled: ...}}``."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from graphprobe.errors import PipelineError, nearest

#: AutoDeploy's keys that mean nothing here, and why; they are accepted and noted.
WITHOUT_EFFECT = {
    "run_per_gm": "a captured model is one graph",
    "debug_visualize_dir": "dumps hold every graph; `graphprobe show` draws them",
}
Path_ = str | os.PathLike[str]


def load(paths: Sequence[Path_]) -> dict[str, dict[str, Any]]:
    """Read YAML files, each merged deeply over those left of it, and return {transform: its keys}.

    Raises PipelineError where a file is missing, is not of that shape, or says a key twice.
    """
    merged: dict[str, Any] = {}
    for path in paths:
        merged = merge(merged, _read(path))
    transforms = merged.get("transforms")
    where = ", ".join(os.fspath(path) for path in paths)
    if not isinstance(transforms, dict):
        raise PipelineError(f"{where}: there is no mapping 'transforms' of names to settings")
    return {str(name): _keys(name, keys, where) for name, keys in transforms.items()}


def merge(left: Any, right: Any) -> Any:
    """Return `left` with what `right` says put over it; mappings are merged key by key."""
    if not isinstance(left, Mapping) or not isinstance(right, Mapping):
        return right
    return {**left, **{key: merge(left[key], value) if key in left else value for key, value in right.items()}}


def dump(transforms: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the YAML text of {transform: its keys}."""
    text: str = _yaml().safe_dump({"transforms": {k: dict(v) for k, v in transforms.items()}}, sort_keys=False)
    return text


def _keys(name: Any, keys: Any, where: str) -> dict[str, Any]:
    if not isinstance(keys, dict):
        raise PipelineError(f"{where}: transforms.{name} is {keys!r}; it must be a mapping such as {{enabled: true}}")
    return {str(key): value for key, value in keys.items()}


def _read(path: Path_) -> dict[str, Any]:
    yaml = _yaml()
    try:
        with open(path, encoding="utf-8") as file:
            data = yaml.load(file, Loader=_strict_loader(yaml))
    except OSError as error:
        raise PipelineError(f"cannot read the pipeline {os.fspath(path)}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise PipelineError(f"{os.fspath(path)} is not valid YAML: {' '.join(str(error).split())}") from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise PipelineError(f"{os.fspath(path)} must hold a mapping with the key 'transforms'")
    for key in data:
        if key != "transforms":
            raise PipelineError(
                f"{os.fspath(path)}: unknown key {key!r}{nearest(str(key), ['transforms'])}; "
                "the only key of a pipeline file is 'transforms'"
            )
    transforms = data.get("transforms", {})
    if transforms is None:  # nothing said, as by a file whose lines are commented out: nothing to be merged over others
        return {}
    return {"transforms": _said(transforms)}


def _said(transforms: Any) -> Any:
    """Return the mapping with {} where a transform is only named, which says nothing against what is said of it."""
    if not isinstance(transforms, dict):
        return transforms
    return {name: {} if keys is None else keys for name, keys in transforms.items()}


def _yaml() -> Any:
    try:
        import yaml
    except ImportError as error:
        raise PipelineError("pipelines in YAML need PyYAML: pip install pyyaml") from error
    return yaml


def _strict_loader(yaml: Any) -> type:
    """Return a safe loader that refuses a key said twice, of which YAML readers silently take the last."""

    class Strict(yaml.SafeLoader):  # type: ignore[misc]
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen = set()
            for key_node, _ in node.value:
                if key_node.tag == "tag:yaml.org,2002:merge":  # `<<: *other`, resolved by the base class
                    continue
                key = self.construct_object(key_node, deep=True)
                if key in seen:
                    where = node.start_mark, f"the key {key!r} is there twice", key_node.start_mark
                    raise yaml.constructor.ConstructorError("while reading a mapping", *where)
                seen.add(key)
            return super().construct_mapping(node, deep)

    return Strict
