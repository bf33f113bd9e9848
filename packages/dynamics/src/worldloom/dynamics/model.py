"""The dynamics model: codes and actions -> logits of the next latent frame's codes.

    codes_Bthw, slots_BTA (r per latent frame after the first)  ->  logits_BfSV, f = 1 .. t-1
    codes_BthwQ where cells have levels, slots_BTA              ->  logits_BfSQV

Codes enter as their codebook vectors (a fixed table from the shards) through a learned
projection, with a learned vector per code beside it; a learned embedding of the cell tells the
grid apart, and every token is fed its own cell's code one frame before. Logits leave through an
untied head: heads tied to the codebook (dot product, distance) learned far less in prototypes.
There is one token a cell, however many levels it has: see level_head.py. Inside, codes always have
a last axis Q.

Source: the recipe of genie2-pytorch, without the defects that DESIGN lists.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt
import torch
from einops import rearrange
from torch import Tensor, nn
from worldloom.common import (
    CodeSpec,
    FormatError,
    ShapeError,
    bind_shape,
    build,
    library_seed,
    load_model,
    load_weights,
    save_model,
    to_plain,
)

from .actions import ActionEmbedding
from .code_embedding import CodeEmbedding
from .config import DynamicsConfig
from .kv_cache import CacheView, KVCache
from .level_head import LevelHead
from .meta_tokens import MetaTokens
from .positions import Rotary, Rotation, beside, in_space, in_time, join, no_place, rotary
from .sequence import Grid, flatten_codes, shift_before, shift_beside, sight_mask
from .spec import DynamicsSpec
from .transformer import Sight, Transformer


@dataclass(frozen=True, slots=True)
class OpenFrame:
    """A latent frame that is being decided: all that is the same for each of its cells' forwards.

    `DynamicsModel.open_frame` makes it.
    """

    frame: int
    """Index of the latent frame in the video; the frames before it are in the cache."""
    before_BSQ: Tensor
    """Codes of the frame before."""
    fed_BSD: Tensor
    """What every token is fed, but for the code beside it."""
    turn: Rotation
    """Every token's rotation."""
    mask_SM: Tensor | None
    """Which of the visible keys every token may see; None for all."""
    cache: KVCache


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
            codebook_VZ: codebook vectors of the tokenizer, as `TokenShards.codebook_VZ` gives them:
                (V, Z), or (Q, V, Z) where cells have levels.
            seed: of the weights.

        Raises:
            ShapeError: if the codebook is not the spec's.
        """
        super().__init__()
        codes = spec.tokenizer.codes
        self.config = config
        self.spec = spec
        self.grid = Grid(codes.grid_height, codes.grid_width, config.order)
        self.steps_per_frame = codes.frames_per_latent
        codebook_QVZ = _codebook_QVZ(codebook_VZ, codes)
        with library_seed(seed, "dynamics-weights"):
            self.meta = MetaTokens(config.num_meta_tokens, config.dim)
            self.before = CodeEmbedding(codebook_QVZ, config.dim)
            self.beside = CodeEmbedding(codebook_QVZ, config.dim) if self.grid.beside else None
            self.cell = nn.Embedding(self.grid.cells, config.dim)
            nn.init.normal_(self.cell.weight, std=0.5)
            self.actions = ActionEmbedding(spec.actions, steps=self.steps_per_frame, dim=config.dim)
            self.transformer = Transformer(config)
            self.to_logits = nn.Linear(config.dim, codes.vocab_size)
            nn.init.normal_(self.to_logits.weight, std=0.02)
            self.level_head = (
                LevelHead(codebook_QVZ, dim=config.dim, ff_mult=config.ff_mult)
                if codes.num_levels > 1
                else None
            )
        self._add_frame_constants()
        self._kept: tuple[tuple[int, torch.device], tuple[Rotation, Tensor]] | None = None

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.cell.weight.device

    def forward(
        self, codes_Bthw: Tensor, slots_BTA: Tensor, /, *, inputs_Bthw: Tensor | None = None
    ) -> Tensor:
        """Return logits_BfSV of latent frames 1 .. t-1, each from what lies before it.

        Where cells have levels, logits_BfSQV: level q also from the true codes of its own cell's
        levels below q.

        Args:
            codes_Bthw: int64 in [0, V), t >= 2 latent frames.
            slots_BTA: int64 slots of the r (t - 1) steps between them; NULL where none is known.
            inputs_Bthw: codes to feed instead of the true ones (corrupted ones, in training). Not
                below a level: what a wrong code leaves over for the next level, nobody knows.

        Raises:
            ShapeError: if grid, levels or number of steps are not the spec's, or t is below 2.
        """
        codes = self.spec.tokenizer.codes
        codes_BtSQ = flatten_codes("codes", codes_Bthw, codes)
        batch, frames = codes_BtSQ.shape[:2]
        if frames < 2:
            raise ShapeError(f"codes: {frames} latent frames; a frame is predicted from one before")
        fed_BtSQ = codes_BtSQ
        if inputs_Bthw is not None:
            fed_BtSQ = flatten_codes("inputs", inputs_Bthw, codes)
        slots_BfrA = self._slots_BfrA(slots_BTA, batch, frames)
        first, no_code = self.grid.first_frame, codes.vocab_size
        before_BtSQ = shift_before(fed_BtSQ, pad=no_code)
        parts = [self.meta(batch)]
        if first == 0:  # no action leads to frame 0
            parts.append(self._feed(fed_BtSQ[:, :1], before_BtSQ[:, :1], None))
        parts.append(self._feed(fed_BtSQ[:, 1:], before_BtSQ[:, 1:], slots_BfrA))
        turn, mask_LL = self._window_constants(frames)
        out_BLD = self.transformer(torch.cat(parts, dim=1), turn, Sight(mask_LL))
        skip = self.config.num_meta_tokens + (1 - first) * self.grid.cells
        out_BLD, true_BLQ = out_BLD[:, skip:], codes_BtSQ[:, 1:].flatten(1, 2)
        levels = [self.level_logits(out_BLD, true_BLQ[..., :q]) for q in range(codes.num_levels)]
        logits_BLV = levels[0] if len(levels) == 1 else torch.stack(levels, dim=2)
        return rearrange(logits_BLV, "B (f S) ... -> B f S ...", S=self.grid.cells)

    def start_cache(self, *, batch: int) -> KVCache:
        """Return a rollout's cache that holds the meta tokens and no frame yet."""
        cache = KVCache.allocate(self.config, self.grid, batch=batch, device=self.device)
        num_meta = self.config.num_meta_tokens
        if num_meta:
            turn = no_place(num_meta, head_dim=self.head_dim).rotation().to(self.device)
            view = CacheView(cache, slice(0, num_meta), num_meta)
            self.transformer(self.meta(batch), turn, Sight(None, view))
        return cache

    def open_frame(
        self, frame: int, before_BSQ: Tensor, slots_BrA: Tensor | None, cache: KVCache, /
    ) -> OpenFrame:
        """Begin a latent frame, whose cells are then asked for by `cached_tokens`.

        Args:
            frame: index of the latent frame in the video; the frames before it are in the cache.
            before_BSQ: codes of the latent frame before; not looked at for frame 0.
            slots_BrA: the actions that lead to the frame; None for frame 0.
            cache: from `start_cache`; the frame's place in it is written to.
        """
        if frame == 0:
            before_BSQ = torch.full_like(before_BSQ, self.spec.tokenizer.codes.vocab_size)
        fed_BSD = self.before(before_BSQ) + self.cell.weight
        if slots_BrA is not None:
            fed_BSD = fed_BSD + self.actions(slots_BrA[:, None])
        now = in_time(torch.tensor([frame]), head_dim=self.head_dim).to(self.device)
        turn = beside(
            Rotary(*(part.expand(self.grid.cells, -1) for part in now)),
            Rotary(self.space_cos, self.space_sin),
        )
        mask_SM = None
        if self.grid.group < self.grid.cells:
            # What lies in the frame's place behind the cells decided so far is left over from the
            # frame that slid out.
            shape = (self.grid.cells, cache.visible(frame))
            mask_SM = torch.ones(shape, dtype=torch.bool, device=self.device)
            mask_SM[:, cache.places(frame, 0, self.grid.cells)] = self.own_SS
        return OpenFrame(frame, before_BSQ, fed_BSD, turn.rotation(), mask_SM, cache)

    def cached_tokens(self, there: OpenFrame, cells: slice, codes_BSQ: Tensor, /) -> Tensor:
        """Return tokens_BsD of some cells after all layers, and put their keys into the cache.

        What they say of the cells' codes, `level_logits` tells, level by level.

        Args:
            there: the frame, from `open_frame`.
            cells: which cells; those before them in the order are decided, and in the cache.
            codes_BSQ: codes of the frame, as far as they are decided.
        """
        tokens_BsD = there.fed_BSD[:, cells]
        if self.beside is not None:
            beside_BSQ = shift_beside(codes_BSQ, there.before_BSQ, self.grid)
            tokens_BsD = tokens_BsD + self.beside(beside_BSQ[:, cells])
        view = CacheView(
            there.cache,
            there.cache.places(there.frame, cells.start, cells.stop),
            there.cache.visible(there.frame),
        )
        sight = Sight(None if there.mask_SM is None else there.mask_SM[cells], view)
        out_BsD: Tensor = self.transformer(tokens_BsD, there.turn.of(cells), sight)
        return out_BsD

    def level_logits(self, tokens_BLD: Tensor, below_BLq: Tensor, /) -> Tensor:
        """Return logits_BLV of level q of some cells.

        Args:
            tokens_BLD: the cells' tokens after all layers.
            below_BLq: the cells' own codes of the levels below q, from level 0 on; none for q = 0.
        """
        if below_BLq.shape[-1] == 0:
            logits_BLV: Tensor = self.to_logits(tokens_BLD)
        else:
            assert self.level_head is not None
            logits_BLV = self.level_head(tokens_BLD, below_BLq)
        return logits_BLV

    def remember(self, there: OpenFrame, codes_BSQ: Tensor, /) -> None:
        """Put the keys of a whole frame whose codes are known into the cache."""
        self.cached_tokens(there, slice(0, self.grid.cells), codes_BSQ)

    @property
    def head_dim(self) -> int:
        """Width of one attention head, K."""
        return self.config.dim // self.config.num_heads

    def _slots_BfrA(self, slots_BTA: Tensor, batch: int, frames: int) -> Tensor:
        """Check slots against the frames and cut them into the r steps of every latent frame."""
        bind_shape(
            "actions", slots_BTA, "B T A",
            B=batch, T=(frames - 1) * self.steps_per_frame, A=self.spec.actions.num_slots,
        )  # fmt: skip
        return rearrange(slots_BTA, "B (f r) A -> B f r A", r=self.steps_per_frame)

    def _feed(self, codes_BfSQ: Tensor, before_BfSQ: Tensor, slots_BfrA: Tensor | None) -> Tensor:
        """Return tokens_BLD of whole frames: the sum of what every token is fed."""
        tokens_BfSD: Tensor = self.before(before_BfSQ) + self.cell.weight
        if self.beside is not None:
            beside_BfSQ = shift_beside(codes_BfSQ, before_BfSQ, self.grid)
            tokens_BfSD = tokens_BfSD + self.beside(beside_BfSQ)
        if slots_BfrA is not None:
            tokens_BfSD = tokens_BfSD + self.actions(slots_BfrA)[:, :, None]
        return tokens_BfSD.flatten(1, 2)

    def _window_constants(self, frames: int) -> tuple[Rotation, Tensor]:
        """Return rotation and mask of a window of latent frames; those of the last are kept."""
        key = (frames, self.device)
        if self._kept is None or self._kept[0] != key:
            # Made while generating, they may be needed for training: not as inference tensors.
            with torch.inference_mode(mode=False):
                self._kept = (key, self._make_window_constants(frames))
        return self._kept[1]

    def _make_window_constants(self, frames: int) -> tuple[Rotation, Tensor]:
        """Return rotation and mask_LL of a window, meta tokens first."""
        frames_L, rows_L, columns_L = self.grid.places(self.grid.first_frame, frames)
        num_meta = self.config.num_meta_tokens
        turn = join(
            no_place(num_meta, head_dim=self.head_dim),
            rotary(frames_L, rows_L, columns_L, head_dim=self.head_dim),
        )
        mask_LL = sight_mask(
            frames_L,
            rows_L * self.grid.width + columns_L,
            grid=self.grid,
            context_frames=self.config.context_frames,
            num_meta=num_meta,
        )
        return turn.rotation().to(self.device), mask_LL.to(self.device)

    def _add_frame_constants(self) -> None:
        """Keep what of a frame's rotation and mask is the same in every frame."""
        _, rows_S, columns_S = self.grid.places(0, 1)
        space = in_space(rows_S, columns_S, head_dim=self.head_dim)
        group_S = torch.arange(self.grid.cells) // self.grid.group
        self.register_buffer("space_cos", space.cos, persistent=False)
        self.register_buffer("space_sin", space.sin, persistent=False)
        self.register_buffer("own_SS", group_S[None, :] <= group_S[:, None], persistent=False)
        self.space_cos: Tensor
        self.space_sin: Tensor
        self.own_SS: Tensor

    def save(self, folder: Path, /, *, card: str) -> None:
        """Write a model directory that `from_pretrained` reads."""
        config = {"dynamics": to_plain(self.config), "spec": self.spec.to_dict()}
        save_model(folder, kind="dynamics", config=config, weights=self.state_dict(), card=card)

    @classmethod
    def from_pretrained(cls, folder: Path, /, *, device: str = "cpu") -> Self:
        """Load a model directory, ready to generate.

        Raises:
            FormatError: if a file is missing, altered, or does not fit the config.
            MismatchError: if it holds another kind of model.
        """
        config, weights = load_model(folder, kind="dynamics")
        where = str(folder / "config.json")
        if set(config) != {"dynamics", "spec"}:
            raise FormatError(
                f"{where}: the config of a dynamics model has the fields dynamics, spec"
            )
        sizes = build(DynamicsConfig, config["dynamics"], where=where, error=FormatError)
        spec = DynamicsSpec.from_dict(config["spec"], where=where)
        codes = spec.tokenizer.codes
        empty_QVZ = np.zeros((codes.num_levels, codes.vocab_size, codes.code_dim), np.float32)
        model = cls(sizes, spec, empty_QVZ if codes.num_levels > 1 else empty_QVZ[0])
        load_weights(model, weights, where=str(folder))
        model.eval().requires_grad_(requires_grad=False)
        return model.to(device)


def _codebook_QVZ(codebook_VZ: npt.NDArray[np.float32], codes: CodeSpec) -> Tensor:
    """Check codebook vectors against the spec; return them with an axis for the levels."""
    levels = codes.num_levels > 1
    bind_shape(
        "codebook", codebook_VZ, "Q V Z" if levels else "V Z",
        Q=codes.num_levels, V=codes.vocab_size, Z=codes.code_dim,
    )  # fmt: skip
    vectors = torch.from_numpy(np.array(codebook_VZ, np.float32))
    return vectors if levels else vectors[None]
