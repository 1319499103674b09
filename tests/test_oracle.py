"""The bridge to transformers carries arrays exactly, and says why when it cannot."""

from __future__ import annotations

import numpy as np
import pytest

from tests import oracle


@pytest.mark.oracle
def test_arrays_come_back_bit_for_bit() -> None:
    array = np.array([[1.0, -0.0, np.inf], [1e-38, np.pi, 7.0]], np.float32)
    answer = oracle.run_oracle("echo", array=array, factor=2.0)
    assert answer["array"].tobytes() == array.tobytes() and answer["array"].dtype == np.float32
    np.testing.assert_array_equal(answer["product"], array * 2)
    assert list(answer["versions"])[1] == "5.23.0"
    assert answer["threads"] <= 2


@pytest.mark.oracle
def test_a_failing_script_shows_its_own_error() -> None:
    with pytest.raises(RuntimeError, match=r"echo\.py failed[\s\S]*ValueError: asked to fail with factor 0\.5"):
        oracle.run_oracle("echo", array=np.zeros(1), factor=0.5, fail=True)


def test_an_unknown_script_lists_the_known() -> None:
    with pytest.raises(FileNotFoundError, match=r"no oracle script .*nowhere\.py; there are \[.*'echo'"):
        oracle.run_oracle("nowhere")


def test_a_named_interpreter_that_is_missing_is_an_error_not_a_skip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(oracle.VARIABLE, "/nowhere/python")
    with pytest.raises(FileNotFoundError, match="OMNISAPIENS_ORACLE_PYTHON is /nowhere/python"):
        oracle.oracle_python()
