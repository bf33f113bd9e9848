"""Promises of pictures.py: nothing is smeared, files hold every frame, labels do not overlap."""

import io

import av
import numpy as np
import pytest
from PIL import Image
from worldloom.pipelines.pictures import (
    PAPER,
    Strip,
    draw_movie,
    draw_sheet,
    encode_gif,
    encode_mp4,
    encode_png,
    enlarge,
    fitting_scale,
)


def coloured(num_frames, height=16, width=24, *, first=0):
    """Frames of one colour each, all different."""
    frames = np.zeros((num_frames, height, width, 3), np.uint8)
    for index in range(num_frames):
        frames[index] = (10 + 9 * (first + index), 255 - 7 * (first + index), 90)
    return frames


def test_enlarging_only_repeats_pixels():
    frames = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 3), np.uint8)
    large = enlarge(frames, times=3)
    assert large.shape == (2, 9, 12, 3)
    assert np.array_equal(large[:, 1::3, 2::3], frames)
    assert np.array_equal(large.reshape(2, 3, 3, 4, 3, 3)[:, :, 0, :, 0], frames)


@pytest.mark.parametrize(
    ("height", "width", "target", "scale"), [(64, 64, 256, 4), (60, 80, 256, 3), (400, 64, 256, 1)]
)
def test_a_scale_is_the_largest_whole_factor_that_fits(height, width, target, scale):
    assert fitting_scale(height, width, target=target) == scale


def test_a_sheet_shows_every_frame_of_every_strip_once_and_in_order():
    above, below = coloured(7), coloured(5, first=7)
    sheet = draw_sheet(
        [
            Strip(title="true", frames_THWC=above, labels=["RIGHT"] * 7),
            Strip(title="generated", frames_THWC=below),
        ],
        scale=2,
        columns=4,
    )
    places = {}
    for name, frames in (("above", above), ("below", below)):
        for index, frame in enumerate(frames):
            ys, xs = np.nonzero((sheet == frame[0, 0]).all(-1))
            assert len(ys) == 32 * 48, (name, index)
            places[name, index] = (ys.min(), xs.min())
    assert places["above", 0][0] == places["above", 3][0] < places["above", 4][0]
    assert places["above", 0][1] == places["above", 4][1] < places["above", 1][1]
    assert places["below", 4][1] == places["above", 4][1]
    assert places["above", 0][0] < places["below", 0][0] < places["above", 4][0]


def test_a_label_stands_over_its_frame_and_is_cut_to_its_width():
    frames = coloured(2, height=32, width=32)
    plain = Strip(title="", frames_THWC=frames, labels=["", ""])
    named = Strip(title="", frames_THWC=frames, labels=["", "AN_ACTION_WITH_A_LONG_NAME" * 3])
    before, after = draw_sheet([plain], scale=2), draw_sheet([named], scale=2)
    assert before.shape == after.shape
    ys, xs = np.nonzero((before != after).any(-1))
    frame_y, frame_x = np.nonzero((after == frames[1, 0, 0]).all(-1))
    assert ys.max() < frame_y.min()
    assert frame_x.min() <= xs.min()
    assert xs.max() <= frame_x.max()


def test_a_movie_keeps_the_last_frame_of_the_shorter_column():
    movie = draw_movie(
        [
            Strip(title="true", frames_THWC=coloured(5)),
            Strip(title="generated", frames_THWC=coloured(3, first=5)),
        ],
        scale=4,
        captions=["a", "b", "c", "d", "e"],
    )
    assert len(movie) == 5
    last = coloured(3, first=5)[2, 0, 0]
    for index in (2, 3, 4):
        assert (movie[index] == last).all(-1).sum() == 64 * 96
        assert (movie[index] == coloured(5)[index, 0, 0]).all(-1).sum() == 64 * 96
    assert (movie[:, 0, 0] == PAPER).all()


def test_a_png_gives_back_the_same_pixels():
    picture = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    again = np.asarray(Image.open(io.BytesIO(encode_png(picture))))
    assert np.array_equal(again, picture)


def read_gif(content):
    gif = Image.open(io.BytesIO(content))
    frames, milliseconds = [], []
    for index in range(gif.n_frames):
        gif.seek(index)
        frames.append(np.asarray(gif.convert("RGB")))
        milliseconds.append(gif.info["duration"])
    return np.stack(frames), milliseconds


def test_a_gif_of_few_colours_is_exact_and_keeps_its_pace():
    frames = np.random.default_rng(0).integers(0, 4, (6, 16, 16, 3)).astype(np.uint8) * 60
    again, milliseconds = read_gif(encode_gif(frames, fps=8.75))
    assert np.array_equal(again, frames)
    assert milliseconds == [110] * 6
    assert Image.open(io.BytesIO(encode_gif(frames, fps=8.75))).info["loop"] == 0


def test_a_gif_of_many_colours_stays_close():
    y, x = np.mgrid[:64, :64]
    frames = np.stack([np.stack([4 * y, 4 * x, (y + x + t) * 2], -1) for t in range(4)])
    frames = frames.astype(np.uint8)
    again, _ = read_gif(encode_gif(frames, fps=10))
    assert np.abs(again.astype(int) - frames).mean() < 8


def test_a_gif_is_never_faster_than_browsers_keep():
    _, milliseconds = read_gif(encode_gif(coloured(3), fps=120))
    assert milliseconds == [20] * 3


@pytest.mark.parametrize(("height", "width"), [(32, 48), (33, 47)])
def test_an_mp4_holds_every_frame_at_the_right_size_rate_and_nearly_the_right_colours(
    height, width
):
    ramp = np.linspace(20, 230, height * width).reshape(height, width)
    frames = np.stack([np.stack([ramp, ramp[::-1], ramp * 0 + 9 * t], -1) for t in range(11)])
    frames = frames.astype(np.uint8)
    with av.open(io.BytesIO(encode_mp4(frames, fps=8.75))) as container:
        video = container.streams.video[0]
        assert float(video.average_rate) == pytest.approx(8.75, rel=1e-3)
        assert video.codec_context.pix_fmt == "yuv420p"
        again = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video)])
    assert again.shape == (11, height + height % 2, width + width % 2, 3)
    assert np.abs(again[:, :height, :width].astype(int) - frames).mean() < 4


@pytest.mark.parametrize(
    "draw",
    [
        lambda: draw_sheet([], scale=1),
        lambda: draw_sheet([Strip(title="x", frames_THWC=coloured(2), labels=["a"])], scale=1),
        lambda: draw_movie([Strip(title="x", frames_THWC=coloured(0))], scale=1),
        lambda: draw_movie([Strip(title="x", frames_THWC=coloured(2))], scale=1, captions=["a"]),
    ],
)
def test_a_picture_of_nothing_or_with_missing_labels_is_refused(draw):
    with pytest.raises(ValueError, match="frame"):
        draw()
