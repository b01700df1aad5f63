"""Hidden states: the figures against their definitions, the words that say what a plot shows, the plots as files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphprobe.errors import RenderError
from graphprobe.render.plots import KINDS, plot_states
from graphprobe.render.states import States, compare_states, states_text

numpy = pytest.importorskip("numpy")
LAYERS, TOKENS, HIDDEN = 6, 5, 16
NAMES = [f"model.layers.{i}" for i in range(LAYERS)]


def stream(flat: int | None = None, noise_from: int | None = None, noise: float = 0.5) -> list[Any]:
    """Return the hidden states of some layers; one layer may add nothing, and noise may come in at another."""
    draw = numpy.random.default_rng(0)
    states = [draw.normal(size=(1, TOKENS, HIDDEN))]
    for layer in range(1, LAYERS):
        step = draw.normal(size=(1, TOKENS, HIDDEN)) * 0.3
        other = draw.normal(size=(1, TOKENS, HIDDEN)) * noise
        state = states[-1] + (0 if layer == flat else step) + (other if layer == noise_from else 0)
        states.append(state)
    return states


def test_equal_states_have_no_error_and_full_correlation() -> None:
    states = compare_states(NAMES, stream(), stream())
    for layer in states.layers:
        assert set(layer.error) == {0.0} and len(layer.error) == TOKENS
        assert all(value == pytest.approx(1) for value in layer.correlation if value is not None)
        assert sum(layer.counts_before) == sum(layer.counts_after) == TOKENS * HIDDEN
    assert states.layers[0].step_before == () and len(states.layers[1].step_before) == TOKENS
    assert states_text(states).startswith("the hidden states of 6 layers agree")


@given(st.floats(0.01, 100), st.floats(-3, 3))
@settings(max_examples=30, deadline=None)
def test_figures_follow_their_definitions(scale: float, shift: float) -> None:
    x = numpy.random.default_rng(1).normal(size=(TOKENS, HIDDEN))
    y = scale * x + shift
    layer = compare_states(["x"], [x], [y]).layers[0]
    for token in range(TOKENS):
        assert layer.correlation[token] == pytest.approx(1)
        assert layer.rms_after[token] == pytest.approx(math.sqrt((y[token] ** 2).mean()))
        wanted = math.sqrt(((y - x)[token] ** 2).sum() / (x[token] ** 2).sum())
        assert layer.error[token] == pytest.approx(wanted)


def test_a_block_that_adds_nothing_on_one_side_is_said_in_the_first_words() -> None:
    states = compare_states(NAMES, stream(), stream(flat=3))
    assert [layer.adds_nothing for layer in states.layers] == ["", "", "", "after", "", ""]
    text = states_text(states)
    assert text.startswith("model.layers.3 adds nothing in after") and "part in model.layers.3" in text
    assert states_text(compare_states(NAMES, stream(flat=3), stream())).startswith(
        "model.layers.3 adds nothing in before"
    )
    assert "in either version" in states_text(compare_states(NAMES, stream(flat=3), stream(flat=3)))


def test_the_text_names_where_states_part_and_the_token() -> None:
    after = stream()
    after[4][0, 2] *= 3
    states = compare_states(NAMES, stream(), after, tokens=["The", "capital", "of", "France", "is"])
    assert states_text(states).splitlines()[0].startswith("the hidden states part in model.layers.4, at token 2 'of'")
    assert max(len(line) for line in states_text(states).splitlines()) <= 100


def test_nan_and_constant_states_are_told_apart() -> None:
    after = stream()
    after[2][0, 1, 3] = numpy.nan
    states = compare_states(NAMES, stream(), after)
    assert math.isnan(states.layers[2].error[1]) and states.layers[2].correlation[1] is None
    assert "part in model.layers.2, at token 1" in " ".join(states_text(states).split())
    constant = compare_states(["x"], [numpy.ones((2, 4))], [numpy.ones((2, 4))]).layers[0]
    assert constant.correlation == (None, None) and constant.error == (0.0, 0.0)


def test_states_that_do_not_fit_are_refused() -> None:
    with pytest.raises(RenderError, match="6 layers, 6 states before and 5 after"):
        compare_states(NAMES, stream(), stream()[:-1])
    with pytest.raises(RenderError, match=r"states of x are \(2, 4\) before and \(2, 3\) after"):
        compare_states(["x"], [numpy.ones((2, 4))], [numpy.ones((2, 3))])


@pytest.fixture
def parted() -> States:
    pytest.importorskip("matplotlib")
    after = stream(flat=3, noise_from=4)
    after[5][0, 0, 0] = numpy.inf
    return compare_states(NAMES, stream(), after, tokens=["$x$", "", "a" * 40])


@pytest.mark.parametrize("kind", [*KINDS, "all"])
def test_every_plot_is_written(parted: States, tmp_path: Path, kind: str) -> None:
    kinds = KINDS if kind == "all" else (kind,)
    plot_states(parted, tmp_path / "p.png", kinds=kinds)
    plot_states(parted, tmp_path / "p.svg", kinds=kinds, layer="model.layers.1")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "p.svg").read_text()


def test_wrong_wishes_get_one_clear_sentence(parted: States, tmp_path: Path) -> None:
    with pytest.raises(RenderError, match=r"did you mean 'model\.layers\.1'"):
        plot_states(parted, tmp_path / "p.png", layer="model.layer.1")
    with pytest.raises(RenderError, match="no plot is called 'pie'"):
        plot_states(parted, tmp_path / "p.png", kinds=["pie"])
    with pytest.raises(RenderError, match=r"name it \.png or \.svg"):
        plot_states(parted, tmp_path / "p.jpg")
    with pytest.raises(RenderError, match="no hidden states"):
        plot_states(States(()), tmp_path / "p.png")
    assert list(tmp_path.iterdir()) == []
