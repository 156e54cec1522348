"""`benchmarks/key_lengths.py`: the usage of untrained keys."""

from __future__ import annotations

import math

import key_lengths
import pytest


@pytest.mark.parametrize("share_keys", [True, False])
def test_keys_of_equal_length_reach_more_experts_than_those_of_a_cube(share_keys):
    cube, equal = (
        key_lengths.measure(16, 8, share_keys, lengths, seed=0, side=128, queries=2400)
        for lengths in ("cube", "equal")
    )
    assert list(cube) == list(equal) == list(key_lengths.COLUMNS)
    assert cube["usage"] < equal["usage"] - 0.04
    assert cube["unevenness"] > 1.2 * equal["unevenness"]
    assert cube["uniform_usage"] == equal["uniform_usage"] == pytest.approx(0.904, abs=1e-3)
    assert equal["usage"] < equal["uniform_usage"] + 0.01
    assert 0 < equal["unevenness_of_counts"] < equal["unevenness"] < math.log(128**2)
