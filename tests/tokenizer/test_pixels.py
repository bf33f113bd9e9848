import numpy as np
import pytest
import torch
from PIL import Image
from worldloom.common import ConfigError, ShapeError
from worldloom.tokenizer.pixels import resize_frames, to_frames, to_video


def noise(height: int, width: int, count: int = 2) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), np.uint8)


def test_all_256_grey_levels_survive_the_round_trip():
    levels = torch.arange(256, dtype=torch.uint8)
    frames_BTHWC = levels.reshape(1, 1, 16, 16, 1).expand(1, 1, 16, 16, 3)
    video_BCTHW = to_video(frames_BTHWC)
    assert video_BCTHW.dtype == torch.float32
    assert video_BCTHW.shape == (1, 3, 1, 16, 16)
    assert (video_BCTHW.min(), video_BCTHW.max()) == (-1, 1)
    assert torch.equal(to_frames(video_BCTHW), frames_BTHWC)


def test_a_level_is_rounded_to_the_nearest_and_never_truncated():
    video = torch.tensor([99.6, 99.4, 254.9]).reshape(1, 3, 1, 1, 1) / 127.5 - 1
    assert to_frames(video).flatten().tolist() == [100, 99, 255]


def test_what_leaves_the_range_is_clamped():
    video = torch.tensor([-1.3, 1.4, 0.0]).reshape(1, 3, 1, 1, 1)
    assert to_frames(video).flatten().tolist() == [0, 255, 128]


def test_the_axes_are_moved_and_not_merely_renamed():
    frames = torch.zeros(2, 3, 4, 5, 3, dtype=torch.uint8)
    frames[1, 2, 3, 4, 0] = 255
    video = to_video(frames)
    assert video[1, 0, 2, 3, 4] == 1
    assert (video == 1).sum() == 1


@pytest.mark.parametrize("rule", ["exact", "stretch", "crop", "pad"])
def test_frames_that_fit_come_back_untouched(rule):
    frames = noise(8, 12)
    assert resize_frames(frames, height=8, width=12, rule=rule) is frames


def test_exact_refuses_another_size_and_names_both():
    with pytest.raises(ConfigError, match=r"8x12 .* 6x6.*'exact'.*stretch, crop or pad"):
        resize_frames(noise(8, 12), height=6, width=6, rule="exact")


@pytest.mark.parametrize("size", [(64, 64), (30, 100), (200, 220)])
def test_stretching_agrees_with_pillows_antialiased_filter(size):
    frames = noise(120, 160)
    ours = resize_frames(frames, height=size[0], width=size[1], rule="stretch")
    theirs = np.stack(
        [
            np.asarray(Image.fromarray(f).resize(size[::-1], Image.Resampling.BILINEAR))
            for f in frames
        ]
    )
    assert ours.dtype == np.uint8
    assert np.abs(ours.astype(int) - theirs).max() <= 1


def test_a_ball_of_two_pixels_fades_but_does_not_vanish():
    frames = np.zeros((1, 128, 128, 3), np.uint8)
    frames[0, 61:63, 61:63] = 255
    small = resize_frames(frames, height=32, width=32, rule="stretch").astype(float)
    assert small.max() > 20
    # The light is kept: 4 pixels of 255 on 16 times fewer pixels.
    assert small[..., 0].sum() == pytest.approx(4 * 255 / 16, rel=0.1)


def test_crop_keeps_the_middle_and_the_aspect_ratio():
    frames = np.zeros((1, 10, 40, 3), np.uint8)
    frames[:, :, 15:25] = 200
    cut = resize_frames(frames, height=10, width=10, rule="crop")
    assert cut.shape == (1, 10, 10, 3)
    assert (cut == 200).all()


@pytest.mark.parametrize("upright", [True, False])
def test_of_a_stripe_only_the_middle_is_scaled(upright, monkeypatch):
    frames = np.zeros((1, 1, 100_001, 3), np.uint8)
    frames[:, :, 50_000] = 200
    scale, most = torch.nn.functional.interpolate, []

    def scaled(video, size, **how):
        most.append(np.prod(size))
        return scale(video, size, **how)

    monkeypatch.setattr(torch.nn.functional, "interpolate", scaled)
    turned = frames.swapaxes(1, 2) if upright else frames
    cut = resize_frames(turned, height=64, width=64, rule="crop")
    assert cut.shape == (1, 64, 64, 3)
    assert (cut == 200).all()
    assert most == [64 * 64]


def test_pad_keeps_everything_and_adds_black_bars_of_equal_size():
    frames = np.full((1, 20, 40, 3), 200, np.uint8)
    padded = resize_frames(frames, height=20, width=20, rule="pad")
    assert (padded[:, 5:15] == 200).all()
    assert (padded[:, :5] == 0).all()
    assert (padded[:, 15:] == 0).all()


def test_a_frame_does_not_depend_on_the_frames_it_is_resized_with():
    frames = noise(50, 70, count=5)
    together = resize_frames(frames, height=16, width=16, rule="stretch")
    alone = resize_frames(frames[3:4], height=16, width=16, rule="stretch")
    assert np.array_equal(together[3], alone[0])


@pytest.mark.parametrize(
    "frames",
    [np.zeros((2, 8, 8, 1), np.uint8), np.zeros((8, 8, 3), np.uint8), np.zeros((1, 8, 8, 3))],
)
def test_what_is_not_uint8_rgb_is_refused(frames):
    with pytest.raises(ShapeError, match="frames"):
        resize_frames(frames, height=4, width=4, rule="stretch")


def test_an_unknown_rule_is_refused_by_name():
    with pytest.raises(ConfigError, match="'zoom'"):
        resize_frames(noise(8, 8), height=4, width=4, rule="zoom")
