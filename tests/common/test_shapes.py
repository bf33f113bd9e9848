"""Promises of shapes.py: the letters of a name are its shape, or a sentence says which is not."""

import numpy as np
import pytest
import torch
from worldloom.common import ShapeError, bind_shape


@pytest.mark.parametrize("make", [np.zeros, torch.zeros], ids=["numpy", "torch"])
def test_every_letter_is_bound_to_its_length(make):
    bound = bind_shape("video", make((2, 3, 5)), "B C T", C=3)
    assert bound == {"B": 2, "C": 3, "T": 5}
    assert all(type(length) is int for length in bound.values())


def test_a_wrong_length_is_named_with_what_it_must_be():
    with pytest.raises(ShapeError) as caught:
        bind_shape("video", np.zeros((2, 16, 3, 4, 5)), "B C T H W", C=3)
    assert str(caught.value) == (
        "video: expected (B, C=3, T, H, W), got shape (2, 16, 3, 4, 5): C is 16, must be 3"
    )


def test_the_same_letter_twice_must_have_the_same_length():
    assert bind_shape("square", np.zeros((4, 4)), "D D") == {"D": 4}
    with pytest.raises(ShapeError, match="D is 5, must be 4"):
        bind_shape("square", np.zeros((4, 5)), "D D")


@pytest.mark.parametrize("shape", [(), (2,), (2, 3, 4)])
def test_another_number_of_axes_is_refused(shape):
    with pytest.raises(ShapeError, match=rf"{len(shape)} axes, must be 2"):
        bind_shape("codes", np.zeros(shape), "t h")
