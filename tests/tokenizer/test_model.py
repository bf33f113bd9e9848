"""Promises of model.py: causality to the bit, round trips, fingerprints, and what is refused."""

import inspect
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizer.toys import CONFIG, make_tokenizer, random_frames
from worldloom.common import FormatError, MismatchError, ShapeError, save_model, to_plain
from worldloom.tokenizer import ConvTokenizer, Trained, VideoTokenizer, to_video

B, T = 3, 6


@pytest.fixture
def frames_BTHWC() -> torch.Tensor:
    return random_frames(B, T, 16, 24)


@pytest.fixture
def codes_Bthw(tokenizer) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 32, (B, T, 4, 6), generator=generator)


@pytest.mark.parametrize("k", [0, 1, 3, T - 1])
def test_changing_a_frame_leaves_the_codes_before_it_bit_identical(tokenizer, frames_BTHWC, k):
    edited = frames_BTHWC.clone()
    edited[:, k] = 255 - edited[:, k]
    before, after = tokenizer.encode(frames_BTHWC), tokenizer.encode(edited)
    assert torch.equal(before[:, :k], after[:, :k])
    assert not torch.equal(before[:, k], after[:, k])


@pytest.mark.parametrize("k", [0, 1, 3, T - 1])
def test_changing_a_code_leaves_the_frames_before_it_bit_identical(tokenizer, codes_Bthw, k):
    edited = codes_Bthw.clone()
    edited[:, k] = (edited[:, k] + 1) % 32
    before = tokenizer.decode(codes_Bthw, num_frames=T)
    after = tokenizer.decode(edited, num_frames=T)
    assert torch.equal(before[:, :k], after[:, :k])
    assert not torch.equal(before[:, k], after[:, k])


def test_both_halves_look_into_the_past(tokenizer, frames_BTHWC, codes_Bthw):
    edited = frames_BTHWC.clone()
    edited[:, 2] = 255 - edited[:, 2]
    same = tokenizer.encode(frames_BTHWC) == tokenizer.encode(edited)
    assert not same[:, 3].all()
    assert not same[:, 4].all()
    assert same[:, 5:].all()  # a kernel of 3 frames sees 2 back
    edited = codes_Bthw.clone()
    edited[:, 2] = (edited[:, 2] + 1) % 32
    frames = [tokenizer.decode(codes, num_frames=T) for codes in (codes_Bthw, edited)]
    assert not torch.equal(frames[0][:, 4], frames[1][:, 4])
    assert torch.equal(frames[0][:, 5:], frames[1][:, 5:])


@pytest.mark.parametrize("k", [1, 3, T - 1])
def test_the_training_forward_is_causal_to_the_bit(tokenizer, frames_BTHWC, k):
    edited = frames_BTHWC.clone()
    edited[:, k] = 255 - edited[:, k]
    latents = [
        tokenizer.encoder(to_video(frames)).latents_BZthw for frames in (frames_BTHWC, edited)
    ]
    videos = [tokenizer.decoder(latents_BZthw).video_BCTHW for latents_BZthw in latents]
    for before, after in (latents, videos):
        assert torch.equal(before[:, :, :k], after[:, :, :k])
        assert not torch.equal(before[:, :, k], after[:, :, k])


def test_the_training_forward_computes_what_encode_and_decode_do(tokenizer, frames_BTHWC):
    output = tokenizer(to_video(frames_BTHWC))
    codes_Bthw = tokenizer.encode(frames_BTHWC)
    latents_BZthw = tokenizer.encoder(to_video(frames_BTHWC)).latents_BZthw
    assert_equal_but_for_ties(tokenizer, latents_BZthw, output.codes_Bthw, codes_Bthw)
    decoded = tokenizer.decode(output.codes_Bthw, num_frames=T)
    assert (to_video(decoded) - output.video_BCTHW.clamp(-1, 1)).abs().max() < 1.01 / 127.5


def assert_equal_but_for_ties(tokenizer, latents_BZthw, codes_a, codes_b):
    """Codes may differ only where two codebook vectors are equally near, to rounding."""
    latents = latents_BZthw.movedim(1, -1)
    distances = [(latents - tokenizer.codebook[codes]).norm(dim=-1) for codes in (codes_a, codes_b)]
    torch.testing.assert_close(*distances, rtol=1e-4, atol=1e-5)
    assert (codes_a == codes_b).float().mean() > 0.98


