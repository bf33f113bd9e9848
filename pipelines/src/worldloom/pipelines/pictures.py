"""Frames -> what people look at: labelled sheets, side-by-side movies, PNG, GIF, mp4.

    rows of frames_THWC   -> draw_sheet -> picture_HWC    every frame, its label above it
    columns of frames     -> draw_movie -> frames_THWC    beside each other, one caption a frame
    picture, frames       -> encode_png, encode_gif, encode_mp4 -> bytes

Everything is uint8 RGB. Frames are only ever enlarged by whole factors and repeated pixels, so what
is seen is what the model made.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache

import av
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from worldloom.common import Frames

PAPER = (21, 23, 28)
INK = (232, 234, 237)
QUIET = (150, 156, 166)
"""Colours of paper, text and lesser text: one dark sheet, whatever the theme around it."""

_GAP = 6
_MARGIN = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Strip:
    """Frames of one kind in a picture: what really happened, say, or one sample."""

    title: str
    frames_THWC: Frames
    labels: Sequence[str] = ()
    """One text a frame, drawn above it; empty for none."""


def enlarge(frames: Frames, /, *, times: int) -> Frames:
    """Return (..., H * times, W * times, C): every pixel becomes a square of `times` x `times`."""
    return frames.repeat(times, axis=-3).repeat(times, axis=-2)


def fitting_scale(height: int, width: int, /, *, target: int) -> int:
    """Return the largest whole factor that keeps both sides within `target`, at least 1."""
    return max(1, target // max(height, width))


def draw_sheet(strips: Sequence[Strip], /, *, scale: int, columns: int = 8) -> Frames:
    """Return picture_HWC: the strips under each other, in blocks of `columns` frames.

    Frame i of every strip stands in the same column of the same block, so that strips compare from
    top to bottom. A strip that ends early leaves its places empty.

    Raises:
        ValueError: if there is nothing to draw, or a strip has labels but not one a frame.
    """
    for strip in strips:
        if strip.labels and len(strip.labels) != len(strip.frames_THWC):
            raise ValueError(
                f"{strip.title}: {len(strip.labels)} labels for {len(strip.frames_THWC)} frames"
            )
    longest = max((len(strip.frames_THWC) for strip in strips), default=0)
    if longest == 0:
        raise ValueError("a sheet needs at least one frame")
    height, width = (size * scale for size in strips[0].frames_THWC.shape[1:3])
    columns = min(columns, longest)
    title_width = max(_text_width(strip.title, 14) for strip in strips)
    title_width += _MARGIN if title_width else 0
    rows = [height + _GAP + (18 if strip.labels else 0) for strip in strips]
    blocks = -(-longest // columns)
    block_height = sum(rows) + _MARGIN
    size = (
        2 * _MARGIN + title_width + columns * (width + _GAP) - _GAP,
        2 * _MARGIN + blocks * block_height - _GAP - _MARGIN,
    )
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    for block in range(blocks):
        y = _MARGIN + block * block_height
        for strip, row in zip(strips, rows, strict=True):
            label_height = 18 if strip.labels else 0
            middle = y + label_height + height // 2
            draw.text((_MARGIN, middle), strip.title, INK, _font(14), anchor="lm")
            for column in range(columns):
                index = block * columns + column
                if index >= len(strip.frames_THWC):
                    break
                x = _MARGIN + title_width + column * (width + _GAP)
                if strip.labels:
                    text = _shorten(strip.labels[index], 12, width)
                    draw.text((x + width // 2, y + 8), text, QUIET, _font(12), anchor="mm")
                frame = enlarge(strip.frames_THWC[index], times=scale)
                sheet.paste(Image.fromarray(frame), (x, y + label_height))
            y += row
    return np.asarray(sheet)


def draw_movie(columns: Sequence[Strip], /, *, scale: int, captions: Sequence[str] = ()) -> Frames:
    """Return frames_THWC: the strips beside each other, titles above, one caption a frame below.

    Where one strip is shorter than the longest, its last frame stays.

    Raises:
        ValueError: if there is nothing to draw, or the captions are not one a frame.
    """
    length = max((len(strip.frames_THWC) for strip in columns), default=0)
    if length == 0 or any(len(strip.frames_THWC) == 0 for strip in columns):
        raise ValueError("a movie needs at least one frame in every column")
    if captions and len(captions) != length:
        raise ValueError(f"{len(captions)} captions for {length} frames")
    height, width = (size * scale for size in columns[0].frames_THWC.shape[1:3])
    top = 26 if any(strip.title for strip in columns) else 0
    bottom = 26 if captions else 0
    size = (len(columns) * (width + _GAP) - _GAP, top + height + bottom)
    movie = []
    for index in range(length):
        page = Image.new("RGB", size, PAPER)
        draw = ImageDraw.Draw(page)
        for number, strip in enumerate(columns):
            x = number * (width + _GAP)
            title = _shorten(strip.title, 14, width)
            draw.text((x + width // 2, top // 2), title, INK, _font(14), anchor="mm")
            frame = strip.frames_THWC[min(index, len(strip.frames_THWC) - 1)]
            page.paste(Image.fromarray(enlarge(frame, times=scale)), (x, top))
        if captions:
            text = _shorten(captions[index], 14, size[0])
            draw.text((size[0] // 2, top + height + 13), text, QUIET, _font(14), anchor="mm")
        movie.append(np.asarray(page))
    return np.stack(movie)


def encode_png(picture_HWC: Frames, /) -> bytes:
    """Return the bytes of a PNG file."""
    return _save(Image.fromarray(picture_HWC), "PNG")


def encode_gif(frames_THWC: Frames, /, *, fps: float) -> bytes:
    """Return the bytes of an endless GIF.

    All frames share one palette (a palette a frame flickers), and there is no dithering: up to 256
    colours are exact. GIF counts in hundredths of a second, and browsers slow down anything above
    50 frames a second, so the pace is the nearest that they keep.
    """
    palette = _palette(frames_THWC)
    pages = [
        Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE)
        for frame in frames_THWC
    ]
    return _save(
        pages[0],
        "GIF",
        save_all=True,
        append_images=pages[1:],
        duration=10 * max(2, round(100 / fps)),
        loop=0,
        optimize=False,
    )


def encode_mp4(frames_THWC: Frames, /, *, fps: float) -> bytes:
    """Return the bytes of an mp4 file, H.264 at near-lossless quality, playable in any browser.

    Odd sides lose nothing: a last row or column is repeated, because 4:2:0 needs even ones.
    """
    height, width = frames_THWC.shape[1:3]
    pad = ((0, 0), (0, height % 2), (0, width % 2), (0, 0))
    frames = np.pad(frames_THWC, pad, mode="edge")
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", Fraction(fps).limit_denominator(1001))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "12", "preset": "veryfast"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def _palette(frames_THWC: Frames) -> Image.Image:
    """Return a palette image: every colour there is, or the 256 that serve best."""
    packed = frames_THWC[..., 0].astype(np.uint32)
    for channel in (1, 2):  # in place: a movie is large
        packed <<= 8
        packed |= frames_THWC[..., channel]
    common, counts = np.unique(packed, return_counts=True)
    # Of too many, the commonest stay exact (paper, sky, walls); median cut finds the others.
    exact = common[np.argsort(-counts, kind="stable")[: 256 if len(common) <= 256 else 32]]
    colours = np.stack([exact >> 16, exact >> 8 & 255, exact & 255], 1).astype(np.uint8).tobytes()
    if len(common) > 256:
        # A palette needs the colours, not every pixel; thinning keeps it under a second.
        step = max(1, round((packed.size / 300_000) ** 0.5))
        thinned = np.concatenate(list(frames_THWC[:, ::step, ::step]))
        others = Image.fromarray(thinned).quantize(224, Image.Quantize.MEDIANCUT, kmeans=1)
        colours += bytes(others.getpalette() or [])[: 3 * 224]
    palette = Image.new("P", (1, 1))
    palette.putpalette(colours)
    return palette


def _save(picture: Image.Image, kind: str, **options: object) -> bytes:
    """Return the picture's bytes in a file format."""
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Return Pillow's own font, so that pictures are the same on every machine."""
    return ImageFont.load_default(size)


def _text_width(text: str, size: int) -> int:
    """Return the width of a text in pixels."""
    return round(_font(size).getlength(text))


def _shorten(text: str, size: int, width: int) -> str:
    """Return the text, cut to fit a width, with an ellipsis where it was cut."""
    if _text_width(text, size) <= width:
        return text
    while text and _text_width(text + "…", size) > width:
        text = text[:-1]
    return text + "…"
