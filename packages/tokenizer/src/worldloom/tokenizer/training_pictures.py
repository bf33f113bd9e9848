"""What a person looks at while a tokenizer trains: pictures, as the bytes of PNG files.

true and reconstructed frames_BTHWC  ->  a row of true frames above each row of made ones
counts_QV of codes                   ->  a histogram for every level, the most used code first
"""

import io

import torch
from einops import rearrange
from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.utils import make_grid

from .codebook_health import measure

_WIDTH, _HEIGHT, _CAPTION, _MARGIN = 512, 96, 16, 6
"""Of one level's histogram, in pixels."""
_PAPER, _INK, _BAR = (255, 255, 255), (40, 40, 40), (46, 110, 180)


def reconstruction_png(true_BTHWC: Tensor, recon_BTHWC: Tensor, /) -> bytes:
    """Return a picture of two rows a clip: true frames, and under them the reconstructed ones.

    Args:
        true_BTHWC: uint8, on the CPU.
        recon_BTHWC: uint8 of the same shape, on the CPU.
    """
    pairs = torch.stack([true_BTHWC, recon_BTHWC], dim=1)
    images = rearrange(pairs, "B pair T H W C -> (B pair T) C H W")
    grid_CHW = make_grid(images, nrow=true_BTHWC.shape[1], padding=1, pad_value=128)
    return _png(Image.fromarray(rearrange(grid_CHW, "C H W -> H W C").numpy()))


def usage_png(counts_QV: Tensor, /) -> bytes:
    """Return a histogram for every level: codes from the most to the least used, left to right.

    A bar's height is the logarithm of how often its codes occur; a code that never occurs has no
    bar, so the white on the right is what the codebook has too much. With more codes than columns
    a column shows the mean of its codes.

    Args:
        counts_QV: how often every code of every level occurs.
    """
    levels = measure(counts_QV)
    strip = _CAPTION + _HEIGHT + 2 * _MARGIN
    image = Image.new("RGB", (_WIDTH + 2 * _MARGIN, strip * len(levels)), _PAPER)
    draw = ImageDraw.Draw(image)
    for number, (level, counts_V) in enumerate(zip(levels, counts_QV.cpu(), strict=True)):
        top = number * strip + _MARGIN
        name = f"level {number + 1}: " if len(levels) > 1 else ""
        draw.text(
            (_MARGIN, top),
            f"{name}{level.num_used} of {level.num_codes} codes used in {level.num_cells} cells, "
            f"perplexity {level.perplexity:.1f}",
            fill=_INK,
        )
        floor = top + _CAPTION + _HEIGHT
        for column, height in enumerate(_columns(counts_V)):
            if height:
                left = _MARGIN + column
                draw.line((left, floor - 1, left, floor - height), fill=_BAR)
        draw.line((_MARGIN, floor, _MARGIN + _WIDTH - 1, floor), fill=_INK)
    return _png(image)


def _columns(counts_V: Tensor) -> list[int]:
    """Return the height of every column of pixels, from the most used code to the least."""
    ranked_V = counts_V.double().sort(descending=True).values
    edges = torch.linspace(0, len(ranked_V), _WIDTH + 1).long()
    first = edges[:-1].clamp(max=len(ranked_V) - 1)
    # With fewer codes than columns a code is several columns wide.
    last = torch.maximum(edges[1:], first + 1)
    sums = torch.cat([torch.zeros(1, dtype=torch.float64), ranked_V.cumsum(0)])
    means = (sums[last] - sums[first]) / (last - first)
    heights = means.log1p() / ranked_V[0].log1p().clamp(min=1e-9) * _HEIGHT
    # What occurs is seen, however seldom.
    return [int(h.ceil()) for h in heights]


def _png(image: Image.Image) -> bytes:
    """Return an image as the bytes of a PNG file."""
    file = io.BytesIO()
    image.save(file, "png")
    return file.getvalue()
