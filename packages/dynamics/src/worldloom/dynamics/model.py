"""The dynamics model: codes and actions -> logits of the next latent frame's codes.

    codes_Bthw, slots_BTA (r per latent frame after the first)  ->  logits_BfSV, f = 1 .. t-1

Codes enter as their codebook vectors (a fixed table from the shards) through a learned
projection, with a learned vector per code beside it; a learned embedding of the cell tells the
grid apart. Logits leave through an untied head: FIELD measurements of tied heads are in
docs/log.md.

Source: the recipe of genie2-pytorch, without the defects that DESIGN lists; the previous-frame
input and the learned cell embedding are what made the largest difference (docs/log.md).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from einops import rearrange
from torch import Tensor, nn
from worldloom.common import (
    ActionSpec,
    ConfigError,
    FormatError,
    TokenizerSpec,
    bind_shape,
    build,
    library_seed,
    load_model,
    load_weights,
    save_model,
    to_plain,
)

from .actions import ActionEmbedding
from .config import DynamicsConfig
from .kv_cache import KVCache
from .meta_tokens import MetaTokens
from .positions import Rotary, join, no_rotation, rotary
from .sequence import Grid, shift_before, shift_beside, sight_mask
from .transformer import Sight, Transformer


@dataclass(frozen=True, slots=True, kw_only=True)
class DynamicsSpec:
    """What a dynamics model was trained on: it works with nothing else."""

    tokenizer: TokenizerSpec
    actions: ActionSpec
    fps: float
    """Pixel frames per second of the world."""
    frame_skip: int
    """Game frames per pixel frame."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "tokenizer": self.tokenizer.to_dict(),
            "actions": self.actions.to_dict(),
            "fps": self.fps,
            "frame_skip": self.frame_skip,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], /, *, where: str) -> Self:
        """Rebuild from JSON values; `where` names the file in errors."""
        try:
            return cls(
                tokenizer=TokenizerSpec.from_dict(data["tokenizer"], where=where),
                actions=ActionSpec.from_dict(data["actions"], where=where),
                fps=float(data["fps"]),
                frame_skip=int(data["frame_skip"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError(f"{where}: the spec lacks or garbles {error}") from error


@dataclass(frozen=True, slots=True)
class Asked:
    """Which cells are asked for in a rollout, and what they may know."""

    frame: int
    """Index of the latent frame in the video; the frames before it are in the cache."""
    cells: slice
    """Which cells; those before them in the order are decided."""
    before_BS: Tensor
    """Codes of the latent frame before; not looked at for frame 0."""
    codes_BS: Tensor
    """Codes of this frame, as far as they are decided."""
    slots_BrA: Tensor | None
    """The actions that lead to this frame; None for frame 0."""


class DynamicsModel(nn.Module):
    """A transformer with meta tokens over the codes of a window."""

    def __init__(
        self,
        config: DynamicsConfig,
        spec: DynamicsSpec,
        codebook_VZ: npt.NDArray[np.float32],
        /,
        *,
        seed: int = 0,
    ) -> None:
        """Build it with fresh weights.

        Args:
            config: its sizes.
            spec: what it will be trained on.
            codebook_VZ: codebook vectors of the tokenizer, as `TokenShards.codebook_VZ` gives them.
            seed: of the weights.
        """
        super().__init__()
        codes = spec.tokenizer.codes
        if codes.num_levels != 1:
            raise ConfigError(
                f"dynamics: these shards have {codes.num_levels} residual levels a cell; "
                "this version learns one. Tokenize with a quantizer of one level"
            )
        self.config = config
        self.spec = spec
        self.grid = Grid(codes.grid_height, codes.grid_width, config.order)
        self.steps_per_frame = codes.frames_per_latent
        vectors = torch.from_numpy(np.array(codebook_VZ, np.float32))
        bind_shape("codebook", vectors, "V Z", V=codes.vocab_size, Z=codes.code_dim)
        with library_seed(seed, "dynamics-weights"):
            self.meta = MetaTokens(config.num_meta_tokens, config.dim)
            # Row V stands for "no code": before the first frame, beside the first cell.
            self.before = CodeEmbedding(vectors, config.dim)
            self.beside = CodeEmbedding(vectors, config.dim) if self.grid.beside else None
            self.cell = nn.Embedding(self.grid.cells, config.dim)
            nn.init.normal_(self.cell.weight, std=0.5)
            self.actions = ActionEmbedding(spec.actions, steps=self.steps_per_frame, dim=config.dim)
            self.transformer = Transformer(config)
            self.to_logits = nn.Linear(config.dim, codes.vocab_size)
            nn.init.normal_(self.to_logits.weight, std=0.02)
        self._windows: dict[tuple[int, torch.device], tuple[Rotary, Tensor]] = {}

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.cell.weight.device

    def forward(
        self, codes_Bthw: Tensor, slots_BTA: Tensor, /, *, inputs_Bthw: Tensor | None = None
    ) -> Tensor:
        """Return logits_BfSV of latent frames 1 .. t-1, each from what lies before it.

        Args:
            codes_Bthw: int64 in [0, V), t >= 2 latent frames.
            slots_BTA: int64 slots of the r (t - 1) steps between them; NULL where none is known.
            inputs_Bthw: codes to feed instead of the true ones (corrupted ones, in training).

        Raises:
            ShapeError: if the grid or the number of steps is not the spec's.
        """
        codes_BtS = self._codes_BtS(codes_Bthw)
        batch, frames = codes_BtS.shape[:2]
        fed_BtS = codes_BtS if inputs_Bthw is None else self._codes_BtS(inputs_Bthw)
        slots_BfrA = self._slots_BfrA(slots_BTA, batch, frames)
        first, no_code = self.grid.first_frame, self.spec.tokenizer.codes.vocab_size
        before_BtS = shift_before(fed_BtS, pad=no_code)
        beside_BtS = shift_beside(fed_BtS, self.grid, pad=no_code)
        every = slice(0, self.grid.cells)
        parts = [self._feed(before_BtS[:, 1:], beside_BtS[:, 1:], slots_BfrA, every)]
        if first == 0:  # no action leads to frame 0
            parts.insert(0, self._feed(before_BtS[:, :1], beside_BtS[:, :1], None, every))
        tokens_BLD = torch.cat([part.flatten(1, 2) for part in parts], dim=1)
        tokens_BLD = torch.cat([self.meta(batch).to(tokens_BLD.dtype), tokens_BLD], dim=1)
        turn, mask = self._window(frames, first)
        out_BLD = self.transformer(tokens_BLD, turn, Sight(mask))
        skip = self.config.num_meta_tokens + (1 - first) * self.grid.cells
        logits_BLV: Tensor = self.to_logits(out_BLD[:, skip:])
        return rearrange(logits_BLV, "B (f S) V -> B f S V", S=self.grid.cells)

    def start_cache(self, *, batch: int) -> KVCache:
        """Return a rollout's cache that holds the meta tokens and no frame yet."""
        cache = KVCache.allocate(self.config, self.grid, batch=batch, device=self.device)
        num_meta = self.config.num_meta_tokens
        if num_meta:
            turn = no_rotation(num_meta, head_dim=self.head_dim, device=self.device)
            here = slice(0, num_meta)
            self.transformer(self.meta(batch), turn, Sight(None, cache, here, num_meta))
        return cache

    def cached_logits(self, asked: "Asked", cache: KVCache, /) -> Tensor:
        """Return logits_BsV of some cells of one frame, and put their keys into the cache."""
        grid, no_code = self.grid, self.spec.tokenizer.codes.vocab_size
        frame, cells = asked.frame, asked.cells
        before_BS = asked.before_BS if frame else torch.full_like(asked.before_BS, no_code)
        beside_BfS = shift_beside(asked.codes_BS, grid, pad=no_code)[:, None]
        slots_BfrA = None if asked.slots_BrA is None else asked.slots_BrA[:, None]
        tokens_BfsD = self._feed(before_BS[:, None], beside_BfS, slots_BfrA, cells)
        places = (
            place.to(self.device)
            for place in grid.places(frame, frame + 1, cells.start, cells.stop)
        )
        turn = rotary(*places, head_dim=self.head_dim)
        there = cache.places(frame, cells.start, cells.stop)
        visible = cache.visible(frame)
        mask = None
        if grid.group < grid.cells:
            # Of its own frame a token sees the groups up to its own; what lies behind them is left
            # over from the frame that slid out.
            group = torch.arange(grid.cells, device=self.device) // grid.group
            own = cache.places(frame, 0, grid.cells)
            mask = torch.ones(len(group[cells]), visible, dtype=torch.bool, device=self.device)
            mask[:, own] = group[None, :] <= group[cells, None]
        out_BsD = self.transformer(tokens_BfsD[:, 0], turn, Sight(mask, cache, there, visible))
        logits_BsV: Tensor = self.to_logits(out_BsD)
        return logits_BsV

    @property
    def head_dim(self) -> int:
        """Width of one attention head, K."""
        return self.config.dim // self.config.num_heads

    def _codes_BtS(self, codes_Bthw: Tensor) -> Tensor:
        """Check codes against the grid and flatten the cells."""
        bind_shape("codes", codes_Bthw, "B t h w", h=self.grid.height, w=self.grid.width)
        return codes_Bthw.flatten(2)

    def _slots_BfrA(self, slots_BTA: Tensor, batch: int, frames: int) -> Tensor:
        """Check slots against the frames and cut them into the r steps of every latent frame."""
        bind_shape(
            "actions", slots_BTA, "B T A",
            B=batch, T=(frames - 1) * self.steps_per_frame, A=self.spec.actions.num_slots,
        )  # fmt: skip
        return rearrange(slots_BTA, "B (f r) A -> B f r A", r=self.steps_per_frame)

    def _feed(
        self, before_BfS: Tensor, beside_BfS: Tensor, slots_BfrA: Tensor | None, cells: slice
    ) -> Tensor:
        """Return tokens_BfsD: the sum of what every token is fed."""
        tokens_BfsD: Tensor = self.before(before_BfS[..., cells]) + self.cell.weight[cells]
        if self.beside is not None:
            tokens_BfsD = tokens_BfsD + self.beside(beside_BfS[..., cells])
        if slots_BfrA is not None:
            tokens_BfsD = tokens_BfsD + self.actions(slots_BfrA)[:, :, None]
        return tokens_BfsD

    def _window(self, frames: int, first: int) -> tuple[Rotary, Tensor]:
        """Return rotation and mask of a training window, meta tokens first."""
        key = (frames, self.device)
        if key not in self._windows:
            frames_L, rows_L, columns_L = (
                place.to(self.device) for place in self.grid.places(first, frames)
            )
            turn = join(
                no_rotation(
                    self.config.num_meta_tokens, head_dim=self.head_dim, device=self.device
                ),
                rotary(frames_L, rows_L, columns_L, head_dim=self.head_dim),
            )
            mask = sight_mask(
                frames_L, rows_L * self.grid.width + columns_L,
                grid=self.grid,
                context_frames=self.config.context_frames,
                num_meta=self.config.num_meta_tokens,
            )  # fmt: skip
            self._windows[key] = (turn, mask)
        return self._windows[key]

    def save(self, folder: Path, /, *, card: str) -> None:
        """Write a model directory that `from_pretrained` reads."""
        config = {"dynamics": to_plain(self.config), "spec": self.spec.to_dict()}
        save_model(folder, kind="dynamics", config=config, weights=self.state_dict(), card=card)

    @classmethod
    def from_pretrained(cls, folder: Path, /, *, device: str = "cpu") -> Self:
        """Load a model directory, ready to generate.

        Raises:
            FormatError: if a file is missing, altered, or does not fit the config.
        """
        config, weights = load_model(folder, kind="dynamics")
        where = str(folder / "config.json")
        if set(config) != {"dynamics", "spec"}:
            raise FormatError(f"{where}: lacks a field of a dynamics model's config")
        sizes = build(DynamicsConfig, config["dynamics"], where=where, error=FormatError)
        spec = DynamicsSpec.from_dict(config["spec"], where=where)
        codes = spec.tokenizer.codes
        model = cls(sizes, spec, np.zeros((codes.vocab_size, codes.code_dim), np.float32))
        load_weights(model, weights, where=str(folder))
        model.eval().requires_grad_(requires_grad=False)
        return model.to(device)


class CodeEmbedding(nn.Module):
    """Codes -> vectors: the codebook vector through a projection, plus a learned vector.

    The codebook vector tells at the first step already which codes look alike; the learned one adds
    what looks do not tell. Entry V stands for "no code".
    """

    def __init__(self, codebook_VZ: Tensor, dim: int) -> None:
        super().__init__()
        vectors = torch.cat([codebook_VZ, torch.zeros_like(codebook_VZ[:1])])
        self.register_buffer("vectors", vectors)
        self.vectors: Tensor
        # Codebooks come at any scale; the projection should see unit variance.
        self.register_buffer("scale", codebook_VZ.std().clamp_min(1e-6).reciprocal())
        self.scale: Tensor
        self.latent_to_model = nn.Linear(codebook_VZ.shape[1], dim, bias=False)
        self.learned = nn.Embedding(len(vectors), dim)
        nn.init.normal_(self.learned.weight, std=0.02)

    def forward(self, codes: Tensor, /) -> Tensor:
        """Return vectors of codes of any shape, with a last axis D."""
        projected: Tensor = self.latent_to_model(self.vectors[codes] * self.scale)
        return projected + self.learned(codes)
