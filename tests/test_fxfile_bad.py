"""``.fx`` files from strangers: whatever the bytes, loading gives one clear sentence, and nothing of theirs runs."""

from __future__ import annotations

import builtins
import functools
import json
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import graphprobe
from fx_tools import bitwise_equal, captured, edit, node_row, read_graph
from graphprobe import fxfile
from graphprobe.errors import FxFileError, GraphprobeError, OperatorError
from graphprobe.fxfile import archive
from models import tiny

CANARY = "graphprobe_canary"


@pytest.fixture(autouse=True)
def nothing_ran() -> Any:
    """No test may set the canary: the hostile files below try to."""
    yield
    assert not hasattr(builtins, CANARY)
    assert "antigravity" not in sys.modules


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "graph.fx"


def saved(path: Path, name: str = "branch") -> Path:
    _, args, kwargs = tiny(name)
    graphprobe.save(captured(name), path, args=args, kwargs=kwargs)
    return path


def refusal(path: Path) -> str:
    """Return the sentence with which the file is refused, after checking that it is one."""
    with pytest.raises(FxFileError) as caught:
        graphprobe.load(path)
    text = str(caught.value)
    assert text.startswith(("there is no file", "cannot read")) or text.startswith(str(path))
    assert "\n" not in text
    assert len(text) < 500
    return text


# --- files that are something else -----------------------------------------------------------------------------------


def foreign_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("word/document.xml", "<w/>")


