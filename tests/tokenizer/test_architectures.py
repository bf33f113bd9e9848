"""Promises that every architecture, stride and number of levels keeps, to the bit.

What anyone's tokenizer must do is in `worldloom.tokenizer.testing`; here are the promises of ours
that go further: memory, training clips, what the past reaches.
"""

import gc
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer.toys import CONFIG, make_tokenizer, random_frames
from worldloom.common import ShapeError
from worldloom.tokenizer import ConvTokenizer, to_video

RESIDUAL = replace(CONFIG.quantizer, kind="residual", num_levels=2)
CONFIGS = {
    "image": CONFIG,
    "image-residual": replace(CONFIG, quantizer=RESIDUAL),
    "video-1": replace(CONFIG, architecture="video"),
    "video-2": replace(CONFIG, architecture="video", temporal_stride=2),
    "video-2-kernel-2": replace(CONFIG, architecture="video", temporal_stride=2, temporal_kernel=2),
    "video-4": replace(CONFIG, architecture="video", temporal_stride=4),
    "video-4-residual": replace(
        CONFIG, architecture="video", temporal_stride=4, quantizer=RESIDUAL
    ),
}
T = 9
TOKENIZERS = {name: make_tokenizer(config) for name, config in CONFIGS.items()}
every_architecture = pytest.mark.parametrize("name", CONFIGS)


def edited_from(frames_BTHWC, first):
    """The frames with everything from a frame on replaced."""
    others = random_frames(*frames_BTHWC.shape[:-1], seed=9)
    return torch.cat([frames_BTHWC[:, :first], others[:, first:]], dim=1)


@every_architecture
def test_the_first_latent_frame_covers_one_frame_and_each_later_one_r(name):
    tokenizer, spec = TOKENIZERS[name], CONFIGS[name].code_spec
    frames_BTHWC = random_frames(2, T, 16, 24)
    for num_frames in range(1, T + 1):
        codes_Bthw = tokenizer.encode(frames_BTHWC[:, :num_frames])
        assert codes_Bthw.shape == (2, *spec.codes_shape(spec.latent_frames(num_frames)))
        decoded = tokenizer.decode(codes_Bthw, num_frames=num_frames)
        assert decoded.shape == (2, num_frames, 16, 24, 3)


