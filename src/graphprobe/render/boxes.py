"""One box for one group of operations, and the clusters around the boxes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from collections.abc import Set as Collection
from dataclasses import dataclass, field

from graphprobe.render import labels
from graphprobe.render.folding import Group, group_of
from graphprobe.render.heat import AGREED_LINE, HATCH
from graphprobe.render.numbers import count
from graphprobe.render.roles import COLOURS, NO_VALUE, SPINE, module_role, role_of, rotary_nodes
from graphprobe.render.scene import Box, Frame, Key, Line, Link, stripes
from graphprobe.render.spine import adds, spine_of
from graphprobe.render.wiring import Wiring

_CLUSTER_FILLS = ("#fafafa", "#f1f3f5", "#e8ebee", "#dfe3e7")


@dataclass(frozen=True)
class Overlay:
    """What to write on a picture of a graph: for each node's name some lines, and a fill."""

    lines: Mapping[str, Sequence[str]] = field(default_factory=dict)
    fills: Mapping[str, str] = field(default_factory=dict)
    title: str = ""
    legend: tuple[Key, ...] = ()
    micros: Mapping[str, float] = field(default_factory=dict)  # time of an operation's kernels, summed for a layer
    hatched: Collection[str] = frozenset()  # names whose boxes are striped: their error came from above


@dataclass
class Canvas:
    """What is known while a picture is put together."""

    wiring: Wiring
    groups: list[Group]
    overlay: Overlay
    roles: dict[str, str]  # group id -> role
    owner: dict[str, Group]  # operation -> its group
    spine: set[str]  # the operations of the residual stream
    boxes: list[Box] = field(default_factory=list)
    links: list[Link] = field(default_factory=list)
    red: bool = False


def canvas_of(wiring: Wiring, names: Sequence[str], groups: list[Group], overlay: Overlay | None) -> Canvas:
    """Start a picture of the operations `names`, grouped as `groups`."""
    roles = group_roles(wiring, groups)
    return Canvas(wiring, groups, overlay or Overlay(), roles, group_of(groups), spine_of(wiring, names))


def group_roles(wiring: Wiring, groups: Sequence[Group]) -> dict[str, str]:
    """Return each group's role, keyed by its id."""
    rotary = rotary_nodes(wiring, [n for g in groups for n in g.members])
    roles = {}
    for group in groups:
        if group.kind == "module":
            roles[group.id] = module_role(wiring, group.path) or "other"
        elif group.kind == "run":
            roles[group.id] = "other"
        else:
            name = group.members[0]
            roles[group.id] = "rotary" if name in rotary else role_of(wiring, name)
    return roles


def operation_box(canvas: Canvas, group: Group, asked: str = "") -> Box:
    """Draw one group: what it is, its weights, its output's shape and dtype, and what the overlay has to say.

    The box of the operation `asked` for by name has a thick border.
    """
    wiring = canvas.wiring
    role = canvas.roles[group.id]
    colour = COLOURS[role]
    stream = not canvas.spine.isdisjoint(group.members)
    lines = _words(wiring, group, role, stream)
    missing = [n for n in group.members if not wiring.node(n).has_val]
    if missing:
        canvas.red = True
        colour = NO_VALUE
        lines.append(Line('no meta["val"]' + (f" on {len(missing)}" if len(group.members) > 1 else ""), "small"))
    for name in group.members:
        lines.extend(Line(text, "small") for text in canvas.overlay.lines.get(name, ()))
    fills = [canvas.overlay.fills[n] for n in group.members if n in canvas.overlay.fills]
    fill = fills[-1] if fills and not missing else colour.fill
    small = role == "view" and group.kind in ("op", "views") and not missing and not fills
    hatched = not missing and not canvas.overlay.hatched.isdisjoint(group.members)
    if fills:  # grey words would drown in a dark fill
        lines = [dataclasses.replace(line, colour="#000000") for line in lines]
    return Box(
        id=group.id,
        lines=tuple(lines),
        fill=stripes(HATCH) if hatched else fill,
        border=AGREED_LINE if hatched else SPINE if stream and not missing else colour.line,
        width=3.0 if asked in group.members else 2.0 if stream or missing else 1.0,
        shape="box",
        style=_style(role, small, hatched),
        tooltip=tooltip(wiring, group),
        cluster=_cluster(group),
        # the modules of a stack stand below one another; inside a layer the stream runs beside its branches
        column="spine" if stream and group.kind == "module" else "",
    )


