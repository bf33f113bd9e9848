"""How the codes of a latent frame are decided: group by group or many at once; the same codes.

    a function that draws some groups' codes, a guess at all  ->  Decoder.decide  ->  codes_BSQ
    its name, the model's order                               ->  open_decoder    ->  Decoder

With the noise fixed, sampling is a function: the codes of a group of cells (a cell or a row: the
model's order) from those of the groups before it. drawing.py has it, for one frame of a rollout. A
decoder chooses for which groups to call it and when; each call is one forward of the model. Only
maskgit.py, for order masked, does not give the codes of that function but others, by choice.
"""

from ..config import Order
from ..sampling_config import DecoderName, named_decoder
from .auto import Auto as Auto
from .decoder import Decoder as Decoder
from .decoder import Draw as Draw
from .drawing import FrameDraw as FrameDraw
from .jacobi import Jacobi as Jacobi
from .maskgit import MaskGIT as MaskGIT
from .raster import Raster as Raster


def open_decoder(name: DecoderName, order: Order, /) -> Decoder:
    """Return a decoder that has decided nothing yet, for models of an order.

    Raises:
        ConfigError: if they do not take it.
    """
    name = named_decoder(name, order)
    if order == "masked":  # nothing else to choose from
        return MaskGIT()
    match name:
        case "jacobi":
            return Jacobi()
        case "auto":
            return Auto()
        case _:  # group by group; the names say what a group is
            return Raster()