@every_architecture
def test_a_prefix_has_the_prefix_of_the_codes_and_of_the_frames(name):
    tokenizer, r = TOKENIZERS[name], CONFIGS[name].temporal_stride
    frames_BTHWC = random_frames(2, T, 16, 24)
    codes_Bthw = tokenizer.encode(frames_BTHWC)
    decoded = tokenizer.decode(codes_Bthw, num_frames=T)
    for k in range((T - 1) // r + 1):
        assert torch.equal(tokenizer.encode(frames_BTHWC[:, : 1 + k * r]), codes_Bthw[:, : k + 1])
        part = tokenizer.decode(codes_Bthw[:, : k + 1], num_frames=1 + k * r)
        assert torch.equal(part, decoded[:, : 1 + k * r])


@every_architecture
def test_the_codes_of_a_latent_frame_see_its_own_frames_and_none_later(name):
    tokenizer, r = TOKENIZERS[name], CONFIGS[name].temporal_stride
    frames_BTHWC = random_frames(2, T, 16, 24)
    codes_Bthw = tokenizer.encode(frames_BTHWC)
    for k in range(1, (T - 1) // r + 1):
        last = k * r  # the last frame that latent frame k covers
        same = tokenizer.encode(edited_from(frames_BTHWC, last)) == codes_Bthw
        assert same[:, :k].all()
        assert not same[:, k].all()


@every_architecture
def test_the_training_forward_of_a_clip_computes_what_the_sessions_do(name):
    tokenizer = TOKENIZERS[name]
    frames_BTHWC = random_frames(2, T, 16, 24)
    output = tokenizer(to_video(frames_BTHWC))
    codes_Bthw = tokenizer.encode(frames_BTHWC)
    # Whole clips take other kernels than one latent frame at a time: a tie may fall otherwise.
    assert (output.codes_Bthw == codes_Bthw).float().mean() > 0.98
    decoded = tokenizer.decode(output.codes_Bthw, num_frames=T)
    assert (to_video(decoded) - output.video_BCTHW.clamp(-1, 1)).abs().max() < 1.01 / 127.5


@settings(max_examples=12)  # each encodes a video frame by frame, seven ways
@given(st.lists(st.integers(0, 4), min_size=1, max_size=6), st.integers(1, T))
def test_any_split_of_a_stream_gives_the_same_codes_and_frames(sizes, num_frames):
    frames_BTHWC = random_frames(2, num_frames, 16, 24)
    for tokenizer in TOKENIZERS.values():
        session, decoder = tokenizer.open_encoder(), tokenizer.open_decoder()
        codes, frames, first = [], [], 0
        for size in [*sizes, num_frames]:
            codes.append(session.push(frames_BTHWC[:, first : first + size]))
            first += size
        codes.append(session.flush())
        frames = [decoder.push(part) for part in codes]
        whole = tokenizer.encode(frames_BTHWC)
        assert torch.equal(torch.cat(codes, dim=1), whole)
        covered = tokenizer.spec.codes.pixel_frames(whole.shape[1])
        decoded = tokenizer.decode(whole, num_frames=covered)
        assert torch.equal(torch.cat(frames, dim=1), decoded)


@every_architecture
def test_frames_that_do_not_fill_a_latent_frame_are_followed_by_the_last(name):
    tokenizer, r = TOKENIZERS[name], CONFIGS[name].temporal_stride
    frames_BTHWC = random_frames(2, 2, 16, 24)  # the second frame begins a latent frame
    filled = torch.cat([frames_BTHWC, frames_BTHWC[:, -1:].expand(-1, r - 1, -1, -1, -1)], dim=1)
    assert torch.equal(tokenizer.encode(frames_BTHWC), tokenizer.encode(filled))


def test_a_flushed_session_is_over():
    session = TOKENIZERS["video-4"].open_encoder()
    session.push(random_frames(1, 3, 16, 24))
    assert session.flush().shape[1] == 1
    assert session.flush().shape[1] == 0
    with pytest.raises(ValueError, match="flushed, so its videos are over"):
        session.push(random_frames(1, 1, 16, 24))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["image", "video-4"])
def test_memory_is_flat_from_100_to_10_000_frames(name):
    """Held by both sessions, counted tensor by tensor: allocators hide leaks and invent some."""
    smallest = {"height": 4, "width": 4, "widths": (4,), "num_blocks": (1,)}
    tokenizer = make_tokenizer(replace(CONFIGS[name], **smallest))
    encoder, decoder = tokenizer.open_encoder(), tokenizer.open_decoder()
    pushed = random_frames(1, 100, 4, 4)
    held_bytes = []
    for number in range(1, 101):
        decoder.push(encoder.push(pushed))
        if number in (1, 100):
            held_bytes.append(tensor_bytes())
    assert held_bytes[0] == held_bytes[1]


def tensor_bytes() -> int:
    """Bytes of all tensors that are alive."""
    alive = (each for each in gc.get_objects() if type(each) is torch.Tensor)
    return sum(each.untyped_storage().nbytes() for each in alive)


def test_a_stride_of_four_is_two_halvings_and_costs_a_quarter_of_the_codes():
    codes = {name: CONFIGS[name].code_spec for name in ("video-1", "video-2", "video-4")}
    tokens = {name: spec.latent_frames(1 + 64) * spec.cells for name, spec in codes.items()}
    assert tokens == {"video-1": 65 * 24, "video-2": 33 * 24, "video-4": 17 * 24}


@pytest.mark.parametrize(
    ("patch", "widths", "height", "width", "grid"),
    [
        (4, (8,), 16, 40, (4, 10)),
        (4, (8, 8), 24, 16, (3, 2)),
        (4, (8, 8, 8), 16, 48, (1, 3)),
        (2, (8, 8, 8, 8), 32, 16, (2, 1)),
    ],
)
@pytest.mark.parametrize("architecture", ["image", "video"])
def test_any_aspect_ratio_at_strides_of_4_8_and_16(
    architecture, patch, widths, height, width, grid
):
    config = replace(
        CONFIG,
        architecture=architecture,
        height=height,
        width=width,
        patch=patch,
        widths=widths,
        num_blocks=(1,) * len(widths),
    )
    tokenizer = make_tokenizer(config)
    codes_Bthw = tokenizer.encode(random_frames(2, 3, height, width))
    assert codes_Bthw.shape == (2, 3, *grid)
    assert tokenizer.decode(codes_Bthw, num_frames=3).shape == (2, 3, height, width, 3)


def test_a_tokenizer_of_each_architecture_is_saved_and_loaded_under_its_own_name(tmp_path):
    for name, tokenizer in TOKENIZERS.items():
        tokenizer.save(tmp_path / name, card="")
        loaded = ConvTokenizer.from_pretrained(tmp_path / name)
        assert loaded.spec == tokenizer.spec
        assert loaded.spec.name == name.split("-")[0]
        frames_BTHWC = random_frames(1, T, 16, 24)
        assert torch.equal(loaded.encode(frames_BTHWC), tokenizer.encode(frames_BTHWC))


def test_codes_of_other_levels_are_refused_in_a_sentence():
    codes_BthwQ = torch.zeros(1, 2, 4, 6, 3, dtype=torch.int64)
    with pytest.raises(ShapeError, match="Q is 3, must be 2"):
        TOKENIZERS["image-residual"].decode(codes_BthwQ, num_frames=1)
    with pytest.raises(ShapeError, match="4 axes, must be 5"):
        TOKENIZERS["image-residual"].decode(codes_BthwQ[..., 0], num_frames=1)


def test_the_temporal_loss_is_what_quantizer_and_convolutions_lose_of_the_latents():
    frames_BTHWC = random_frames(2, T, 16, 24)
    tokenizer = TOKENIZERS["image"]
    still_BZthw = tokenizer.encoder(to_video(frames_BTHWC)).still_BZthw
    output = tokenizer(to_video(frames_BTHWC))
    vectors = tokenizer.codebook[output.codes_Bthw].movedim(-1, 1)
    filtered, _ = tokenizer.decoder.time(vectors)
    torch.testing.assert_close(output.temporal_loss, (filtered - still_BZthw).square().mean())
    assert TOKENIZERS["video-2"](to_video(frames_BTHWC)).temporal_loss == 0