def test_a_prefix_of_a_video_has_the_prefix_of_its_codes(tokenizer, frames_BTHWC):
    codes_Bthw = tokenizer.encode(frames_BTHWC)
    frames = tokenizer.decode(codes_Bthw, num_frames=T)
    for k in range(1, T + 1):
        assert torch.equal(tokenizer.encode(frames_BTHWC[:, :k]), codes_Bthw[:, :k])
        assert torch.equal(tokenizer.decode(codes_Bthw[:, :k], num_frames=k), frames[:, :k])
        assert torch.equal(tokenizer.decode(codes_Bthw, num_frames=k), frames[:, :k])


def test_a_single_frame_is_a_video_of_one_frame(tokenizer, frames_BTHWC):
    codes_Bthw = tokenizer.encode(frames_BTHWC[:, 2:3])
    assert codes_Bthw.shape == (B, 1, 4, 6)
    still = frames_BTHWC[:, 2:3].expand(-1, T, -1, -1, -1)
    assert torch.equal(tokenizer.encode(still), codes_Bthw.expand(-1, T, -1, -1))
    assert tokenizer.decode(codes_Bthw, num_frames=1).shape == (B, 1, 16, 24, 3)


def test_a_row_does_not_depend_on_the_other_rows(tokenizer, frames_BTHWC, codes_Bthw):
    others, other_codes = random_frames(B, T, 16, 24, seed=1), codes_Bthw.flip(0)
    others[1], other_codes[1] = frames_BTHWC[1], codes_Bthw[1]
    assert torch.equal(tokenizer.encode(others)[1], tokenizer.encode(frames_BTHWC)[1])
    mine, theirs = (tokenizer.decode(codes, num_frames=T) for codes in (codes_Bthw, other_codes))
    assert torch.equal(mine[1], theirs[1])


def test_a_row_alone_has_the_codes_it_has_among_others_but_for_ties(tokenizer, frames_BTHWC):
    """Other batch sizes take other kernels; only their rounding may differ."""
    together = tokenizer.encode(frames_BTHWC)
    latents_BZthw = tokenizer.encoder(to_video(frames_BTHWC)).latents_BZthw
    for row in range(B):
        alone = tokenizer.encode(frames_BTHWC[row : row + 1])
        rows = slice(row, row + 1)
        assert_equal_but_for_ties(tokenizer, latents_BZthw[rows], alone, together[rows])
    decoded = tokenizer.decode(together, num_frames=T)
    alone = tokenizer.decode(together[:1], num_frames=T)
    assert (decoded[:1].int() - alone.int()).abs().max() <= 1


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int32, torch.int64])
def test_codes_mean_the_same_in_every_integer_type(tokenizer, codes_Bthw, dtype):
    frames = tokenizer.decode(codes_Bthw, num_frames=T)
    assert torch.equal(tokenizer.decode(codes_Bthw.to(dtype), num_frames=T), frames)


def test_codes_can_be_trained_on(tokenizer, frames_BTHWC):
    """Tensors made in inference mode could not be saved for a backward."""
    weight = torch.zeros(32, 4, requires_grad=True)
    torch.nn.functional.embedding(tokenizer.encode(frames_BTHWC), weight).sum().backward()
    assert weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (random_frames(1, 2, 16, 16), r"W is 16, must be 24"),
        (random_frames(1, 2, 24, 16), r"H is 24, must be 16"),
        (random_frames(2, 16, 24), r"4 axes, must be 5"),
        (random_frames(1, 2, 16, 24)[..., :1], r"C is 1, must be 3"),
        (random_frames(1, 2, 16, 24).float(), r"dtype torch.float32, must be torch.uint8"),
        (random_frames(1, 0, 16, 24), r"there are none; a video has at least one frame"),
        (random_frames(0, 2, 16, 24), r"0 streams side by side, must be at least 1"),
    ],
)
def test_frames_that_do_not_fit_are_refused_in_a_sentence(tokenizer, frames, message):
    with pytest.raises(ShapeError, match=f"frames: .*{message}"):
        tokenizer.encode(frames)


@pytest.mark.parametrize(
    ("codes", "num_frames", "error", "message"),
    [
        (torch.zeros(1, 2, 6, 4).long(), 2, ShapeError, "h is 6, must be 4"),
        (torch.zeros(1, 2, 24).long(), 2, ShapeError, "3 axes, must be 4"),
        (torch.zeros(1, 2, 4, 6), 2, ShapeError, "dtype torch.float32, must be integers"),
        (torch.zeros(1, 2, 4, 6).bool(), 2, ShapeError, "dtype torch.bool, must be integers"),
        (torch.zeros(1, 2, 4, 6).long(), 3, ShapeError, "cover 2 frames, asked for 3"),
        (torch.zeros(1, 2, 4, 6).long(), 0, ShapeError, "cover 2 frames, asked for 0"),
        (torch.full((1, 2, 4, 6), 32), 2, FormatError, r"\[32, 32\], must be in \[0, 32\)"),
        (torch.full((1, 2, 4, 6), -1), 2, FormatError, r"\[-1, -1\], must be in \[0, 32\)"),
    ],
)
def test_codes_that_do_not_fit_are_refused_in_a_sentence(
    tokenizer, codes, num_frames, error, message
):
    with pytest.raises(error, match=f"codes: .*{message}"):
        tokenizer.decode(codes, num_frames=num_frames)


