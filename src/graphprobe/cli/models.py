"""From what a user types to a model and what to capture it with: ``pkg.mod:factory`` or a transformers directory."""

from __future__ import annotations

import importlib
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from graphprobe.capturing import Model
from graphprobe.errors import InputError, nearest

DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True)
class Loaded:
    """A model and the inputs to capture it with."""

    model: Model
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


def from_factory(spec: str) -> Loaded:
    """Call ``pkg.mod:factory``; it returns a model, (model, args) or (model, args, kwargs). Raises InputError."""
    module_name, _, name = spec.partition(":")
    if not module_name or not name:
        raise InputError(
            f"{spec!r} is neither a directory nor of the form pkg.mod:factory; "
            "the factory is a function without arguments that returns (model, args, kwargs)"
        )
    made = _attribute(import_module(module_name), name, spec)
    if callable(made) and not isinstance(made, torch.nn.Module):
        made = made()
    parts = made if isinstance(made, tuple) else (made,)
    if not 1 <= len(parts) <= 3 or not isinstance(parts[0], Model):
        raise InputError(
            f"{spec} gave a {type(made).__name__}; it must give an nn.Module, ExportedProgram or GraphModule, "
            "or a tuple (model, args) or (model, args, kwargs)"
        )
    args = parts[1] if len(parts) > 1 else ()
    kwargs = parts[2] if len(parts) > 2 else {}
    if not isinstance(args, (tuple, list)) or not isinstance(kwargs, dict):
        raise InputError(f"{spec} gave (model, args, kwargs) in which args is no tuple or kwargs is no dict")
    if isinstance(parts[0], torch.export.ExportedProgram) and not args and not kwargs:
        args, kwargs = parts[0].example_inputs or ((), {})
    return Loaded(parts[0], tuple(args), dict(kwargs))


def import_module(name: str) -> Any:
    """Import a module, also from the current directory. Raises InputError where there is none of that name."""
    here = os.getcwd()
    if here not in sys.path:  # as `python -m` does: modules in the current directory are found
        sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
            raise  # the module is there, but something that it imports is not
        raise InputError(
            f"there is no module {error.name!r} (looked in {here} and in the installed packages); "
            "run graphprobe where the module lies, or set PYTHONPATH"
        ) from error


def _attribute(module: Any, name: str, spec: str) -> Any:
    value = module
    for part in name.split("."):
        if not hasattr(value, part):
            raise InputError(f"{spec}: {module.__name__} has no {part!r}{nearest(part, dir(value))}")
        value = getattr(value, part)
    return value


def from_directory(path: str, *, prompt: str | None, length: int, dtype: str, attn: str | None) -> Loaded:
    """Load a transformers model directory with a tokenized `prompt`, or with `length` drawn ids. Raises InputError."""
    if not Path(path, "config.json").is_file():
        raise InputError(f"{path} is no transformers model directory: it has no config.json")
    transformers = _transformers(path)
    try:
        config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
        kind = getattr(transformers, (config.architectures or ["AutoModel"])[0], transformers.AutoModel)
        options = {"attn_implementation": attn} if attn else {}
        model = kind.from_pretrained(path, local_files_only=True, dtype=dtype, **options).eval()
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"transformers cannot load {path}: {error}") from error
    kwargs = _prompt_inputs(transformers, path, prompt) if prompt else _drawn_inputs(model, length, path)
    if hasattr(model.config, "use_cache"):
        kwargs["use_cache"] = False
    return Loaded(model, (), kwargs)


def _transformers(path: str) -> Any:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a directory is all that is asked for
    try:
        import transformers
    except ImportError as error:
        raise InputError(f"{path} needs transformers: pip install 'graphprobe[models]'") from error
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def _prompt_inputs(transformers: Any, path: str, prompt: str) -> dict[str, Any]:
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} has no tokenizer, so --prompt cannot be used: {error}") from error
    encoded = tokenizer(prompt, return_tensors="pt")
    return {name: encoded[name] for name in ("input_ids", "attention_mask") if name in encoded}


def _drawn_inputs(model: Any, length: int, path: str) -> dict[str, Any]:
    if model.main_input_name != "input_ids":
        raise InputError(
            f"{path} takes {model.main_input_name!r}, which cannot be drawn here: give it with --kwargs or --inputs"
        )
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().num_embeddings
    tokens = torch.randint(0, vocabulary, (1, length), generator=generator)
    kwargs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if model.config.is_encoder_decoder:
        kwargs["decoder_input_ids"] = tokens[:, : max(1, length // 2)]
    return kwargs


def to_dtype(loaded: Loaded, name: str) -> Loaded:
    """Cast the model and the floating tensors among its inputs. Raises InputError where it is no plain nn.Module."""
    model, dtype = loaded.model, getattr(torch, name)
    if not isinstance(model, torch.nn.Module) or isinstance(model, torch.fx.GraphModule):
        raise InputError("--dtype casts an nn.Module; a graph that is already captured keeps its dtypes")

    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    return Loaded(
        model.to(dtype),
        torch.utils._pytree.tree_map(cast, loaded.args),
        torch.utils._pytree.tree_map(cast, loaded.kwargs),
    )
