"""The three precisions of float32 products: what each keeps of a float32's digits, against float64."""

import pytest
import torch
from conftest import TOL
from test_regularizer import float32_errors, random_state

import fasthyper as fh
from fasthyper import ops

HAS_TILE_UNITS = ops._packed_parts(torch.empty(0)) == 3


@pytest.mark.parametrize("step", [1, 1e-3, 1e-6])
@pytest.mark.parametrize("name", ["wide", "narrow"])
def test_each_precision_keeps_its_digits(name, step):
    state = random_state(name, step)
    highest, high, medium = (float32_errors(*state, precision)[0] for precision in ops.PRECISIONS)
    assert max(highest.values()) < TOL["drift", torch.float32]
    if not HAS_TILE_UNITS:
        assert highest == high == medium  # leave that is not taken
        return
    assert max(high.values()) < TOL["drift, high", torch.float32]
    assert max(medium.values()) < TOL["drift, medium", torch.float32]
    assert 10 * highest["gradient"] < high["gradient"] < medium["gradient"] / 10  # each is what it is called


def test_what_is_bound_says_how_it_multiplies():
    ways = {0: "cpp", 3: "cpp (bfloat16 tile units)", 4: "cpp (AVX-512 products)", 5: "cpp (AVX2 products)"}
    assert fh.backends()["cpu"] == ways[ops._packed_parts(torch.empty(0))] or not fh.backends()["cpu"].startswith("cpp")