def _style(role: str, small: bool, hatched: bool) -> str:
    if hatched:
        return "striped"
    return "rounded" if small else "rounded,filled,dashed" if role == "cast" else "rounded,filled"


def _words(wiring: Wiring, group: Group, role: str, stream: bool) -> list[Line]:
    last = wiring.node(group.members[-1])
    if group.kind in ("module", "run"):
        amount = count(sum(1 for n in group.members if not wiring.node(n).is_view), "operation")
        if group.kind == "module":
            kind = Line(wiring.kinds.get(group.path, ""))
            return [Line(_numbered(group.path), "title"), kind, Line(amount, "small", "#555555")]
        of = f" of {_numbered(group.path)}" if group.path else ""
        span = f"{group.members[0]} to {group.members[-1]}"
        return [Line(amount + of, "title"), Line(labels.clip(span), "small", "#555555")]
    shape = labels.shape_line(last)
    if role == "view":
        ops = " · ".join(labels.short_op(wiring.node(n)) for n in group.members)
        text = labels.title(wiring, group.members[0]) if len(group.members) == 1 else labels.clip(ops)
        return [Line(text, "small", "#444444"), Line(shape, "small", "#444444")]
    name = group.members[0]
    folded = [*labels.weight_lines(wiring, name), labels.detail_line(wiring, name)]
    weights = [Line(text, "plain", "#444444") for text in folded]
    text = "outputs" if last.op == "output" else labels.title(wiring, name)
    if stream and adds(wiring, name):
        text = f"{text} (residual)"
    return [Line(text, "title"), *weights, Line(shape, "plain", "#222222")]


def _numbered(path: str) -> str:
    parts = path.split(".")
    return ".".join(parts[-2:]) if parts[-1].isdigit() else parts[-1]


def tooltip(wiring: Wiring, group: Group) -> str:
    """Return what hovering over a box tells: its operations, the call, module and source line."""
    if group.kind in ("module", "run"):
        return f"{group.path or 'root'}: {group.members[0]} to {group.members[-1]}"
    node = wiring.node(group.members[-1])
    words = [", ".join(group.members), node.target, node.args, wiring.place[node.name]]
    return "\n".join(w for w in [*words, node.source] if w)


def _cluster(group: Group) -> tuple[str, ...]:
    parts = group.path.split(".") if group.path else []
    if group.kind == "module":
        parts = parts[:-1]
    return tuple(".".join(parts[: end + 1]) for end in range(len(parts)))


def arrange(canvas: Canvas, boxes: Sequence[Box], base: str) -> tuple[list[Box], dict[tuple[str, ...], Frame]]:
    """Keep the clusters that hold two operations or more and say more than the one around them; give each its frame."""
    counts: dict[str, int] = {}
    for box in boxes:
        for module in box.cluster:
            counts[module] = counts.get(module, 0) + (canvas.roles.get(box.id) != "view")
    kept: list[Box] = []
    frames: dict[tuple[str, ...], Frame] = {}
    for box in boxes:
        path: tuple[str, ...] = ()
        around = len(boxes) + 1
        for module in box.cluster:
            if counts[module] >= 2 and (counts[module] < around or module == base) and not _beyond(module, base):
                path = (*path, module)
                frames.setdefault(path, _frame(canvas.wiring, path))
                around = counts[module]
        kept.append(dataclasses.replace(box, cluster=path))
    return kept, frames


def _beyond(module: str, base: str) -> bool:
    return bool(base) and not (module == base or module.startswith(base + "."))


def _frame(wiring: Wiring, path: tuple[str, ...]) -> Frame:
    module = path[-1]
    kind = wiring.kinds.get(module, "")
    title = module if len(path) == 1 else module.removeprefix(path[-2] + ".")
    lines = (Line(f"{title}  {kind}".strip(), "title", "#333333"),)
    return Frame(lines, _CLUSTER_FILLS[min(len(path) - 1, len(_CLUSTER_FILLS) - 1)])