def test_the_same_seed_makes_the_same_weights_whatever_was_drawn_before():
    torch.rand(7)
    first = ConvTokenizer(CONFIG, trained=Trained(fps=1, frame_skip=1), seed=3)
    torch.rand(9)
    second = ConvTokenizer(CONFIG, trained=Trained(fps=1, frame_skip=1), seed=3)
    other = ConvTokenizer(CONFIG, trained=Trained(fps=1, frame_skip=1), seed=4)
    assert first.spec.fingerprint == second.spec.fingerprint != other.spec.fingerprint


def test_the_spec_says_what_the_codes_are(tokenizer):
    spec = tokenizer.spec
    assert (spec.name, spec.height, spec.width, spec.resize) == ("image", 16, 24, "exact")
    assert (spec.fps, spec.frame_skip, spec.compute_dtype) == (8.75, 4, "float32")
    assert spec.codes == CONFIG.code_spec
    assert tuple(tokenizer.codebook.shape) == (spec.codes.vocab_size, spec.codes.code_dim)


def test_every_weight_changes_the_fingerprint():
    tokenizer = make_tokenizer()
    seen = {tokenizer.spec.fingerprint}
    for name, tensor in tokenizer.state_dict().items():
        before = tensor.clone()
        flat = tensor.view(-1)
        flat[-1] = ~flat[-1] if tensor.dtype == torch.bool else flat[-1] + 1
        fingerprint = tokenizer.eval().spec.fingerprint
        assert fingerprint not in seen, name
        seen.add(fingerprint)
        tensor.copy_(before)
    assert tokenizer.eval().spec.fingerprint in seen


def test_every_setting_changes_the_fingerprint(tokenizer):
    weights = tokenizer.state_dict()
    seen = {tokenizer.spec.fingerprint}
    # Settings that leave the shapes of the weights as they are.
    quantizer = CONFIG.quantizer
    for changes in (
        {"height": 32},
        {"width": 16},
        {"resize": "pad"},
        {"quantizer": replace(quantizer, decay=0.9)},
        {"quantizer": replace(quantizer, commitment=0.5)},
        {"quantizer": replace(quantizer, dead_code_threshold=0.2)},
    ):
        other = ConvTokenizer(replace(CONFIG, **changes), trained=tokenizer.trained)
        other.load_state_dict(weights)
        seen.add(other.eval().spec.fingerprint)
    assert len(seen) == 7


def test_the_fingerprint_follows_training_and_loading():
    tokenizer = make_tokenizer()
    fresh = tokenizer.spec.fingerprint
    weights = {name: tensor.clone() for name, tensor in tokenizer.state_dict().items()}
    tokenizer.train()
    tokenizer.decoder.time.bias += 1
    trained = tokenizer.spec.fingerprint
    tokenizer.decoder.time.bias += 1
    assert len({fresh, trained, tokenizer.eval().spec.fingerprint}) == 3
    tokenizer.load_state_dict(weights)
    assert tokenizer.spec.fingerprint == fresh


def test_saving_and_loading_gives_the_same_tokenizer_to_the_bit(tokenizer, frames_BTHWC, tmp_path):
    tokenizer.save(tmp_path / "model", card="# A toy\n")
    loaded = ConvTokenizer.from_pretrained(tmp_path / "model")
    assert loaded.spec == tokenizer.spec
    assert loaded.config == tokenizer.config
    mine, theirs = tokenizer.state_dict(), loaded.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    codes_Bthw = tokenizer.encode(frames_BTHWC)
    assert torch.equal(loaded.encode(frames_BTHWC), codes_Bthw)
    frames = [tok.decode(codes_Bthw, num_frames=T) for tok in (tokenizer, loaded)]
    assert torch.equal(*frames)
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_refused(tokenizer, tmp_path, name):
    tokenizer.save(tmp_path / "model", card="")
    (tmp_path / "model" / name).unlink()
    with pytest.raises(FormatError, match=f"{name}: not found"):
        ConvTokenizer.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_an_altered_file_is_refused(tokenizer, tmp_path, name):
    tokenizer.save(tmp_path / "model", card="")
    path = tmp_path / "model" / name
    content = path.read_bytes()
    altered = content.replace(b'"patch": 2', b'"patch": 1') if name == "config.json" else None
    path.write_bytes(altered or content[:-1] + bytes([content[-1] ^ 1]))
    assert path.read_bytes() != content
    with pytest.raises(FormatError, match=f"{name}: altered"):
        ConvTokenizer.from_pretrained(tmp_path / "model")


