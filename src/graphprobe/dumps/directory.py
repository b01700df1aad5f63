"""A directory of dumps being written: after each transform a ``.txt`` in AutoDeploy's form and an ``.fx`` beside it.

``graphprobe-dumps.json`` lists the files that are ours. Only those are ever removed, and a directory that holds
anything else is refused.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule

from graphprobe import fxfile
from graphprobe.dumps import page, writing
from graphprobe.dumps.names import INDEX, MANIFEST, RUN
from graphprobe.errors import DumpError
from graphprobe.foreign import autodeploy
from graphprobe.records import GraphView, Report, RunReport, RunStep

_FORMAT = "graphprobe.dumps"
_UNFIT = re.compile(r"[^\w.-]+")


@dataclass
class DumpDirectory:
    """The dumps of one run; `path` exists and holds nothing but its files."""

    path: Path
    weights: bool = True
    files: list[str] = field(default_factory=list)
    _count: int = 0
    _last_fx: str = ""
    _kept: dict[int, Any] = field(default_factory=dict)  # id -> (weight in a file, its version); held to keep its id
    _sources: list[Path] = field(default_factory=list)

    @staticmethod
    def open(path: Path, *, weights: bool = True) -> DumpDirectory:
        """Make the directory, or remove the dumps of an earlier run. Raises DumpError where it holds other files."""
        try:
            path.mkdir(parents=True, exist_ok=True)
            for name in _ours(path):
                (path / name).unlink(missing_ok=True)
        except OSError as error:
            raise DumpError(f"cannot use {path} for dumps: {error.strerror or error}") from error
        directory = DumpDirectory(path, weights)
        directory._claim()
        return directory

    def write(
        self,
        gm: GraphModule,
        stage: str,
        transform: str,
        step: RunStep | None = None,
        *,
        changed: bool = True,
        written: Sequence[str] = (),
    ) -> str:
        """Write the graph after a transform and return the name of the ``.txt``; `changed` says whether it differs
        from the one before, `written` names the weights that are the same tensors with other values. Raises DumpError,
        FxFileError.
        """
        for path, tensor in (*gm.named_parameters(), *gm.named_buffers()):
            if path in written:
                self._kept.pop(id(tensor), None)
        self._count += 1
        stem = f"{self._count:03d}_{stage}_{_UNFIT.sub('_', transform)}"
        self._claim(f"{stem}.txt", f"{stem}.fx")
        self._write(f"{stem}.txt", autodeploy.text(writing.dump_of(gm, transform, stage)))
        if changed or written or not self._last_fx:
            self._save(gm, stem)
        else:
            shutil.copyfile(self.path / self._last_fx, self.path / f"{stem}.fx")
        self._last_fx = f"{stem}.fx"
        if step is not None and step.report is not None:
            self._claim(f"{stem}.report.json")
            self._write(f"{stem}.report.json", step.report.to_json() + "\n")
        return f"{stem}.txt"

    def close(self, report: RunReport) -> None:
        """Write ``run.json`` and ``index.html``."""
        self._claim(RUN, INDEX)
        self._write(RUN, _slim(report).to_json() + "\n")
        self._write(INDEX, page.html(report, self.files))

    def _save(self, gm: GraphModule, stem: str) -> None:
        target = self.path / f"{stem}.fx"
        if not self.weights:
            fxfile.save(gm, target, weights=None)
            return
        self._keep_weights(gm, stem)
        if self._sources and any(True for _ in (*gm.parameters(), *gm.buffers())):
            fxfile.save(gm, target, weights="reference", weights_from=self._sources)
        else:
            fxfile.save(gm, target)

    def _keep_weights(self, gm: GraphModule, stem: str) -> None:
        """Write the weights that are in no file yet into one of their own, so that dumps share what they share."""
        from safetensors.torch import save_file

        fresh = {
            path: tensor.detach()
            for path, tensor in (*gm.named_parameters(), *gm.named_buffers())
            if self._is_new(tensor) and tensor.device.type != "meta" and tensor.layout is torch.strided
        }
        if not fresh:
            return
        self._claim(f"{stem}.safetensors")
        # the format wants whole tensors that share no memory
        whole = {path: tensor.contiguous().clone() for path, tensor in fresh.items()}
        save_file(whole, self.path / f"{stem}.safetensors")
        self._kept |= {id(tensor): (tensor, _version(tensor)) for tensor in (*gm.parameters(), *gm.buffers())}
        self._sources.append(self.path / f"{stem}.safetensors")

    def _is_new(self, tensor: torch.Tensor) -> bool:
        return id(tensor) not in self._kept or self._kept[id(tensor)][1] != _version(tensor)

    def _claim(self, *names: str) -> None:
        """List files as ours before they are made, so that an interrupted run leaves nothing that is nobody's."""
        self.files += names
        partial = self.path / f".{MANIFEST}"
        self._write(partial.name, json.dumps({"format": _FORMAT, "version": 1, "files": self.files}, indent=1) + "\n")
        os.replace(partial, self.path / MANIFEST)

    def _write(self, name: str, text: str) -> None:
        try:
            (self.path / name).write_text(text, encoding="utf-8")
        except OSError as error:
            raise DumpError(f"cannot write {self.path / name}: {error.strerror or error}") from error


def _version(tensor: torch.Tensor) -> int:
    """Return how often the tensor has been written into, as far as torch counts."""
    return 0 if tensor.is_inference() else tensor._version


def _slim(report: RunReport) -> RunReport:
    """Return the run without the graphs and regions of its comparisons, which have files of their own."""

    def slim(one: Report | None) -> Report | None:
        nothing = GraphView()
        return one and replace(one, regions=(), claims=(), before=nothing, after=nothing)

    steps = tuple(replace(step, report=slim(step.report)) for step in report.steps)
    return replace(report, report=slim(report.report), steps=steps)


def _ours(path: Path) -> list[str]:
    """Return the names of the files in a directory, all of which an earlier run has listed as its own."""
    present = sorted(os.listdir(path))
    if not present:
        return []
    listed = {MANIFEST, f".{MANIFEST}", *_listed(path / MANIFEST)}
    for name in present:
        if name not in listed or not (path / name).is_file():
            raise DumpError(
                f"{path} holds {name}, which graphprobe has not written: dumps go into a directory of their own. "
                "Give a new or empty one, or clear this one yourself"
            )
    return present


def _listed(manifest: Path) -> set[str]:
    try:
        data = json.loads(manifest.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return set()
    known = isinstance(data, dict) and data.get("format") == _FORMAT and isinstance(data.get("files"), list)
    return {name for name in data["files"] if isinstance(name, str)} if known else set()
