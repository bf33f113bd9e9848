"""Latents <-> codes. Every quantizer joins through one adapter; see `Quantizer`."""

from ..config import QuantizerConfig
from .adapter import Quantizer as Quantizer
from .fsq import FSQ as FSQ
from .lfq import LFQ as LFQ
from .residual import ResidualVQ as ResidualVQ
from .vq import VQ as VQ


def build_quantizer(config: QuantizerConfig, *, tokens_per_step: int) -> Quantizer:
    """Return the quantizer of a config, with a fresh codebook.

    Args:
        config: its settings.
        tokens_per_step: latents per training step, from which the threshold under which a code
            counts as dead follows; it does not matter after training.
    """
    match config.kind:
        case "vq":
            return VQ(config, tokens_per_step=tokens_per_step)
        case "fsq":
            return FSQ(config)
        case "lfq":
            return LFQ(config)
        case "residual":
            return ResidualVQ(config, tokens_per_step=tokens_per_step)