def bomb(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file, file.open("graph.json", "w") as member:
        for _ in range(archive.MAX_GRAPH_BYTES // (1 << 20) + 1):
            member.write(b" " * (1 << 20))


def deep(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("graph.json", "[" * 1_000_000)


def bare_constant(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("graph.json", '{"format": "graphprobe.fx", "version": NaN}')


STRANGERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda path: None, "there is no file"),
    "a folder": (lambda path: path.mkdir(), "is not a file"),
    "empty": (lambda path: path.write_bytes(b""), "is empty"),
    "text": (lambda path: path.write_text("name: graph"), "is not an .fx file"),
    "a zip": (foreign_zip, r"zip archive without graph\.json \(it holds 'word/document\.xml'\)"),
    "a checkpoint": (lambda path: torch.save({"a": torch.ones(2)}, path), r"zip archive without graph\.json"),
    "other JSON": (lambda path: edit(saved(path), lambda _: {"nodes": []}), "not one of graphprobe's"),
    "newer": (lambda path: edit(saved(path), lambda graph: graph.update(version=99)), "newer graphprobe.*update"),
    "a bomb": (bomb, "more than the .* allowed"),
    "nested without end": (deep, "changed by hand"),
    "bare NaN": (bare_constant, "bare constant NaN"),
}


@pytest.mark.parametrize("kind", STRANGERS)
def test_a_file_that_is_something_else_is_told(kind: str, path: Path) -> None:
    make, wanted = STRANGERS[kind]
    make(path)
    with pytest.raises(FxFileError, match=wanted):
        graphprobe.load(path)
    refusal(path)


# --- files that are damaged ------------------------------------------------------------------------------------------


@functools.cache
def sound(name: str) -> bytes:
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        return saved(Path(folder) / "sound.fx", name).read_bytes()


@settings(max_examples=150, deadline=None)
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_truncated_file_is_refused(tmp_path_factory: pytest.TempPathFactory, share: float) -> None:
    path = tmp_path_factory.getbasetemp() / "short.fx"
    path.write_bytes(sound("branch")[: int(share * len(sound("branch")))])
    refusal(path)


@settings(max_examples=120, deadline=None)
@given(places=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1, max_size=4))
def test_a_file_with_flipped_bits_loads_whole_or_is_refused(
    tmp_path_factory: pytest.TempPathFactory, places: list[tuple[float, int]]
) -> None:
    path = tmp_path_factory.getbasetemp() / "flipped.fx"
    data = bytearray(sound("branch"))
    for share, bits in places:
        data[int(share * len(data))] ^= bits
    path.write_bytes(data)
    try:
        loaded = graphprobe.load(path)
    except GraphprobeError:
        refusal(path)
    else:  # a bit that means nothing, such as a date in the archive
        sound_graph = captured("branch")
        assert graphprobe.view(loaded) == graphprobe.view(sound_graph)
        states = [list(gm.state_dict().values()) for gm in (loaded, sound_graph)]
        assert bitwise_equal(*states)


JUNK = (None, True, 0, -1, 2**70, 1.5, "", "x", "a\nb", '"""', [], {}, [[]], {"n": 0}, {"tuple": 3}, ["Pow", "s0", 99])


def places_in(data: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path of every value inside a JSON document."""
    inner = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [prefix] * bool(prefix) + [place for key, value in inner for place in places_in(value, (*prefix, key))]


def at(data: Any, place: tuple[Any, ...]) -> Any:
    for key in place:
        data = data[key]
    return data


@settings(max_examples=150, deadline=None)
@given(data=st.data(), name=st.sampled_from(["branch", "mlp", "custom"]))
def test_a_file_whose_json_was_changed_is_sound_or_is_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, name: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "changed.fx"
    path.write_bytes(sound(name))
    graph = read_graph(path)
    places = places_in(graph)
    place = data.draw(st.sampled_from(places))
    value = data.draw(st.sampled_from(JUNK) | st.sampled_from(places).map(lambda other: ("copy", other)))
    *home, last = place
    if isinstance(value, tuple):
        value = json.loads(json.dumps(at(graph, value[1])))
    if data.draw(st.booleans()):
        at(graph, tuple(home))[last] = value
    else:
        del at(graph, tuple(home))[last]
    edit(path, lambda _: graph)
    for read in (graphprobe.load, fxfile.load_inputs):
        try:
            loaded = read(path)
        except GraphprobeError as error:
            assert "\n" not in str(error)
            continue
        if isinstance(loaded, torch.fx.GraphModule):
            loaded.graph.lint()
            graphprobe.view(loaded)
            graphprobe.lint(loaded)


# --- files that mean harm --------------------------------------------------------------------------------------------

HARM = f"setattr(__import__('builtins'), '{CANARY}', 1)"


def rows(graph: Any) -> list[Any]:
    return graph["graphs"][0]["nodes"]  # type: ignore[no-any-return]


def first(graph: Any, op: str) -> Any:
    return next(row for row in rows(graph) if row["op"] == op)


def add_kwarg(graph: Any) -> None:
    node_row(graph, "torch.ops.aten.sum.default")["kwargs"] = [[f"x={HARM}, y", 1]]


def rename_attribute(graph: Any) -> None:
    name = f'w"), {HARM}, getattr(self, "w'
    graph["state"][0]["path"] = name
    first(graph, "get_attr")["target"] = name


def rename_argument(graph: Any) -> None:
    first(graph, "placeholder").update(op="call_function", target="torch.ops.aten.ones.default", args=[[4, 16]])
    empty = {"type": "builtins.tuple", "context": "null", "children_spec": []}
    graph["graphs"][0]["call"].update({"names": [f"x={HARM}"], "in": empty})


def rename_keyword(graph: Any) -> None:
    call = graph["graphs"][0]["call"]
    leaf = call["out"]
    context = json.dumps([f"a':{HARM}, 'b"])
    empty = {"type": "builtins.tuple", "context": "null", "children_spec": []}
    keywords = {"type": "builtins.dict", "context": context, "children_spec": [leaf]}
    call["in"] = {"type": "builtins.tuple", "context": "null", "children_spec": [empty, keywords]}


def import_by_defaultdict(graph: Any) -> None:
    context = {"default_factory_module": "antigravity", "default_factory_name": "x", "dict_context": ["a"]}
    leaf = graph["graphs"][0]["call"]["out"]
    graph["graphs"][0]["call"]["out"] = {
        "type": "collections.defaultdict",
        "context": context,
        "children_spec": [leaf],
    }


def import_by_enum(graph: Any) -> None:
    context = json.dumps({"__enum__": True, "fqn": "antigravity:X", "name": "y"}).replace("__enum__", "\\u005f_enum__")
    leaf = graph["graphs"][0]["call"]["out"]
    graph["graphs"][0]["call"]["out"] = {"type": "builtins.tuple", "context": context, "children_spec": [leaf]}


def reserve_the_name_of_a_method(graph: Any) -> None:
    graph["state"][0]["path"] = "forward"
    first(graph, "get_attr")["target"] = "forward"


def refer_forwards(graph: Any) -> None:
    node_row(graph, "torch.ops.aten.sum.default")["args"] = [{"n": len(rows(graph)) - 2}]


def refer_to_itself(graph: Any) -> None:
    index = rows(graph).index(node_row(graph, "torch.ops.aten.sum.default"))
    rows(graph)[index]["args"] = [{"n": index}]


def origins_without_end(graph: Any) -> None:
    graph["origins"] = [["a", "b", 0, []]] + [["a", "b", 0, [i, i]] for i in range(60)]
    rows(graph)[0]["from"] = [60]


def symbol_tower(graph: Any) -> None:
    graph["symbols"]["s0"] = {"hint": 9, "range": [2, None], "sign": "positive", "integer": True}
    graph["vals"][0]["shape"] = [["PowByNatural", ["Add", "s0", 1], 16]]
    graph["vals"][0]["stride"] = [1]


def large_storages(graph: Any) -> None:
    graph["storages"] = [0] * 2_000_000
    for index, row in enumerate(graph["contents"]):
        row["bytes"] = 2**40 + index


HOSTILE: dict[str, Callable[[Any], Any]] = {
    "a node's name": lambda graph: rows(graph)[-2].update(name=f"x = {HARM}; y"),
    "an input's name": lambda graph: first(graph, "placeholder").update(target=f"x={HARM}"),
    "an argument's default": lambda graph: first(graph, "placeholder").update(target="x\n    import antigravity"),
    "a keyword": add_kwarg,
    "an attribute": rename_attribute,
    "an argument of the call": rename_argument,
    "a keyword of the call": rename_keyword,
    "a method in the way": reserve_the_name_of_a_method,
    "a later node": refer_forwards,
    "a node as its own input": refer_to_itself,
    "a weight that is not there": lambda graph: first(graph, "get_attr").update(target="left.nothing"),
    "a graph without output": lambda graph: rows(graph).__delitem__(-1),
    "two nodes of one name": lambda graph: rows(graph)[1].update(name=rows(graph)[0]["name"]),
    "origins without end": origins_without_end,
    "a tower of powers": symbol_tower,
    "storages without end": large_storages,
    "a tensor beyond its memory": lambda graph: graph["tensors"][0].update(shape=[17, 16]),
    "a tensor before its memory": lambda graph: graph["tensors"][0].update(offset=-8),
    "a dtype": lambda graph: graph["tensors"][0].update(dtype="nn"),
    "a device": lambda graph: graph["tensors"][0].update(device="$(reboot)"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_file_is_refused(kind: str, path: Path) -> None:
    edit(saved(path), HOSTILE[kind])
    assert "damaged or was changed by hand" in refusal(path)


@pytest.mark.parametrize("change", [import_by_defaultdict, import_by_enum])
def test_a_structure_imports_nothing(change: Callable[[Any], Any], path: Path) -> None:
    _, args, _ = tiny("branch")
    loaded = graphprobe.load(edit(saved(path), change))
    assert "not known here" in loaded.meta["graphprobe_notes"][0]
    with torch.no_grad():
        assert type(loaded(*args)) in (dict, tuple)


FUNCTIONS = (
    "os.system",
    "builtins.eval",
    "builtins.exec",
    "builtins.__import__",
    "builtins.setattr",
    "builtins.open",
    "operator.attrgetter",
    "operator.methodcaller",
    "operator.call",
    "torch.load",
    "torch.hub.load",
    "torch.from_file",
    "torch.nn.functional.handle_torch_function",
    "torch.ops.load_library",
    "torch.ops.import_module",
    "torch.ops.aten.from_file.default",
    "torch.ops.aten.save.default",
    "torch.ops.debugprims.load_tensor.default",
    "torch.ops.aten.__class__",
    "torch.ops.__class__.__subclasses__",
    "torch.ops.higher_order.__class__",
    "graphprobe.save",
)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_function_that_is_not_allowed_is_never_called(function: str, path: Path) -> None:
    _, args, _ = tiny("branch")

    def change(graph: Any) -> None:
        node_row(graph, "torch.ops.aten.sum.default").update(target=function, args=[HARM])

    loaded = graphprobe.load(edit(saved(path), change))
    with pytest.raises(OperatorError, match="cannot be run"):
        loaded(*args)


@pytest.mark.parametrize(
    ("op", "target", "arguments"),
    [
        ("call_method", "__reduce__", [{"n": 4}]),
        ("call_method", "apply_", [{"n": 4}]),
        ("call_method", "__class__.__subclasses__", [{"n": 4}]),
        ("call_method", "register_hook", [{"n": 4}]),
        ("call_function", "builtins.getattr", [{"n": 4}, "__class__"]),
        ("call_function", "builtins.getattr", [{"n": 4}, "grad_fn"]),
        ("call_function", "builtins.getattr", [{"n": 4}, {"n": 4}]),
    ],
)
def test_no_way_leads_from_a_tensor_to_its_class(op: str, target: str, arguments: list[Any], path: Path) -> None:
    _, args, _ = tiny("branch")

    def change(graph: Any) -> None:
        node_row(graph, "torch.ops.aten.sum.default").update(op=op, target=target, args=arguments)

    loaded = graphprobe.load(edit(saved(path), change))
    with pytest.raises(OperatorError, match="cannot be run"):
        loaded(*args)


def test_metadata_cannot_end_a_comment(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FX_GRAPH_SHOW_META", "1")  # FX then writes metadata into the source that it runs
    text = f'x"""\n    {HARM}\n    """'

    def change(graph: Any) -> None:
        graph["traces"] = [text] * len(graph["traces"])
        graph["lineages"] = [text]
        for row in rows(graph):
            row["meta"] = [["note", {"tuple": [text, {"dict": [[text, text]]}]}]]

    _, args, _ = tiny("branch")
    loaded = graphprobe.load(edit(saved(path), change))
    with torch.no_grad():
        loaded(*args)


def test_metadata_cannot_forge_an_id(path: Path) -> None:
    def change(graph: Any) -> None:
        for row in rows(graph):
            row.pop("id")
            row["custom"] = [["graphprobe", "no id"]]
            row["meta"] = [["val", 3], ["nn_module_stack", 4]]

    view = graphprobe.view(graphprobe.load(edit(saved(path), change)))
    assert {node.id for node in view.nodes} == {""}
    assert {node.module_path for node in view.nodes} <= {""}


def test_a_short_tensor_file_is_refused(path: Path) -> None:
    saved(path)
    with zipfile.ZipFile(path) as file:
        graph, tensors = file.read("graph.json"), file.read("tensors.safetensors")
    for cut in (0, 4, 8, 40, len(tensors) - 1):
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("graph.json", graph)
            file.writestr("tensors.safetensors", tensors[:cut])
        refusal(path)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("graph.json", graph)
    assert "tensors.safetensors is missing" in refusal(path)
