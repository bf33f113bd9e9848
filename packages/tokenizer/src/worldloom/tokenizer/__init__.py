"""Tokenizer: pixels to codes and back, and how to train what does it."""

from typing import TYPE_CHECKING

from worldloom.common import lazy_exports

if TYPE_CHECKING:
    from .clips import Clips as Clips
    from .config import QuantizerConfig as QuantizerConfig
    from .config import TokenizerConfig as TokenizerConfig
    from .discriminator import PatchDiscriminator as PatchDiscriminator
    from .metrics import usage as usage
    from .model import ConvTokenizer as ConvTokenizer
    from .model import Trained as Trained
    from .pixels import resize_frames as resize_frames
    from .pixels import to_frames as to_frames
    from .pixels import to_video as to_video
    from .protocol import DecoderSession as DecoderSession
    from .protocol import EncoderSession as EncoderSession
    from .protocol import VideoTokenizer as VideoTokenizer
    from .registry import load_tokenizer as load_tokenizer
    from .training import train_conv_tokenizer as train_conv_tokenizer
    from .training_config import TokenizerTrainingConfig as TokenizerTrainingConfig
    from .training_config import check_fit as check_fit

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "clips": ("Clips",),
        "config": ("QuantizerConfig", "TokenizerConfig"),
        "discriminator": ("PatchDiscriminator",),
        "metrics": ("usage",),
        "model": ("ConvTokenizer", "Trained"),
        "pixels": ("resize_frames", "to_frames", "to_video"),
        "protocol": ("DecoderSession", "EncoderSession", "VideoTokenizer"),
        "registry": ("load_tokenizer",),
        "training": ("train_conv_tokenizer",),
        "training_config": ("TokenizerTrainingConfig", "check_fit"),
    },
)
