"""Latents <-> codes. Every quantizer joins through one adapter; see `Quantizer`."""

from .adapter import Quantizer as Quantizer
from .vq import VQ as VQ
