"""The settings that all runs share."""

from __future__ import annotations

import dataclasses

import pytest

from omnisapiens_jax import defaults
from omnisapiens_jax.processing.options import ProcessingConfig


@pytest.mark.parametrize("size", defaults.SIZES)
def test_every_way_of_reading_media_is_a_setting_of_a_run(size: str) -> None:
    assert {*defaults.base(size).processing, *defaults.SWITCHED} == {field.name for field in dataclasses.fields(ProcessingConfig)}