def saved_config(tokenizer) -> dict:
    return {
        "name": "image",
        "tokenizer": to_plain(tokenizer.config),
        "trained": to_plain(tokenizer.trained),
        "fingerprint": tokenizer.spec.fingerprint,
    }


def save_with(tokenizer, folder, /, **changes):
    """Save a well-sealed folder whose config is another; None drops a field."""
    config = {**saved_config(tokenizer), **changes}
    config = {key: value for key, value in config.items() if value is not None}
    save_model(folder, kind="tokenizer", config=config, weights=tokenizer.state_dict(), card="")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"widths": [8, 8]}, "the weights do not fit the config"),
        ({"num_blocks": [1, 2]}, "the weights do not fit the config"),
        ({"width": 32}, "put together from two"),  # the same weights, other codes
        ({"width": 25}, "width 25 is not a multiple of 4"),
        ({"patch": 0}, "patch is 0, must be at least 1"),
        ({"colour": 3}, "unknown key 'colour'"),
        ({"resize": "best"}, "resize is 'best'"),
    ],
)
def test_a_config_of_another_size_is_refused(tokenizer, tmp_path, changes, message):
    config = {**to_plain(CONFIG), **changes}
    save_with(tokenizer, tmp_path / "model", tokenizer=config)
    with pytest.raises(FormatError, match=message):
        ConvTokenizer.from_pretrained(tmp_path / "model")


def test_weights_of_another_training_are_refused(tokenizer, tmp_path):
    """Two folders, each whole, mixed by hand: sizes fit, the fingerprint does not."""
    other = make_tokenizer(seed=1)
    save_with(other, tmp_path / "model", fingerprint=tokenizer.spec.fingerprint)
    with pytest.raises(FormatError, match="put together from two"):
        ConvTokenizer.from_pretrained(tmp_path / "model")


def test_a_config_without_a_field_is_refused(tokenizer, tmp_path):
    save_with(tokenizer, tmp_path / "model", trained=None)
    with pytest.raises(
        FormatError, match="a tokenizer needs fingerprint, name, tokenizer, trained"
    ):
        ConvTokenizer.from_pretrained(tmp_path / "model")


def test_another_kind_of_model_is_refused(tokenizer, tmp_path):
    save_model(
        tmp_path / "model", kind="dynamics", config=saved_config(tokenizer), weights={}, card=""
    )
    with pytest.raises(MismatchError, match="holds a dynamics model, but a tokenizer is needed"):
        ConvTokenizer.from_pretrained(tmp_path / "model")


def test_a_folder_holds_no_machine_s_path_and_no_pickle(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "model", card="# A toy\n")
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert names == {"config.json", "model.safetensors", "README.md"}
    weights = load_file(tmp_path / "model" / "model.safetensors")
    save_file(weights, tmp_path / "again.safetensors")
    assert str(tmp_path) not in (tmp_path / "model" / "config.json").read_text()
    assert json.loads((tmp_path / "model" / "config.json").read_text())["kind"] == "tokenizer"


def test_it_is_a_video_tokenizer_parameter_by_parameter(tokenizer):
    assert isinstance(tokenizer, VideoTokenizer)
    members = [name for name in vars(VideoTokenizer) if not name.startswith("_")]
    assert set(members) >= {"spec", "codebook", "encode", "decode", "open_encoder", "open_decoder"}
    for name in members:
        wanted, ours = vars(VideoTokenizer)[name], inspect.getattr_static(ConvTokenizer, name)
        assert isinstance(ours, property) == isinstance(wanted, property), name
        if not isinstance(wanted, property):
            assert (
                inspect.signature(ours).parameters.keys()
                == inspect.signature(wanted).parameters.keys()
            ), name


def test_frames_from_numpy_that_share_memory_are_not_changed(tokenizer):
    array = np.random.default_rng(0).integers(0, 256, (1, 3, 16, 24, 3), np.uint8)
    before = array.copy()
    tokenizer.decode(tokenizer.encode(torch.from_numpy(array)), num_frames=3)
    assert np.array_equal(array, before)
