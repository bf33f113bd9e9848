"""Our learned tokenizers: config, encode, decode, spec, from_pretrained.

    frames_BTHWC uint8  ->  codes_Bthw  ->  frames_BTHWC uint8

An encoder and a decoder of one of two architectures around any quantizer. The first latent frame
covers one frame, each later one r; a cell covers `config.stride` pixels a side. With residual
levels, codes have a last axis Q.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from worldloom.common import (
    FormatError,
    ShapeError,
    TokenizerSpec,
    bind_shape,
    build,
    fingerprint,
    library_seed,
    load_model,
    load_weights,
    save_model,
    to_plain,
)

from .config import TokenizerConfig
from .decoder import build_decoder
from .encoder import build_encoder
from .quantizers import build_quantizer
from .streaming import ConvDecoderSession, ConvEncoderSession, codes_letters, grid


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What the tokenizer was trained on, which its spec repeats."""

    fps: float
    """Pixel frames per second; 0 if it does not matter."""
    frame_skip: int
    """Game frames per pixel frame; 0 if it does not matter."""


@dataclass(frozen=True, slots=True)
class Reconstruction:
    """What one training forward gives."""

    video_BCTHW: Tensor
    """About [-1, 1]; bfloat16 under autocast."""
    codes_Bthw: Tensor
    """int64 in [0, V)."""
    quantizer_loss: Tensor
    """A scalar."""
    temporal_loss: Tensor
    """A scalar: what quantizer and convolutions over time together lose of the latents.

    Of the image architecture only, 0 otherwise: the temporal autoencoder of genie2-pytorch."""


