"""Promises of streaming.py: however a stream is cut, codes and frames are the same, to the bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer.toys import random_frames
from worldloom.common import FormatError, ShapeError

T = 5
SPLITS = st.lists(st.integers(0, 3), min_size=1, max_size=6).map(
    lambda sizes: [*sizes, T - sum(sizes)] if sum(sizes) <= T else [T]
)


@settings(max_examples=30)  # each is a video encoded or decoded frame by frame
@given(SPLITS)
def test_any_split_of_a_stream_gives_the_same_codes(tokenizer, sizes):
    frames_BTHWC = random_frames(2, T, 16, 24)
    whole = tokenizer.encode(frames_BTHWC)
    session = tokenizer.open_encoder()
    parts = [session.push(part) for part in torch.split(frames_BTHWC, sizes, dim=1)]
    assert [part.shape[1] for part in parts] == sizes
    assert torch.equal(torch.cat([*parts, session.flush()], dim=1), whole)


@settings(max_examples=30)  # each is a video encoded or decoded frame by frame
@given(SPLITS)
def test_any_split_of_codes_gives_the_same_frames(tokenizer, sizes):
    generator = torch.Generator().manual_seed(0)
    codes_Bthw = torch.randint(0, 32, (2, T, 4, 6), generator=generator)
    whole = tokenizer.decode(codes_Bthw, num_frames=T)
    session = tokenizer.open_decoder()
    parts = [session.push(part) for part in torch.split(codes_Bthw, sizes, dim=1)]
    assert [part.shape[1] for part in parts] == sizes
    assert torch.equal(torch.cat(parts, dim=1), whole)


def test_frames_may_lie_in_memory_as_they_like(tokenizer):
    frames_BTHWC = random_frames(2, T, 16, 24)
    strided = random_frames(2, 2 * T, 16, 48)
    strided[:, ::2, :, ::2] = frames_BTHWC
    assert torch.equal(tokenizer.encode(strided[:, ::2, :, ::2]), tokenizer.encode(frames_BTHWC))


def test_two_sessions_do_not_know_each_other(tokenizer):
    frames_BTHWC = random_frames(2, T, 16, 24)
    first, second = tokenizer.open_encoder(), tokenizer.open_encoder()
    codes = []
    for t in range(T):
        codes.append(first.push(frames_BTHWC[:, t : t + 1]))
        second.push(random_frames(2, 1, 16, 24, seed=t + 9))
    assert torch.equal(torch.cat(codes, dim=1), tokenizer.encode(frames_BTHWC))


def test_a_flush_fits_the_codes_it_follows(tokenizer):
    session = tokenizer.open_encoder()
    session.push(random_frames(3, 2, 16, 24))
    flushed = session.flush()
    assert (flushed.shape, flushed.dtype) == ((3, 0, 4, 6), torch.int64)


def test_a_session_serves_as_many_streams_as_it_began_with(tokenizer):
    encoder, decoder = tokenizer.open_encoder(), tokenizer.open_decoder()
    decoder.push(encoder.push(random_frames(2, 1, 16, 24)))
    with pytest.raises(ShapeError, match="frames: 3 streams side by side, must be 2"):
        encoder.push(random_frames(3, 1, 16, 24))
    with pytest.raises(ShapeError, match="codes: 1 streams side by side, must be 2"):
        decoder.push(torch.zeros(1, 1, 4, 6, dtype=torch.int64))


def test_what_a_session_refuses_leaves_it_as_it_was(tokenizer):
    generator = torch.Generator().manual_seed(0)
    codes_Bthw = torch.randint(0, 32, (2, T, 4, 6), generator=generator)
    session = tokenizer.open_decoder()
    parts = []
    for t in range(T):
        with pytest.raises(FormatError, match=r"\[32, 32\], must be in \[0, 32\)"):
            session.push(torch.full((2, 1, 4, 6), 32))
        with pytest.raises(ShapeError, match="w is 5, must be 6"):
            session.push(torch.zeros(2, 1, 4, 5, dtype=torch.int64))
        parts.append(session.push(codes_Bthw[:, t : t + 1]))
    assert torch.equal(torch.cat(parts, dim=1), tokenizer.decode(codes_Bthw, num_frames=T))


def test_a_session_refuses_frames_as_encode_does(tokenizer):
    session = tokenizer.open_encoder()
    with pytest.raises(ShapeError, match=r"dtype torch\.float32, must be torch\.uint8"):
        session.push(random_frames(1, 2, 16, 24).float())
    with pytest.raises(ShapeError, match="H is 24, must be 16"):
        session.push(random_frames(1, 2, 24, 16))
