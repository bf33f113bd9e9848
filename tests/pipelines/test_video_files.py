import os
import random
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from video_worlds import FPS, played, read_frame, write_video
from worldloom.common import FormatError
from worldloom.pipelines.video_files import VideoFile

SUFFIXES = [".mp4", ".mkv", ".webm", ".gif", ".avi", ".mov"]


def read(path: Path, **more: Any) -> list[Any]:
    with VideoFile(path, **more) as video:
        return list(video.frames())


def steps(frames: Any) -> list[int]:
    return [read_frame(frame, 0)[0] for frame in frames]


def noise(num_frames: int, height: int = 64, width: int = 96) -> Any:
    """Frames that change everywhere, so that a damaged byte shows."""
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (num_frames, height // 8, width // 8, 3), np.uint8)
    return np.kron(small, np.ones((1, 8, 8, 1), np.uint8))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_video_gives_all_its_frames_in_order_its_rate_and_its_size(tmp_path, suffix):
    path = write_video(tmp_path / f"a{suffix}", played("none", 45).frames_THWC[:, :, :48])
    with VideoFile(path) as video:
        assert (video.height, video.width) == (64, 48)
        assert video.fps == FPS
        frames = list(video.frames())
    assert all(frame.shape == (64, 48, 3) and frame.dtype == np.uint8 for frame in frames)
    assert len(frames) == 45
    assert len({frame.ctypes.data for frame in frames}) == 45  # each an array of its own


def test_a_lossless_video_gives_the_pixels_that_went_in(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (20, 32, 48, 3), np.uint8)
    assert np.array_equal(read(write_video(tmp_path / "a.mkv", frames)), frames)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".webm", ".mov"])
@pytest.mark.parametrize("first", [0, 1, 30, 61, 99])
def test_frames_from_any_time_on_are_those_of_reading_from_the_start(tmp_path, suffix, first):
    path = write_video(tmp_path / f"a{suffix}", played("none", 100).frames_THWC)
    count = min(7, 100 - first)
    with VideoFile(path) as video:
        assert steps(video.frames(start_s=first / FPS, num_frames=count)) == list(
            range(first, first + count)
        )
    with VideoFile(path) as video, pytest.raises(FormatError, match=r"ends after .* are wanted"):
        list(video.frames(start_s=first / FPS, num_frames=101 - first))


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 0.6, 0.85])
def test_a_file_that_was_cut_short_is_refused_and_never_gives_fewer_frames(tmp_path, suffix, share):
    path = write_video(tmp_path / f"a{suffix}", noise(60))
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(FormatError, match=f"a{suffix}: "):
        read(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_flipped_bytes_give_every_frame_or_a_refusal_that_names_the_file_and_no_delay(
    tmp_path, suffix
):
    path = write_video(tmp_path / f"a{suffix}", noise(40))
    whole, rng = path.read_bytes(), random.Random(0)
    outcomes = []
    began = time.monotonic()
    for _ in range(25):
        torn = bytearray(whole)
        for _ in range(6):
            torn[rng.randrange(len(torn))] ^= 1 << rng.randrange(8)
        path.write_bytes(torn)
        try:
            outcomes.append(len(read(path)))
        except FormatError as error:
            assert f"a{suffix}: " in str(error)  # noqa: PT017 # not every flip is an error
            outcomes.append(0)
    assert time.monotonic() - began < 60
    assert set(outcomes) <= {0, 40}
    if suffix in (".mp4", ".mov"):  # codecs that notice; VP9 and gif have nothing to notice it by
        assert outcomes.count(0) > 15


def test_a_damaged_frame_is_named_by_its_number(tmp_path):
    path = write_video(tmp_path / "a.mp4", noise(40), options={"crf": "5", "g": "10", "bf": "0"})
    with av.open(str(path)) as container:
        sizes = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    torn = bytearray(path.read_bytes())
    start, size = sizes[25]
    torn[start + size // 4 : start + size // 2] = bytes(size // 2 - size // 4)
    path.write_bytes(torn)
    with pytest.raises(FormatError, match=r"a\.mp4: frame 2[5-9] (is damaged|cannot be read)"):
        read(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"rubbish" * 100,
        b"\0" * 4096,
        b"RIFF\x10\0\0\0AVI LIST",
        b"GIF89a\x40\0\x40\0\0\0\0;",
        b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n",
        b"ffconcat version 1.0\nfile real.webm\n",
        b"<?xml version='1.0'?><MPD></MPD>",
    ],
)
def test_what_is_no_video_is_refused_whatever_its_name(tmp_path, content):
    write_video(tmp_path / "real.webm", played("none", 3).frames_THWC)
    for suffix in SUFFIXES:
        path = tmp_path / f"a{suffix}"
        path.write_bytes(content)
        with pytest.raises(FormatError, match=f"a{suffix}: "):
            read(path)


def test_a_file_that_is_missing_a_folder_or_a_pipe_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "folder.mp4").mkdir()
    for name, said in (("pipe", "not an ordinary"), ("folder", "not an ord"), ("no", "not found")):
        with pytest.raises(FormatError, match=rf"{name}\.mp4: {said}"):
            VideoFile(tmp_path / f"{name}.mp4")


