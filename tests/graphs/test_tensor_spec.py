from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeflow.errors import GraphError
from pipeflow.graphs import TensorSpec


def test_sizes_follow_the_batch() -> None:
    spec = TensorSpec(("4*B", 3), "float16")
    assert spec.shape_at(5) == (20, 3)
    assert spec.bytes_at(5) == 120
    assert spec.scales
    assert str(spec) == "float16 (4*B, 3)"
    assert TensorSpec((2, 3)).numel == 6
    with pytest.raises(GraphError, match="numel_at"):
        _ = spec.numel


@pytest.mark.parametrize(("written", "kept"), [("B", "B"), ("1*B", "B"), ("4B", "4*B"), ("4 * B", "4*B")])
def test_multiples_have_one_form(written: str, kept: str) -> None:
    assert TensorSpec((written,)).shape == (kept,)


@pytest.mark.parametrize("dim", [-1, 1.5, "b", "0*B", "B*2", True, None])
def test_what_is_no_size_is_refused(dim: object) -> None:
    with pytest.raises(GraphError, match="is not a size"):
        TensorSpec((dim,))  # type: ignore[arg-type]


def test_what_is_no_dtype_is_refused() -> None:
    with pytest.raises(GraphError, match="not a dtype"):
        TensorSpec((1,), "float")


@given(st.integers(1, 9), st.integers(0, 20), st.integers(0, 5))
def test_bytes_are_proportional_to_the_batch(multiple: int, samples: int, width: int) -> None:
    spec = TensorSpec((f"{multiple}*B", width))
    assert spec.bytes_at(samples) == samples * spec.bytes_at(1)
