"""Promises of conv3d.py: causal, streamable, inert at the start, and no mixing in the norm."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import conv3d, pad
from worldloom.tokenizer.conv3d import (
    CausalConv3d,
    ChannelNorm,
    ResidualBlock,
    TimeBlock,
    TimeChain,
    TimeConv,
    TimeDoubling,
    TimeHalving,
)


def latents(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def trained_conv(kernel_frames=3):
    conv = CausalConv3d(4, kernel_frames).requires_grad_(requires_grad=False)
    conv.weight += latents(*conv.weight.shape)
    conv.bias += latents(4)
    return conv


@pytest.mark.parametrize("kernel_frames", [1, 2, 3, 5])
def test_a_fresh_convolution_is_the_identity(kernel_frames):
    latents_BZthw = latents(2, 4, 5, 3, 2)
    filtered, _ = CausalConv3d(4, kernel_frames)(latents_BZthw)
    assert torch.equal(filtered, latents_BZthw)


def test_the_first_frame_stands_before_itself():
    conv, latents_BZthw = trained_conv(), latents(2, 4, 5, 3, 2)
    padded = pad(latents_BZthw, (0, 0, 0, 0, 2, 0), mode="replicate")
    expected = conv3d(padded, conv.weight, conv.bias)
    torch.testing.assert_close(conv(latents_BZthw)[0], expected)


@settings(max_examples=50)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=6), st.integers(1, 4))
def test_any_split_with_the_cache_gives_what_the_whole_gives(pieces, kernel_frames):
    conv, latents_BZthw = trained_conv(kernel_frames), latents(2, 4, sum(pieces), 3, 2)
    whole, _ = conv(latents_BZthw)
    parts, cache = [], None
    for piece in torch.split(latents_BZthw, pieces, dim=2):
        part, cache = conv(piece, cache)
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, dim=2), whole, rtol=1e-5, atol=1e-6)


def test_the_cache_does_not_grow():
    conv, caches = trained_conv(), None
    for frame in range(7):
        _, caches = conv(latents(2, 4, 1, 3, 2, seed=frame), caches)
        assert [cache.shape for cache in caches] == [(2, 4, 2, 3, 2)]


def test_no_output_frame_depends_on_a_later_frame():
    conv, latents_BZthw = trained_conv(), latents(2, 4, 6, 3, 2)
    edited = latents_BZthw.clone()
    edited[:, :, 3] += 1
    before, after = conv(latents_BZthw)[0], conv(edited)[0]
    assert torch.equal(before[:, :, :3], after[:, :, :3])
    assert not torch.equal(before[:, :, 3:], after[:, :, 3:])


def test_the_norm_makes_every_pixel_of_unit_mean_square_whatever_its_neighbours():
    norm, image_BCHW = ChannelNorm(8), latents(3, 8, 4, 5)
    torch.testing.assert_close(
        norm(image_BCHW).square().mean(1), torch.ones(3, 4, 5), rtol=1e-4, atol=0
    )
    edited = image_BCHW.clone()
    edited[1, :, 2, 3] *= 7
    edited[1, 0, 2, 3] += 1
    same = norm(edited) == norm(image_BCHW)
    assert not same[1, :, 2, 3].all()
    same[1, :, 2, 3] = True
    assert same.all()  # it mixes neither space nor batch, into which time is folded


def test_the_norm_scales_channels_by_what_it_learned():
    norm, image_BCHW = ChannelNorm(8).requires_grad_(requires_grad=False), latents(3, 8, 4, 5)
    plain = norm(image_BCHW)
    norm.scale += torch.arange(8)
    torch.testing.assert_close(norm(image_BCHW), plain * torch.arange(1, 9)[:, None, None])


def test_a_fresh_residual_block_is_the_identity_but_learns_from_the_first_step():
    block, image_BCHW = ResidualBlock(8), latents(3, 8, 4, 5)
    added = block(image_BCHW)
    assert torch.equal(added, image_BCHW)
    added.square().mean().backward()
    assert block.out.weight.grad.abs().max() > 0


def shaken(module):
    """The module with every weight moved, so that no layer is a zero or an identity."""
    with torch.no_grad():
        for seed, parameter in enumerate(module.parameters()):
            parameter += 0.3 * latents(*parameter.shape, seed=seed)
    return module.requires_grad_(requires_grad=False)


@pytest.mark.parametrize("kernel_frames", [1, 2, 3])
def test_a_time_convolution_is_a_conv3d_with_the_first_frame_before_itself(kernel_frames):
    conv = shaken(TimeConv(4, 6, kernel_frames=kernel_frames))
    frames_BTCHW = latents(2, 5, 4, 3, 2)
    weight = conv.mix.weight.view(6, kernel_frames, 4, 1, 1).movedim(1, 2)
    padded = pad(frames_BTCHW.movedim(1, 2), (0, 0, 0, 0, kernel_frames - 1, 0), mode="replicate")
    expected = conv3d(padded, weight, conv.mix.bias).movedim(1, 2)
    torch.testing.assert_close(conv(frames_BTCHW, None)[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel_frames", [2, 3])
def test_a_halving_takes_one_frame_and_then_two_at_a_time(kernel_frames):
    halving = shaken(TimeHalving(4, kernel_frames=kernel_frames))
    frames_BTCHW = latents(2, 7, 4, 3, 2)
    whole, _ = halving(frames_BTCHW, None)
    every_frame, _ = TimeConv.forward(_with_stride_1(halving), frames_BTCHW, None)
    torch.testing.assert_close(whole, every_frame[:, ::2])  # 0, then 2, 4, 6: of 1 + 2m, 1 + m
    parts, cache = [], None
    for piece in torch.split(frames_BTCHW, [1, 2, 4], dim=1):
        part, cache = halving(piece, cache)
        parts.append(part)
    assert [part.shape[1] for part in parts] == [1, 1, 2]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-5, atol=1e-6)


def _with_stride_1(halving):
    plain = TimeConv(4, 4, kernel_frames=halving.kernel_frames)
    plain.load_state_dict(halving.state_dict())
    return plain


def test_a_doubling_gives_one_frame_and_then_two_at_a_time():
    doubling = shaken(TimeDoubling(4, kernel_frames=2))
    frames_BTCHW = latents(2, 4, 4, 3, 2)
    whole, _ = doubling(frames_BTCHW, None)
    assert whole.shape == (2, 7, 4, 3, 2)
    parts, cache = [], None
    for piece in torch.split(frames_BTCHW, [1, 2, 1], dim=1):
        part, cache = doubling(piece, cache)
        parts.append(part)
    assert [part.shape[1] for part in parts] == [1, 4, 2]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-5, atol=1e-6)


def test_a_fresh_time_block_is_the_identity_but_learns_from_the_first_step():
    block, frames_BTCHW = TimeBlock(8, kernel_frames=3), latents(2, 4, 8, 3, 2)
    added, _ = block(frames_BTCHW, None)
    assert torch.equal(added, frames_BTCHW)
    added.square().mean().backward()
    assert block.out.mix.weight.grad.abs().max() > 0


def test_a_chain_gives_every_layer_over_time_its_own_cache():
    chain = shaken(
        TimeChain(
            [
                torch.nn.Conv2d(4, 6, 3, padding=1),
                TimeBlock(6, kernel_frames=3),
                TimeHalving(6, kernel_frames=2),
                TimeBlock(6, kernel_frames=2),
                TimeDoubling(6, kernel_frames=3),
            ]
        )
    )
    frames_BTCHW = latents(2, 9, 4, 3, 2)
    whole, _ = chain(frames_BTCHW, None)
    assert whole.shape == (2, 9, 6, 3, 2)
    parts, caches = [], None
    for piece in torch.split(frames_BTCHW, [1, 2, 2, 4], dim=1):
        part, caches = chain(piece, caches)
        parts.append(part)
        assert [cache.shape[1] for cache in caches] == [2, 0, 1, 2]  # whatever came before
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-5)
