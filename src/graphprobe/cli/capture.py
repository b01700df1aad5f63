"""``graphprobe capture``: a model becomes an .fx file."""

from __future__ import annotations

import argparse
import os
import sys
import time
from typing import TYPE_CHECKING, Any

from graphprobe.cli import output
from graphprobe.errors import InputError, nearest

if TYPE_CHECKING:
    from torch.fx import GraphModule

    from graphprobe.cli.models import Loaded

SUMMARY = "write a model as an .fx file: its graph, its weights and its inputs"
DESCRIPTION = """\
Export a model with torch.export and write its graph, weights and inputs as one .fx file, the form that the other
commands read. Every operation gets an id that survives graph transforms, so that two versions can be aligned later.

SPEC says which model:
  pkg.mod:factory   a function without arguments that returns (model, args, kwargs), (model, args) or a model;
                    modules in the current directory are found
  path/to/model     a directory of a transformers model (config.json and safetensors)
"""
EXAMPLES = """\
  graphprobe capture my_models:with_fusion -o after.fx
  graphprobe capture ./SmolLM2 --prompt "The capital of France is" --dtype bfloat16 -o before.fx
  graphprobe capture ./SmolLM2 --attn eager --length 32 --weights reference -o eager.fx
  graphprobe capture my_models:net --args '[[[0.5, 1.0]]]' --dynamic x:0 -o net.fx
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("spec", metavar="SPEC", help="pkg.mod:factory, or a transformers model directory")
    parser.add_argument("-o", "--output", metavar="FILE", required=True, help="the .fx file to write")
    parser.add_argument(
        "--weights",
        choices=("store", "reference", "none"),
        default="store",
        help="put the weights into the file, refer to the directory's safetensors files, or leave them out (store)",
    )
    configure_inputs(parser)


def configure_inputs(parser: argparse.ArgumentParser) -> None:
    """Add the options by which a SPEC becomes a model with inputs: those that `load` reads."""
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16", "float64"), help="cast the model to this")
    given = parser.add_argument_group("inputs (default: what the factory returns, else drawn)")
    given.add_argument("--args", metavar="JSON", help="positional inputs, a JSON list; lists of numbers become tensors")
    given.add_argument("--kwargs", metavar="JSON", help="named inputs, a JSON object; added to those that are there")
    given.add_argument("--inputs", metavar="FILE", help="inputs from a .json, .safetensors, .npz, .pt or .fx file")
    given.add_argument(
        "--dynamic",
        metavar="NAME:DIM",
        action="append",
        default=[],
        help="keep this dimension of an input symbolic; may be given several times",
    )
    folder = parser.add_argument_group("for a transformers directory")
    folder.add_argument("--prompt", metavar="TEXT", help="text for the model's own tokenizer")
    folder.add_argument("--length", type=int, metavar="N", help="number of drawn token ids without a prompt (16)")
    folder.add_argument("--attn", choices=("eager", "sdpa"), help="the attention implementation")


def run(options: argparse.Namespace) -> int:
    """Capture and save. Raises CaptureError, InputError, FxFileError."""
    import graphprobe

    start = time.monotonic()
    output.check_target(options.output)
    loaded = load(options)
    shapes = dynamic_shapes(loaded, options.dynamic)
    gm = graphprobe.capture(loaded.model, loaded.args, loaded.kwargs, dynamic_shapes=shapes)
    _save(gm, loaded, options)
    result = {
        "file": options.output,
        "operations": sum(node.op == "call_function" for node in gm.graph.nodes),
        "nodes": len(gm.graph.nodes),
        "bytes": os.path.getsize(options.output),
        "seconds": round(time.monotonic() - start, 2),
    }
    for item in _specialised(gm, options.dynamic):
        print(f"graphprobe: --dynamic {item}: the model fixes this dimension, so it is not symbolic", file=sys.stderr)
    if any(_differs_in_training(m) for m in getattr(loaded.model, "modules", list)()):
        print("graphprobe: the model is in training mode, and captured so; call .eval() on it first", file=sys.stderr)
    if options.json:
        output.print_json(result)
    else:
        megabytes = result["bytes"] / 1e6
        print(f"{options.output}: {result['operations']} operations, {megabytes:.1f} MB, {result['seconds']:.1f} s")
    return 0


def _differs_in_training(module: Any) -> bool:
    """Whether a module computes otherwise in training: dropout that drops, a norm that measures its batch."""
    name = type(module).__name__
    return bool(module.training) and ("BatchNorm" in name or ("Dropout" in name and getattr(module, "p", 0) > 0))


def _specialised(gm: GraphModule, wanted: list[str]) -> list[str]:
    """Return those of the dimensions asked for that did not stay symbolic."""
    from graphprobe import nodes
    from graphprobe.calling import input_paths

    paths = input_paths(gm)
    fixed = []
    for item in wanted:
        name, _, dim = item.rpartition(":")
        shape = nodes.shape(paths[name]) if name in paths else None
        if shape is not None and str(shape[int(dim)]).isdecimal():
            fixed.append(item)
    return fixed


def _save(gm: GraphModule, loaded: Loaded, options: argparse.Namespace) -> None:
    from pathlib import Path

    import graphprobe

    shards = sorted(str(p) for p in Path(options.spec).glob("*.safetensors"))
    if options.weights == "reference" and not shards:
        raise InputError("--weights reference needs a directory with safetensors files as SPEC; use --weights store")
    given = bool(loaded.args or loaded.kwargs)  # a graph may come without: then they are drawn later
    graphprobe.save(
        gm,
        options.output,
        args=loaded.args if given else None,
        kwargs=loaded.kwargs if given else None,
        weights=None if options.weights == "none" else options.weights,
        weights_from=shards if options.weights == "reference" else None,
    )


def load(options: argparse.Namespace) -> Loaded:
    """Return the model that the options name, with its inputs. Raises InputError."""
    return _with_inputs(options, _load(options))


def _load(options: argparse.Namespace) -> Loaded:
    from graphprobe.cli import models

    if os.path.isdir(options.spec):
        if options.length is not None and options.length < 1:
            raise InputError(f"--length must be at least 1, not {options.length}")
        return models.from_directory(
            options.spec,
            prompt=options.prompt,
            length=options.length or 16,
            dtype=options.dtype or "auto",
            attn=options.attn,
        )
    for name in ("prompt", "length", "attn"):
        if getattr(options, name) is not None:
            raise InputError(f"--{name} is for a transformers model directory, and {options.spec} is none")
    loaded = models.from_factory(options.spec)
    return models.to_dtype(loaded, options.dtype) if options.dtype else loaded


def _with_inputs(options: argparse.Namespace, loaded: Loaded) -> Loaded:
    from graphprobe.cli import inputs
    from graphprobe.cli.models import Loaded

    args, kwargs = loaded.args, loaded.kwargs
    if options.inputs:
        args, kwargs = inputs.inputs_from_file(options.inputs)
    if options.args:
        args = tuple(_expect(list, inputs.from_json(options.args, "--args"), "--args must be a JSON list: [...]"))
    if options.kwargs:
        more = inputs.from_json(options.kwargs, "--kwargs")
        kwargs = {**kwargs, **_expect(dict, more, '--kwargs must be a JSON object: {"name": ...}')}
    return Loaded(loaded.model, args, kwargs)


def _expect(kind: type, value: Any, message: str) -> Any:
    if not isinstance(value, kind):
        raise InputError(message)
    return value


def dynamic_shapes(loaded: Loaded, wanted: list[str]) -> dict[str, Any] | None:
    """Turn ["input_ids:1", ...] into torch.export's dynamic_shapes for these inputs. Raises InputError."""
    import inspect

    import torch

    if not wanted:
        return None
    model = loaded.model
    if not isinstance(model, torch.nn.Module) or isinstance(model, torch.fx.GraphModule):
        raise InputError("--dynamic is for an nn.Module; a graph that is already captured keeps its shapes")
    dims: dict[str, dict[int, Any]] = {}
    for item in wanted:
        name, _, dim = item.rpartition(":")
        if not name or not dim.isdecimal():
            raise InputError(f"--dynamic takes NAME:DIM, such as input_ids:1, not {item!r}")
        dims.setdefault(name, {})[int(dim)] = torch.export.Dim.AUTO
    try:
        bound = inspect.signature(model.forward).bind(*loaded.args, **loaded.kwargs)
    except TypeError as error:
        raise InputError(f"the inputs do not fit {type(model).__name__}.forward: {error}") from error
    used: set[str] = set()
    for name, wanted_dims in dims.items():
        value = bound.arguments.get(name)
        if isinstance(value, torch.Tensor) and max(wanted_dims) >= value.dim():
            raise InputError(f"--dynamic {name}:{max(wanted_dims)}: the input has the shape {tuple(value.shape)}")
    shapes = {name: _shape_of(name, value, dims, used) for name, value in bound.arguments.items()}
    for name in dims.keys() - used:
        raise InputError(f"--dynamic names the input {name!r}, which is not given{nearest(name, bound.arguments)}")
    return shapes


def _shape_of(name: str, value: Any, dims: dict[str, dict[int, Any]], used: set[str]) -> Any:
    if name in dims:
        used.add(name)
        return dims[name]
    if isinstance(value, dict):  # forward(**kwargs), or a dict of tensors
        return {key: _shape_of(str(key), v, dims, used) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_shape_of("", v, dims, used) for v in value)
    return None
