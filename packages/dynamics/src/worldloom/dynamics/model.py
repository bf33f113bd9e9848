"""The dynamics model: codes and actions -> logits of the next latent frame's codes.

    codes_Bthw, slots_BTA (r per latent frame after the first)  ->  logits_BfSV, f = 1 .. t-1

Codes enter as their codebook vectors (a fixed table from the shards) through a learned
projection, with a learned vector per code beside it; a learned embedding of the cell tells the
grid apart, and every token is fed its own cell's code one frame before. Logits leave through an
untied head: heads tied to the codebook (dot product, distance) learned far less in prototypes.

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
    ConfigError,
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
from .meta_tokens import MetaTokens
from .positions import Rotary, Rotation, beside, in_space, in_time, join, no_place, rotary
from .sequence import Grid, shift_before, shift_beside, sight_mask
from .spec import DynamicsSpec
from .transformer import Sight, Transformer


@dataclass(frozen=True, slots=True)
class OpenFrame:
    """A latent frame that is being decided: all that is the same for each of its cells' forwards.

    `DynamicsModel.open_frame` makes it.
    """

    frame: int
    """Index of the latent frame in the video; the frames before it are in the cache."""
    before_BS: Tensor
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
            codebook_VZ: codebook vectors of the tokenizer, as `TokenShards.codebook_VZ` gives them.
            seed: of the weights.

        Raises:
            ConfigError: if the codes have residual levels.
            ShapeError: if the codebook is not the spec's.
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
            self.before = CodeEmbedding(vectors, config.dim)
            self.beside = CodeEmbedding(vectors, config.dim) if self.grid.beside else None
            self.cell = nn.Embedding(self.grid.cells, config.dim)
            nn.init.normal_(self.cell.weight, std=0.5)
            self.actions = ActionEmbedding(spec.actions, steps=self.steps_per_frame, dim=config.dim)
            self.transformer = Transformer(config)
            self.to_logits = nn.Linear(config.dim, codes.vocab_size)
            nn.init.normal_(self.to_logits.weight, std=0.02)
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

        Args:
            codes_Bthw: int64 in [0, V), t >= 2 latent frames.
            slots_BTA: int64 slots of the r (t - 1) steps between them; NULL where none is known.
            inputs_Bthw: codes to feed instead of the true ones (corrupted ones, in training).

        Raises:
            ShapeError: if the grid or the number of steps is not the spec's, or t is below 2.
        """
        codes_BtS = self._codes_BtS(codes_Bthw)
        batch, frames = codes_BtS.shape[:2]
        if frames < 2:
            raise ShapeError(f"codes: {frames} latent frames; a frame is predicted from one before")
        fed_BtS = codes_BtS if inputs_Bthw is None else self._codes_BtS(inputs_Bthw)
        slots_BfrA = self._slots_BfrA(slots_BTA, batch, frames)
        first, no_code = self.grid.first_frame, self.spec.tokenizer.codes.vocab_size
        before_BtS = shift_before(fed_BtS, pad=no_code)
        parts = [self.meta(batch)]
        if first == 0:  # no action leads to frame 0
            parts.append(self._feed(fed_BtS[:, :1], before_BtS[:, :1], None))
        parts.append(self._feed(fed_BtS[:, 1:], before_BtS[:, 1:], slots_BfrA))
        turn, mask_LL = self._window_constants(frames)
        out_BLD = self.transformer(torch.cat(parts, dim=1), turn, Sight(mask_LL))
        skip = self.config.num_meta_tokens + (1 - first) * self.grid.cells
        logits_BLV: Tensor = self.to_logits(out_BLD[:, skip:])
        return rearrange(logits_BLV, "B (f S) V -> B f S V", S=self.grid.cells)

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
        self, frame: int, before_BS: Tensor, slots_BrA: Tensor | None, cache: KVCache, /
    ) -> OpenFrame:
        """Begin a latent frame, whose cells are then asked for by `cached_logits`.

        Args:
            frame: index of the latent frame in the video; the frames before it are in the cache.
            before_BS: codes of the latent frame before; not looked at for frame 0.
            slots_BrA: the actions that lead to the frame; None for frame 0.
            cache: from `start_cache`; the frame's place in it is written to.
        """
        if frame == 0:
            before_BS = torch.full_like(before_BS, self.spec.tokenizer.codes.vocab_size)
        fed_BSD = self.before(before_BS) + self.cell.weight
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
        return OpenFrame(frame, before_BS, fed_BSD, turn.rotation(), mask_SM, cache)

    def cached_logits(self, there: OpenFrame, cells: slice, codes_BS: Tensor, /) -> Tensor:
        """Return logits_BsV of some cells of a frame, and put their keys into the cache.

        Args:
            there: the frame, from `open_frame`.
            cells: which cells; those before them in the order are decided, and in the cache.
            codes_BS: codes of the frame, as far as they are decided.
        """
        logits_BsV: Tensor = self.to_logits(self._cached(there, cells, codes_BS))
        return logits_BsV

    def remember(self, there: OpenFrame, codes_BS: Tensor, /) -> None:
        """Put the keys of a whole frame whose codes are known into the cache."""
        self._cached(there, slice(0, self.grid.cells), codes_BS)

    def _cached(self, there: OpenFrame, cells: slice, codes_BS: Tensor) -> Tensor:
        """Return the tokens of some cells after all layers."""
        tokens_BsD = there.fed_BSD[:, cells]
        if self.beside is not None:
            beside_BS = shift_beside(codes_BS, there.before_BS, self.grid)
            tokens_BsD = tokens_BsD + self.beside(beside_BS[:, cells])
        view = CacheView(
            there.cache,
            there.cache.places(there.frame, cells.start, cells.stop),
            there.cache.visible(there.frame),
        )
        sight = Sight(None if there.mask_SM is None else there.mask_SM[cells], view)
        out_BsD: Tensor = self.transformer(tokens_BsD, there.turn.of(cells), sight)
        return out_BsD

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

    def _feed(self, codes_BfS: Tensor, before_BfS: Tensor, slots_BfrA: Tensor | None) -> Tensor:
        """Return tokens_BLD of whole frames: the sum of what every token is fed."""
        tokens_BfSD: Tensor = self.before(before_BfS) + self.cell.weight
        if self.beside is not None:
            tokens_BfSD = tokens_BfSD + self.beside(shift_beside(codes_BfS, before_BfS, self.grid))
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
        model = cls(sizes, spec, np.zeros((codes.vocab_size, codes.code_dim), np.float32))
        load_weights(model, weights, where=str(folder))
        model.eval().requires_grad_(requires_grad=False)
        return model.to(device)
