"""The dynamics model: codes and actions -> logits of the next latent frame's codes.

    codes_Bthw, slots_BTA (r per latent frame after the first)  ->  tokens_BfSD, f = 1 .. t-1
    the same, known_Bthw                                        ->  these and refined_BfSD
    tokens_BfSD                                                 ->  logits_BfSV
    tokens_BfSD, codes_BthwQ where cells have levels            ->  logits_BfSQV

Codes enter as their codebook vectors (a fixed table from the shards) through a learned
projection, with a learned vector per code beside it; a learned embedding of the cell tells the
grid apart, and every token is fed its own cell's code one frame before. Logits leave through a head
of their own or against the codebook (heads.py). There is one token a cell, however many levels it
has: see level_head.py. Inside, codes always have a last axis Q.

Source: the recipe of genie2-pytorch, without the defects in tests/dynamics/test_defects.py.
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

from .action_head import ActionHead
from .actions import NULL, ActionEmbedding
from .code_embedding import CodeEmbedding
from .config import DynamicsConfig
from .heads import CodeHead
from .kv_cache import KVCache
from .layout import Layout
from .level_head import LevelHead
from .meta_tokens import MetaTokens
from .positions import Rotation
from .sequence import Grid, flatten_codes, shift_before, shift_beside
from .sight import MetaCache, Passing
from .spec import DynamicsSpec
from .transformer import Transformer


@dataclass(frozen=True, slots=True)
class OpenFrame:
    """A latent frame that is being decided: all that is the same for each of its cells' forwards.

    `DynamicsModel.open_frame` makes it.
    """

    frame: int
    """Index of the latent frame in the video; the frames before it are in the cache."""
    before_BSQ: Tensor
    """Codes of the frame before."""
    fed_BTD: Tensor
    """What every token is fed, but for the code beside it; actions with tokens first."""
    turn: Rotation
    """Every token's rotation."""
    mask_TM: Tensor | None
    """What to add to every token's scores of the visible keys: -inf where it may not see one.

    None where all may be seen, or where layers take turns.
    """
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
        self.steps_per_frame = codes.frames_per_latent
        # A video without actions has nothing to put into tokens of their own.
        prepended = config.action_input == "prepended" and spec.actions.num_slots > 0
        self.grid = Grid(
            codes.grid_height,
            codes.grid_width,
            config.order,
            lead=self.steps_per_frame if prepended else 0,
        )
        self.layout = Layout(config, self.grid)
        codebook_QVZ = _codebook_QVZ(codebook_VZ, codes)
        with library_seed(seed, "dynamics-weights"):
            self.meta = MetaTokens(config.num_meta_tokens, config.dim)
            self.before = CodeEmbedding(codebook_QVZ, config.dim) if config.previous_frame else None
            self.beside = CodeEmbedding(codebook_QVZ, config.dim) if self.grid.beside else None
            self.own = CodeEmbedding(codebook_QVZ, config.dim) if self.grid.refines else None
            self.cell = nn.Embedding(self.grid.cells, config.dim) if config.cell_embedding else None
            if self.cell is not None:
                nn.init.normal_(self.cell.weight, std=0.02)
            self.actions = ActionEmbedding(spec.actions, steps=self.steps_per_frame, dim=config.dim)
            self.transformer = Transformer(config)
            self.head = CodeHead(config.head, codebook_QVZ[0], dim=config.dim)
            self.level_head = (
                LevelHead(codebook_QVZ, dim=config.dim, ff_mult=config.ff_mult, head=config.head)
                if codes.num_levels > 1
                else None
            )
            # Last, so that the other weights are the same with it and without.
            self.action_head = (
                ActionHead(
                    codebook_QVZ,
                    spec.actions,
                    steps=self.steps_per_frame,
                    cells=self.grid.cells,
                    dim=config.dim,
                    num_heads=config.num_heads,
                    ff_mult=config.ff_mult,
                )
                if config.action_head and spec.actions.num_slots > 0
                else None
            )

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.layout.device

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
        tokens_BfSD = self.tokens(codes_Bthw, slots_BTA, inputs_Bthw=inputs_Bthw)
        return self.logits(tokens_BfSD, codes_Bthw)

    def tokens(
        self, codes_Bthw: Tensor, slots_BTA: Tensor, /, *, inputs_Bthw: Tensor | None = None
    ) -> Tensor:
        """Return tokens_BfSD of latent frames 1 .. t-1 after all layers; arguments as `forward`'s.

        They have seen the codes of earlier frames, by the order some of their own, and the actions
        up to those that lead to their frame.
        """
        return self._window_tokens(codes_Bthw, slots_BTA, inputs_Bthw, None)

    def tokens_and_refined(
        self,
        codes_Bthw: Tensor,
        slots_BTA: Tensor,
        known_Bthw: Tensor,
        /,
        *,
        inputs_Bthw: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return what `tokens` does, and refined_BfSD: those that also know some of their frame.

        For models of order masked. Where no cell is known, both are the same.

        Args:
            codes_Bthw: as `forward`'s, as are the other two.
            slots_BTA: the actions.
            known_Bthw: True where a cell's own code may be looked at, without levels.
            inputs_Bthw: codes to feed instead.
        """
        both = self._window_tokens(codes_Bthw, slots_BTA, inputs_Bthw, known_Bthw)
        tokens_BfSD, refined_BfSD = both.chunk(2, dim=1)
        return tokens_BfSD, refined_BfSD

    def _window_tokens(
        self,
        codes_Bthw: Tensor,
        slots_BTA: Tensor,
        inputs_Bthw: Tensor | None,
        known_Bthw: Tensor | None,
    ) -> Tensor:
        """Return tokens_BfSD; those that refine, if there are known cells, as frames behind."""
        codes = self.spec.tokenizer.codes
        fed_BtSQ = flatten_codes("codes", codes_Bthw, codes)
        batch, frames = fed_BtSQ.shape[:2]
        if frames < 2:
            raise ShapeError(f"codes: {frames} latent frames; a frame is predicted from one before")
        if inputs_Bthw is not None:
            fed_BtSQ = flatten_codes("inputs", inputs_Bthw, codes)
        slots_BfrA = self._slots_BfrA(slots_BTA, batch, frames)
        first = self.grid.first_frame
        before_BtSQ = shift_before(fed_BtSQ, pad=codes.vocab_size)
        fed_BLD = self._feed(fed_BtSQ[:, 1:], before_BtSQ[:, 1:], slots_BfrA)
        if first == 0:  # no action leads to frame 0
            fed_0_BTD = self._feed(fed_BtSQ[:, :1], before_BtSQ[:, :1], None)
            fed_BLD = torch.cat([fed_0_BTD, fed_BLD], dim=1)
        if known_Bthw is not None:
            assert self.grid.refines
            unmasked_BfSD = self._unmask(fed_BtSQ[:, 1:], known_Bthw[:, 1:].flatten(2))
            fed_BfTD = rearrange(fed_BLD, "B (f T) D -> B f T D", T=self.grid.tokens)
            refining_BfTD = _add_to_cells(fed_BfTD, unmasked_BfSD, self.grid.lead)
            fed_BLD = torch.cat([fed_BLD, refining_BfTD.flatten(1, 2)], dim=1)
        # The meta tokens see no window: once is enough.
        packed_1PD = torch.cat([self.meta(), fed_BLD.reshape(1, -1, self.config.dim)], dim=1)
        turn, sight = self.layout.window(frames, batch, twice=known_Bthw is not None)
        out_PD = self.transformer(packed_1PD, turn, sight)[0, self.config.num_meta_tokens :]
        out_BfTD = rearrange(out_PD, "(B f T) D -> B f T D", B=batch, T=self.grid.tokens)
        cells_BfSD: Tensor = out_BfTD[:, 1 - first :, self.grid.lead :]
        return cells_BfSD

    def logits(self, tokens_BfSD: Tensor, codes_Bthw: Tensor, /) -> Tensor:
        """Return logits_BfSV, or logits_BfSQV, of tokens from `tokens`.

        Args:
            tokens_BfSD: those of frames 1 .. t-1.
            codes_Bthw: the true codes of frames 0 .. t-1, from which later levels know the earlier.
        """
        codes = self.spec.tokenizer.codes
        true_BfSQ = flatten_codes("codes", codes_Bthw, codes)[:, 1:]
        levels = [
            self.level_logits(tokens_BfSD, true_BfSQ[..., :q]) for q in range(codes.num_levels)
        ]
        return levels[0] if len(levels) == 1 else torch.stack(levels, dim=3)

    def start_cache(self, *, batch: int) -> KVCache:
        """Return a rollout's cache, of the weights' type: the meta tokens and no frame yet."""
        dtype = self.meta.tokens_MD.dtype
        cache = KVCache.allocate(
            self.config, self.grid, batch=batch, device=self.device, dtype=dtype
        )
        if self.config.num_meta_tokens:
            self.transformer(self.meta(), self.layout.meta(), MetaCache(cache))
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
        slots_BfrA = None if slots_BrA is None else slots_BrA[:, None]
        fed_BTD = self._feed_but_beside(before_BSQ[:, None], slots_BfrA)[:, 0]
        turn, mask_TM = self.layout.frame(frame, cache)
        return OpenFrame(frame, before_BSQ, fed_BTD, turn, mask_TM, cache)

    def cached_tokens(self, there: OpenFrame, cells: slice, codes_BSQ: Tensor, /) -> Tensor:
        """Return tokens_BsD of some cells after all layers, and put their keys into the cache.

        What they say of the cells' codes, `level_logits` tells, level by level.

        Args:
            there: the frame, from `open_frame`.
            cells: which cells; those before them in the order are decided, and in the cache.
            codes_BSQ: codes of the frame, as far as they are decided.
        """
        span = self.grid.tokens_of(cells)
        tokens_BLD = there.fed_BTD[:, span]
        lead = tokens_BLD.shape[1] - (cells.stop - cells.start)
        if self.beside is not None:
            beside_BSQ = shift_beside(codes_BSQ, there.before_BSQ, self.grid)
            tokens_BLD = _add_to_cells(tokens_BLD, self.beside(beside_BSQ[:, cells]), lead)
        sight = self.layout.in_frame(there.frame, span, there.mask_TM, there.cache)
        out_BLD: Tensor = self.transformer(tokens_BLD, there.turn.of(span), sight)
        return out_BLD[:, lead:]

    def refined_tokens(self, there: OpenFrame, codes_BSQ: Tensor, known_BS: Tensor, /) -> Tensor:
        """Return tokens_BSD of a frame of which some cells are known; the cache stays as it is.

        For models of order masked, after `remember` or `cached_tokens` of the whole frame.

        Args:
            there: the frame, from `open_frame`.
            codes_BSQ: codes of the frame; of cells that are not known they are not looked at.
            known_BS: True where a cell's code is known.
        """
        unmasked_BSD = self._unmask(codes_BSQ, known_BS)
        fed_BTD = _add_to_cells(there.fed_BTD, unmasked_BSD, self.grid.lead)
        span = slice(0, self.grid.tokens)
        sight = Passing(self.layout.in_frame(there.frame, span, there.mask_TM, there.cache))
        out_BTD: Tensor = self.transformer(fed_BTD, there.turn, sight)
        return out_BTD[:, self.grid.lead :]

    def level_logits(self, tokens_BLD: Tensor, below_BLq: Tensor, /) -> Tensor:
        """Return logits_BLV of level q of some cells.

        Args:
            tokens_BLD: the cells' tokens after all layers, with any axes in front of D.
            below_BLq: the cells' own codes of the levels below q, from level 0 on; none for q = 0.
        """
        if below_BLq.shape[-1] == 0:
            logits_BLV: Tensor = self.head(tokens_BLD)
        else:
            assert self.level_head is not None
            logits_BLV = self.level_head(tokens_BLD, below_BLq)
        return logits_BLV

    def remember(self, there: OpenFrame, codes_BSQ: Tensor, /) -> Tensor:
        """Put the keys of a whole frame whose codes are known into the cache; return tokens_BSD."""
        return self.cached_tokens(there, slice(0, self.grid.cells), codes_BSQ)

    def _slots_BfrA(self, slots_BTA: Tensor, batch: int, frames: int) -> Tensor:
        """Check slots against the frames and cut them into the r steps of every latent frame."""
        bind_shape(
            "actions", slots_BTA, "B T A",
            B=batch, T=(frames - 1) * self.steps_per_frame, A=self.spec.actions.num_slots,
        )  # fmt: skip
        return rearrange(slots_BTA, "B (f r) A -> B f r A", r=self.steps_per_frame)

    def _feed(self, codes_BfSQ: Tensor, before_BfSQ: Tensor, slots_BfrA: Tensor | None) -> Tensor:
        """Return tokens_BLD of whole frames: the sum of what every token is fed."""
        fed_BfTD = self._feed_but_beside(before_BfSQ, slots_BfrA)
        if self.beside is not None:
            beside_BfSD = self.beside(shift_beside(codes_BfSQ, before_BfSQ, self.grid))
            fed_BfTD = _add_to_cells(fed_BfTD, beside_BfSD, self.grid.lead)
        return fed_BfTD.flatten(1, 2)

    def _feed_but_beside(self, before_BfSQ: Tensor, slots_BfrA: Tensor | None) -> Tensor:
        """Return what tokens are fed besides codes of their own frame, (B, f, T, D).

        With order masked that is a mask in the place of a cell's own code. Without slots no action
        leads to the frame: nothing is added, and actions that have tokens are null.
        """
        batch, frames, cells, _ = before_BfSQ.shape
        shape = (batch, frames, cells, self.config.dim)
        fed_BfSD = self.meta.tokens_MD.new_zeros(shape)
        if self.before is not None:
            fed_BfSD = self.before(before_BfSQ)
        if self.cell is not None:
            fed_BfSD = fed_BfSD + self.cell.weight
        if self.own is not None:
            fed_BfSD = fed_BfSD + self._mask_D()
        if self.grid.lead:
            if slots_BfrA is None:
                shape = (batch, frames, self.steps_per_frame, self.spec.actions.num_slots)
                slots_BfrA = before_BfSQ.new_full(shape, NULL)
            return torch.cat([self.actions(slots_BfrA).to(fed_BfSD.dtype), fed_BfSD], dim=2)
        if slots_BfrA is not None:
            fed_BfSD = fed_BfSD + self.actions(slots_BfrA).sum(2)[:, :, None]
        return fed_BfSD

    def _unmask(self, codes: Tensor, known: Tensor) -> Tensor:
        """Return what to add to cells whose own code is known: that code for the mask."""
        assert self.own is not None
        none = self.spec.tokenizer.codes.vocab_size
        unmasked: Tensor = self.own(codes.masked_fill(~known[..., None], none)) - self._mask_D()
        return unmasked

    def _mask_D(self) -> Tensor:
        """Return what stands for an own code that is not known: the vectors of no code."""
        assert self.own is not None
        codes = self.spec.tokenizer.codes
        none_Q = torch.full((codes.num_levels,), codes.vocab_size, device=self.device)
        mask_D: Tensor = self.own(none_Q)
        return mask_D

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


def _add_to_cells(fed_BTD: Tensor, cells_BSD: Tensor, lead: int) -> Tensor:
    """Return tokens with something added to the cells' behind those of actions."""
    if lead == 0:
        return fed_BTD + cells_BSD
    actions_BAD, rest_BSD = fed_BTD[..., :lead, :], fed_BTD[..., lead:, :]
    return torch.cat([actions_BAD, rest_BSD + cells_BSD], dim=-2)


def _codebook_QVZ(codebook_VZ: npt.NDArray[np.float32], codes: CodeSpec) -> Tensor:
    """Check codebook vectors against the spec; return them with an axis for the levels."""
    levels = codes.num_levels > 1
    bind_shape(
        "codebook", codebook_VZ, "Q V Z" if levels else "V Z",
        Q=codes.num_levels, V=codes.vocab_size, Z=codes.code_dim,
    )  # fmt: skip
    vectors = torch.from_numpy(np.array(codebook_VZ, np.float32))
    return vectors if levels else vectors[None]