class ConvTokenizer(nn.Module):
    """The tokenizers named "image" and "video". Implements VideoTokenizer."""

    def __init__(
        self,
        config: TokenizerConfig,
        *,
        trained: Trained,
        seed: int = 0,
        tokens_per_step: int = 2048,
    ) -> None:
        """Build it with fresh weights.

        Args:
            config: its sizes.
            trained: fps and frame skip of its episodes.
            seed: of the weights.
            tokens_per_step: latents per training step, from which follows when a code counts as
                dead; it does not matter after training.
        """
        super().__init__()
        self.config = config
        self.trained = trained
        with library_seed(seed, "tokenizer-weights"):
            self.encoder = build_encoder(config)
            self.decoder = build_decoder(config)
            self.quantizer = build_quantizer(config.quantizer, tokens_per_step=tokens_per_step)
        self._spec: TokenizerSpec | None = None

    @property
    def name(self) -> str:
        """Its entry point, which is its architecture."""
        return self.config.architecture

    def forward(self, video_BCTHW: Tensor, /) -> Reconstruction:
        """Encode and decode whole clips of 1 + kr frames at once, for training."""
        h, w = self.config.code_spec.grid_height, self.config.code_spec.grid_width
        latents_BZthw, _, still_BZthw = self.encoder(video_BCTHW)
        quantized_BNZ, codes, loss = self.quantizer(
            rearrange(latents_BZthw, "B Z t h w -> B (t h w) Z")
        )
        quantized_BZthw = rearrange(quantized_BNZ, "B (t h w) Z -> B Z t h w", h=h, w=w)
        recon_BCTHW, _, filtered_BZthw = self.decoder(quantized_BZthw)
        temporal_loss = recon_BCTHW.new_zeros(())
        if still_BZthw is not None and filtered_BZthw is not None:
            temporal_loss = mse_loss(filtered_BZthw.float(), still_BZthw.float())
        codes_Bthw = rearrange(codes, "B (t h w) ... -> B t h w ...", h=h, w=w)
        return Reconstruction(recon_BCTHW, codes_Bthw, loss, temporal_loss)

    @property
    def spec(self) -> TokenizerSpec:
        """What its codes mean, and its fingerprint.

        Outside training the fingerprint is computed once, until `train` or `load_state_dict` is
        called. Weights changed by hand in between are not noticed.
        """
        if self._spec is None or self.training:
            digest = fingerprint(
                to_plain(self.config),
                ((name, _bytes(tensor)) for name, tensor in self.state_dict().items()),
            )
            self._spec = TokenizerSpec(
                name=self.name,
                codes=self.config.code_spec,
                height=self.config.height,
                width=self.config.width,
                resize=self.config.resize,
                fps=self.trained.fps,
                frame_skip=self.trained.frame_skip,
                compute_dtype="float32",
                fingerprint=digest,
            )
        return self._spec

    def fingerprint(self) -> str:
        """Return the SHA-256 of config and weights, 64 hexadecimal digits."""
        return self.spec.fingerprint

    def train(self, mode: bool = True) -> Self:
        """Switch to training, or with False to evaluation; the spec is computed anew."""
        self._spec = None
        return super().train(mode)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Copy weights into it; the spec is computed anew."""
        self._spec = None
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    @property
    def codebook(self) -> Tensor:
        """The codebook vectors codebook_VZ (codebook_QVZ of residual levels), float32."""
        return self.quantizer.codebook

    def open_encoder(self) -> ConvEncoderSession:
        """Return a session that encodes streams from their first frame on."""
        return ConvEncoderSession(self.encoder, self.quantizer, self.config)

    def open_decoder(self) -> ConvDecoderSession:
        """Return a session that decodes streams from their first latent frame on."""
        return ConvDecoderSession(self.decoder, self.quantizer, self.config)

    def encode(self, frames_BTHWC: Tensor, /) -> Tensor:
        """Return codes_Bthw, int64 in [0, V), on the tokenizer's device.

        Frames that do not fill the last latent frame are followed by copies of the last.

        Args:
            frames_BTHWC: uint8, of the spec's height and width, at least one frame.

        Raises:
            ShapeError: if the frames are of another size, dtype or number.
        """
        if bind_shape("frames", frames_BTHWC, "B T H W C")["T"] == 0:
            raise ShapeError("frames: there are none; a video has at least one frame")
        session = self.open_encoder()
        return torch.cat([session.push(frames_BTHWC), session.flush()], dim=1)

    def decode(self, codes_Bthw: Tensor, /, *, num_frames: int) -> Tensor:
        """Return frames_BTHWC, uint8, on the tokenizer's device.

        Args:
            codes_Bthw: integers in [0, V), on the spec's grid.
            num_frames: how many frames to return, at most 1 + (t - 1) r.

        Raises:
            ShapeError: if the grid is another, or the codes cover fewer frames.
            FormatError: if a code is outside the vocabulary.
        """
        spec = self.config.code_spec
        letters = codes_letters(spec.num_levels)
        t = bind_shape("codes", codes_Bthw, letters, **grid(self.config))["t"]
        covered = spec.pixel_frames(t) if t else 0
        if not 1 <= num_frames <= covered:
            raise ShapeError(
                f"codes: {t} latent frames cover {covered} frames, asked for {num_frames}; "
                f"ask for 1 to {covered}"
            )
        needed = spec.latent_frames(num_frames)
        return self.open_decoder().push(codes_Bthw[:, :needed])[:, :num_frames]

    def save(self, folder: Path, /, *, card: str) -> None:
        """Write a model directory that `from_pretrained` reads."""
        config = {
            "name": self.name,
            "tokenizer": to_plain(self.config),
            "trained": to_plain(self.trained),
            "fingerprint": self.spec.fingerprint,
        }
        save_model(folder, kind="tokenizer", config=config, weights=self.state_dict(), card=card)

    @classmethod
    def from_pretrained(cls, folder: Path, /, *, device: str = "cpu") -> Self:
        """Load a model directory, ready to encode and decode.

        Raises:
            FormatError: if a file is missing, altered, or does not fit the config.
            MismatchError: if it holds another kind of model.
        """
        config, weights = load_model(folder, kind="tokenizer")
        where = str(folder / "config.json")
        if set(config) != {"name", "tokenizer", "trained", "fingerprint"}:
            raise FormatError(
                f"{where}: has the fields {', '.join(sorted(config))}; a tokenizer needs "
                "fingerprint, name, tokenizer, trained"
            )
        model = cls(
            build(TokenizerConfig, config["tokenizer"], where=where, error=FormatError),
            trained=build(Trained, config["trained"], where=where, error=FormatError),
        )
        if config["name"] != model.name:
            raise FormatError(
                f"{where}: its name is {config['name']!r:.60}, but its architecture is "
                f"{model.name!r}; the folder was changed by hand. Copy it again"
            )
        load_weights(model, weights, where=str(folder))
        model.eval().requires_grad_(requires_grad=False)
        if model.spec.fingerprint != config["fingerprint"]:
            raise FormatError(
                f"{folder}: the weights have fingerprint {model.spec.fingerprint[:16]}, but "
                f"config.json says {str(config['fingerprint'])[:16]}; the folder was put together "
                "from two. Copy it again"
            )
        return model.to(device)


def _bytes(tensor: Tensor) -> bytes:
    """Return the little-endian bytes of a tensor in row-major order."""
    return tensor.detach().cpu().contiguous().numpy().tobytes()


if TYPE_CHECKING:
    from .protocol import VideoTokenizer

    _conforms: type[VideoTokenizer] = ConvTokenizer  # mypy holds the class to the protocol
