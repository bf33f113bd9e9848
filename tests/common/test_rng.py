"""Promises of rng.py: numbers depend on the seed and the purpose, and on nothing else."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from worldloom.common import derive_seed, library_seed, numpy_stream, stream


def test_recorded_seeds_do_not_change_between_versions():
    """To accept other ones: no run can be resumed or repeated any more."""
    assert derive_seed(0) == 3582888934675442504
    assert derive_seed(0, "windows", 3) == 9053361770407242001
    assert derive_seed(1, "noise") == 5503272283208887487
    assert numpy_stream(0, "windows").integers(0, 1000, 4).tolist() == [383, 488, 728, 207]
    assert torch.randint(0, 1000, (4,), generator=stream(0, "windows")).tolist() == [
        490,
        799,
        740,
        757,
    ]


PURPOSES = st.lists(st.text(max_size=5) | st.integers(-9, 9), max_size=3).map(tuple)


@given(seed=st.integers(), one=PURPOSES, other=PURPOSES)
def test_purposes_that_differ_have_seeds_that_differ(seed, one, other):
    assert 0 <= derive_seed(seed, *one) < 2**63
    assert (derive_seed(seed, *one) == derive_seed(seed, *other)) == (one == other)


def test_words_of_a_purpose_do_not_run_into_each_other():
    seeds = {derive_seed(0, *p) for p in (("ab",), ("a", "b"), ("a", "b", ""), (1,), ("1",), (11,))}
    assert len(seeds) == 6


def test_numpys_numbers_mean_the_same_purpose_as_pythons():
    assert derive_seed(np.int64(3), "a", np.uint8(4), np.str_("b")) == derive_seed(3, "a", 4, "b")
    with pytest.raises(TypeError):
        derive_seed(0, 1.5)


def test_drawing_for_one_purpose_never_shifts_another():
    first, second = numpy_stream(0, "a"), numpy_stream(0, "b")
    alone = numpy_stream(0, "b").random(5)
    first.random(100)
    assert np.array_equal(second.random(5), alone)
    assert torch.equal(
        torch.rand(5, generator=stream(0, "a")), torch.rand(5, generator=stream(0, "a"))
    )


def test_a_library_draws_from_its_purpose_and_the_global_generator_is_as_before():
    before = torch.random.get_rng_state()
    with library_seed(0, "init"):
        first = torch.rand(3)
    torch.rand(7)
    with library_seed(0, "init"):
        again = torch.rand(3)
    with library_seed(0, "dropout"):
        other = torch.rand(3)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    torch.random.set_rng_state(before)
    with pytest.raises(RuntimeError), library_seed(0, "init"):
        torch.rand(3) @ torch.rand(4)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_nothing_reads_or_moves_the_global_generators():
    np_before, torch_before = np.random.get_state()[1].copy(), torch.random.get_rng_state()  # noqa: NPY002 - it is this state that must stay
    numpy_stream(0, "a").random()
    torch.rand(1, generator=stream(0, "a"))
    assert np.array_equal(np.random.get_state()[1], np_before)  # noqa: NPY002 - as above
    assert torch.equal(torch.random.get_rng_state(), torch_before)
