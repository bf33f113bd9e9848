"""Promises of perceptual.py: LPIPS with the person's weights, a sentence without; no download."""

import socket
import warnings

import pytest
import torch
from worldloom.common import ShapeError
from worldloom.tokenizer import perceptual
from worldloom.tokenizer.perceptual import LPIPS_LEAST_SIZE, load_lpips, lpips_distance

FILE = "alexnet-owt-7be5be79.pth"


def frames(*shape, seed=0):
    return torch.randint(
        0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The folder where torch hub keeps weights, empty; every way to the network is closed."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("went to the network"))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def weights(cache):
    """Weights of AlexNet, drawn at random, where a person's own would lie."""
    pytest.importorskip("lpips", reason="lpips is not installed: pip install '.[test]'")
    from torchvision.models import alexnet

    with torch.random.fork_rng():
        torch.manual_seed(0)
        state = alexnet(weights=None).state_dict()
    torch.save(state, cache / FILE)
    return state


def test_lpips_is_that_of_its_own_package_and_zero_of_equal_frames(weights):
    import lpips

    ours = load_lpips(device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it calls torchvision the way it was called in 2021
        theirs = lpips.LPIPS(net="alex", verbose=False)
    true, other = frames(3, 40, 33, 3), frames(3, 40, 33, 3, seed=1)
    video, made = ((f.movedim(-1, 1) / 127.5 - 1) for f in (true, other))
    with torch.no_grad():
        wanted = theirs(video, made).flatten()
    distance_T = lpips_distance(ours, true, other)
    assert (distance_T > 0).all()
    torch.testing.assert_close(distance_T, wanted)
    assert lpips_distance(ours, true, true).tolist() == [0, 0, 0]


def test_frames_too_small_for_lpips_are_refused_and_the_least_are_not(weights):
    network, least = load_lpips(device="cpu"), LPIPS_LEAST_SIZE
    same = frames(1, least, least, 3)
    assert lpips_distance(network, same, same).shape == (1,)
    with pytest.raises(ShapeError, match=f"at least {least} x {least}"):
        lpips_distance(network, same[:, 1:], same[:, 1:])
    with pytest.raises(ShapeError, match="uint8"):
        lpips_distance(network, same, same.float())


def test_without_the_weights_the_reason_says_where_they_belong_and_nothing_is_downloaded(cache):
    pytest.importorskip("lpips", reason="lpips is not installed: pip install '.[test]'")
    reason = load_lpips(device="cpu")
    assert reason.startswith("not measured: ")
    assert str(cache / FILE) in reason
    assert not list(cache.iterdir())


def test_without_the_package_the_reason_says_how_to_get_it(cache, monkeypatch):
    monkeypatch.setattr(perceptual, "find_spec", lambda name: None)
    reason = load_lpips(device="cpu")
    assert reason.startswith("not measured: the package lpips is not installed; pip install")


class Canary:
    """Once unpickled, it tells."""

    told = False

    def __reduce__(self):
        return setattr, (Canary, "told", True)


@pytest.mark.parametrize("content", ["junk", "other weights", "a pickle that runs code"])
def test_a_damaged_foreign_or_hostile_file_is_a_reason_and_no_crash(weights, cache, content):
    path = cache / FILE
    if content == "junk":
        path.write_bytes(b"junk")
    else:
        torch.save({"a": torch.ones(3) if content == "other weights" else Canary()}, path)
    reason = load_lpips(device="cpu")
    assert isinstance(reason, str)
    assert reason.startswith("not measured: LPIPS cannot be built with ")
    assert not Canary.told
