"""What holds of every transform of the library: the operators, the numbers, the metadata, and what is left alone."""

from __future__ import annotations

import pytest
import torch

from transform_cases import CASES, Case

RUNS = [pytest.param(case, name, id=f"{case.transform}-{name}") for case in CASES for name in case.models]
COUNTED = [run for run, (case, _) in ((run, run.values) for run in RUNS) if case.matches is not None]
SLOW = {"mistral", "mixtral"}  # which have the attention and the norms of llama
IN_DTYPES = [
    pytest.param(
        case,
        name,
        dtype,
        id=f"{case.transform}-{name}-{str(dtype).removeprefix('torch.')}",
        marks=pytest.mark.slow if name in SLOW else (),
    )
    for case in CASES
    for name in case.models
    for dtype in case.dtypes
]
LEFT_ALONE = [
    pytest.param(case, name, why, id=f"{case.transform}-{name}") for case in CASES for name, why in case.alone.items()
]


@pytest.mark.parametrize(("case", "name"), COUNTED)
def test_exactly_the_pattern_is_replaced(case: Case, name: str) -> None:
    case.check_operators(name)


@pytest.mark.parametrize(("case", "name", "dtype"), IN_DTYPES)
def test_it_differs_by_rounding_at_most(case: Case, name: str, dtype: torch.dtype) -> None:
    assert case.verdict(name, dtype) in case.verdicts


@pytest.mark.parametrize(("case", "name"), RUNS)
def test_metadata_is_complete_and_fresh(case: Case, name: str) -> None:
    case.check_metadata(name)


@pytest.mark.parametrize(("case", "name", "why"), LEFT_ALONE)
def test_models_without_the_pattern_are_left_alone(case: Case, name: str, why: str) -> None:
    case.check_left_alone(name, why)