def test_names_that_ffmpeg_would_take_for_orders_are_names(tmp_path, monkeypatch):
    frames = played("none", 5).frames_THWC
    monkeypatch.chdir(tmp_path)
    for name in ("concat:a|b.mp4", "http:x.mp4", "a%03d.mp4", "-i.mp4", "a\nb.mp4", "é ü.mp4"):
        write_video(tmp_path / "plain.mp4", frames).rename(tmp_path / name)
        assert len(read(Path(name))) == 5
    os.rename(write_video(tmp_path / "plain.mp4", frames), b"\xff\xfe.mp4")
    assert len(read(Path(os.fsdecode(b"\xff\xfe.mp4")))) == 5


def write_times(path: Path, times_ms: list[int], rate: int = 20) -> Path:
    """Write a video whose frames are shown at these times."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"bf": "0"})
        stream.height = stream.width = 64
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for picture, at in zip(played("none", len(times_ms)).frames_THWC, times_ms, strict=True):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = at, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def test_a_rate_that_varies_is_refused_and_taken_as_it_comes_where_the_rate_is_given(tmp_path):
    path = write_times(tmp_path / "a.mp4", [0, 50, 100, 150, 250, 300, 350, 400, 450])
    with pytest.raises(FormatError, match=r"the rate varies.*--fps says at what rate"):
        read(path)
    assert steps(read(path, fps=20.0)) == list(range(9))
    jitter = [at + 8 * (-1) ** (at // 50) + 8 for at in range(0, 1000, 50)]
    assert len(read(write_times(tmp_path / "b.mp4", jitter))) == 20


def test_a_rate_in_times_of_whole_milliseconds_or_hundredths_is_steady(tmp_path):
    for name, fps in (
        ("a.webm", 30),
        ("a.gif", 25),
        ("a.mkv", 60),
        ("a.mp4", Fraction(30000, 1001)),
    ):
        path = write_video(tmp_path / name, played("none", 60).frames_THWC, fps=fps)
        with VideoFile(path) as video:
            assert abs(video.fps / float(fps) - 1) < 0.01
            assert len(list(video.frames())) == 60


@pytest.mark.parametrize(("degrees", "turns"), [(90, 1), (180, 2), (270, 3)])
def test_a_video_that_asks_to_be_turned_is_turned(tmp_path, degrees, turns):
    frames = played("none", 3).frames_THWC[:, :, :32]
    path = write_video(tmp_path / "a.mp4", frames)
    plain = read(path)
    content = bytearray(path.read_bytes())
    # The matrix of the track's header: a turn is written with ones (0x10000) and minus ones.
    at = content.index(b"tkhd") + 4 + 40
    one, minus = (0x10000).to_bytes(4, "big"), (0xFFFF0000).to_bytes(4, "big")
    a, b, c, d = {
        90: (b"\0" * 4, minus, one, b"\0" * 4),
        180: (minus, b"\0" * 4, b"\0" * 4, minus),
        270: (b"\0" * 4, one, minus, b"\0" * 4),
    }[degrees]
    content[at : at + 8], content[at + 12 : at + 20] = a + b, c + d
    path.write_bytes(content)
    for frame, before in zip(read(path), plain, strict=True):
        assert np.array_equal(frame, np.rot90(before, turns))


def test_a_frame_of_a_size_that_no_machine_holds_is_refused_before_it_is_asked_for(tmp_path):
    path = write_video(tmp_path / "a.gif", played("none", 3).frames_THWC)
    content = bytearray(path.read_bytes())
    content[6:10] = b"\xff\xff\xff\xff"  # a canvas of 65535x65535
    path.write_bytes(content)
    with pytest.raises(FormatError, match=r"a\.gif"):
        read(path)
