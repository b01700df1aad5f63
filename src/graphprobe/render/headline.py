"""The first line of a report: the verdict and the place; and what to do where there is no answer."""

from __future__ import annotations

import math

from graphprobe.records import SMALL_REGION, Finding, Report
from graphprobe.render.numbers import WIDTH, clip_line, count, error, flat, hang, share
from graphprobe.render.places import layer_prefix

#: What each verdict says of the place it names.
_SAYS = {
    "identical": "is bitwise the same",
    "rounding": "differs by rounding only",
    "unknown": "could not be judged",
    "quantization": "is quantised, within the bounds of its codes",
    "precision": "computes the same function too coarsely",
    "semantic": "computes another function",
    "nonfinite": "makes NaN or infinity of finite inputs",
    "structural": "does not fit",
}


def headline(report: Report) -> str:
    """Return the one line that says what matters: the verdict, the layer, the module and the operation."""
    first = report.first
    if first is not None:
        said = [flat(f"{report.verdict}: {where}{words}") for words in _says(first) for where in places(first)]
        return next((line for line in said if len(line) <= WIDTH), clip_line(said[-1]))
    if report.verdict == "identical":
        return f"identical: all {count(len(report.outputs), 'output')} bitwise equal"
    if report.verdict == "rounding":
        errors = [row.error for row in report.outputs if row.error is not None]
        by = f"; the outputs differ by {error(max(errors))}" if errors else ""
        return f"rounding: both graphs compute the same function{by}"
    if report.verdict == "unknown" and not report.coverage.compared and report.coverage.unknown:
        return f"unknown: nothing was compared, for {count(report.coverage.unknown, 'operation')} could not be judged"
    if report.verdict == "unknown" and not report.coverage.compared:
        return "unknown: nothing was compared, for no output of the graphs needs an operation that makes a tensor"
    if report.verdict == "unknown" and report.coverage.resolution >= report.min_coverage:
        return "unknown: what matters could not be compared or judged; the notes below say why"
    if report.verdict == "unknown":
        needed = share(report.min_coverage)
        return f"unknown: too little could be judged (resolution {share(report.coverage.resolution)}, needed {needed})"
    return clip_line(f"{report.verdict}: the outputs differ and no single operation was found to be the cause")


def _says(finding: Finding) -> list[str]:
    """Return what is to be said of the place, in words of its own where it has any."""
    own = [f": {finding.hint}"] if finding.hint and finding.introduced is None else []
    return [*own, f" {_SAYS.get(finding.kind, '')}"]


def next_step(report: Report) -> str:
    """Say of a report without an answer what agrees, what was too large to be judged closely, and what can be done."""
    found = report.coverage
    if report.verdict != "unknown" or not found.compared or found.resolution >= report.min_coverage:
        return ""
    agrees = "nothing speaks against after, but " if not found.unknown else ""
    largest = f" (the largest: {found.largest})" if found.largest else ""
    accepted = math.floor(found.resolution * 100) / 100
    return "\n".join(
        hang(
            "next: ",
            f"{agrees}too many operations lie in no region, or in one of more than {SMALL_REGION}{largest}. "
            f"`graphprobe align` lists what has no partner; --min-coverage {accepted:g} accepts it as it is.",
        )
    )


def places(finding: Finding) -> list[str]:
    """Return where a finding is, in fewer and fewer words: layer, module, operation and operator first."""
    prefix = layer_prefix(finding.module_path)
    layer = f"layer {prefix.rpartition('.')[2]}" if prefix else ""
    operation = finding.culprit or (finding.after or finding.before or ("",))[-1]
    named = f"{operation} ({finding.op})" if operation and finding.op != operation else operation or finding.op
    if not finding.located and finding.outputs[1]:  # too large for one of its operations to be named
        operation = f"the region that ends in {finding.outputs[1]}"
        named = f"{operation} ({count(len(finding.after), 'operation')})"
    path = finding.module_path
    choices = ((layer, path, named), (layer, path, operation), (path, operation), (layer, operation))
    return [", ".join(word for word in words if word) for words in choices]
