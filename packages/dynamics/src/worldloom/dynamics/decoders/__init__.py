"""How the codes of a latent frame are decided: group by group or many at once; the same codes.

    a function that draws some groups' codes, a guess at all  ->  Decoder.decide  ->  codes_BSQ

With the noise fixed, sampling is a function: the codes of a group of cells (a cell or a row: the
model's order) from those of the groups before it. drawing.py has it, for one frame of a rollout. A
decoder chooses for which groups to call it and when; each call is one forward of the model.
"""

from ..sampling_config import DecoderName
from .auto import Auto as Auto
from .decoder import Decoder as Decoder
from .decoder import Draw as Draw
from .drawing import FrameDraw as FrameDraw
from .jacobi import Jacobi as Jacobi
from .raster import Raster as Raster


def open_decoder(name: DecoderName, /) -> Decoder:
    """Return a decoder that has decided nothing yet."""
    match name:
        case "raster":
            return Raster()
        case "jacobi":
            return Jacobi()
        case "auto":
            return Auto()
