"""What was seen up to a frame -> the actions that are chosen on seeing it.

    tokens_BfSD, codes_BtSQ, slots_BfrA  ->  logits_BfLX, L = r * A symbols after frames 0 .. t-2
    logits_BfLX, slots_BfrA, valid_Bf    ->  nats  ->  their sum; how many actions; how many right
    tokens_BSD, codes_BSQ, seeds_B       ->  sample  ->  slots_BrA: the model plays by itself

Action i is chosen on seeing frame i. It is predicted from the tokens of frame i, which have seen
all codes before frame i and all actions before action i, and from frame i's own codes: each cell
adds the two and mixes them, then a few learned queries gather the cells. Nothing of frame i + 1,
and nothing of action i, is in either.

One choice among n (one discrete action per latent frame) is one row of logits. All other actions
are symbols in a row, and a small causal transformer gives each from those before it
(teacher-forced in training): the r actions that lead to a latent frame, and of each its A slots.
Of several keys that is the pressed ones, rising, then 0 as the end. What ActionSpec would refuse
has no probability, so that every action drawn is one of the game's.

Steps without a known action (NULL) and padding are no labels, and what follows the end of the keys
is none either.

Source: the action heads of genie2-pytorch, without the defects in tests/dynamics/test_defects.py.
"""

import warnings

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from worldloom.common import ActionSpec

from .actions import NULL
from .code_embedding import CodeEmbedding
from .linear import Linear
from .norm import Norm
from .sampling import keyed_gumbel, sample_codes
from .sampling_config import SamplingConfig
from .transformer import gated_feed_forward

with warnings.catch_warnings():
    # See transformer.py.
    warnings.simplefilter("ignore", FutureWarning)
    from x_transformers import Decoder

NOISE_LEVEL = 1 << 20
"""Level of the keyed noise that draws actions: far above the levels of any codes."""
_QUERIES = 4
"""How many weighted means of the cells are taken."""
_IGNORED = -100


class ActionHead(nn.Module):
    """Predicts the r actions that follow a latent frame."""

    def __init__(  # noqa: PLR0913 - those of the model around it
        self,
        codebook_QVZ: Tensor,
        actions: ActionSpec,
        /,
        *,
        steps: int,
        cells: int,
        dim: int,
        num_heads: int,
        ff_mult: float,
    ) -> None:
        """Build it with fresh weights.

        Args:
            codebook_QVZ: codebook vectors, with an axis for the levels.
            actions: what is predicted; of any kind but `none`.
            steps: actions per latent frame, r.
            cells: cells per latent frame, S.
            dim: width of the tokens that it reads, D.
            num_heads: of the model, which decide the width of a head.
            ff_mult: width of the gated feed-forward layers, as a multiple of dim.
        """
        super().__init__()
        self.steps, self.slots = steps, actions.num_slots
        self.keys = actions.kind == "keys"
        self.first = nn.Embedding(cells, dim)
        self.cell = nn.Embedding(cells, dim)
        for table in (self.first, self.cell):
            # Large: nothing else tells the gathering where a cell is. With 0.02 players whose rule
            # looks at certain cells were known only after twice as many updates.
            nn.init.normal_(table.weight, std=0.5)
        self.code = CodeEmbedding(codebook_QVZ, dim)
        # There are many cells: the layer on each is a quarter as wide as the one after them.
        self.mix = gated_feed_forward(dim, mult=max(ff_mult / 4, 1 / dim))
        self.norm = Norm(dim)
        self.to_weights = Linear(dim, _QUERIES, bias=False)
        self.gather = Linear(_QUERIES * dim, dim, bias=False)
        self.think = gated_feed_forward(dim, mult=ff_mult)
        self.out_norm = Norm(dim)
        self._add_symbols(actions)
        width = dim
        self.symbols: Symbols | None = None
        if steps * self.slots > 1:
            width = max(2, dim // 2)
            self.symbols = Symbols(
                self.num_values,
                length=steps * self.slots,
                dim=dim,
                width=width,
                num_heads=max(1, num_heads // 2),
                ff_mult=ff_mult,
            )
        self.to_logits = Linear(width, self.num_values)
        nn.init.normal_(self.to_logits.weight, std=0.02)

    def _add_symbols(self, actions: ActionSpec) -> None:
        """Note which rows of the output belong to which symbol, and which values it has."""
        # Keys move up a slot when one before them is let go: their slots share their values.
        sizes_A = torch.tensor(actions.sizes, dtype=torch.int64)
        starts_A = torch.zeros_like(sizes_A) if self.keys else sizes_A.cumsum(0) - sizes_A
        self.num_values = int((starts_A + sizes_A).max())
        values_X = torch.arange(int(sizes_A.max()))
        starts_L, sizes_L = starts_A.repeat(self.steps), sizes_A.repeat(self.steps)
        rows_LX = (starts_L[:, None] + values_X).clamp_max(self.num_values - 1)
        self.register_buffer("rows_LX", rows_LX, persistent=False)
        self.register_buffer("none_LX", values_X >= sizes_L[:, None], persistent=False)
        self.register_buffer("starts_L", starts_L, persistent=False)
        self.rows_LX: Tensor
        self.none_LX: Tensor
        self.starts_L: Tensor

    def forward(self, tokens_BfSD: Tensor, codes_BtSQ: Tensor, slots_BfrA: Tensor, /) -> Tensor:
        """Return logits_BfLX of the actions after frames 0 .. t-2; -inf where nothing can be.

        Args:
            tokens_BfSD: of latent frames 1 .. t-1, f = t - 1, after all layers.
            codes_BtSQ: int64 codes of the same window.
            slots_BfrA: int64 true slots, so that each symbol sees those before it; or NULL.
        """
        first_B1SD = self.first.weight.to(tokens_BfSD.dtype).expand(len(tokens_BfSD), 1, -1, -1)
        before_BfSD = torch.cat([first_B1SD, tokens_BfSD[:, :-1]], dim=1)
        context_BfD = self._context(before_BfSD, codes_BtSQ[:, :-1])
        return self._logits(context_BfD, rearrange(slots_BfrA, "B f r A -> B f (r A)"))

    @staticmethod
    def num_labels(slots_BfrA: Tensor, valid_Bf: Tensor, /) -> Tensor:
        """Return how many actions `nats` counts, an int64 of no axes."""
        return _known_Bfr(slots_BfrA, valid_Bf).sum()

    def nats(
        self, logits_BfLX: Tensor, slots_BfrA: Tensor, valid_Bf: Tensor, /
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return (nats, summed; number of actions; number that are right), without axes.

        An action counts as one, however many symbols it has, and is right if all of them are the
        likeliest ones: the same as if it were chosen without the label's help.

        Args:
            logits_BfLX: from `forward`, with the same slots.
            slots_BfrA: int64 true slots; steps that are NULL do not count.
            valid_Bf: whether the latent frame is real that the actions lead to.
        """
        known_Bfr = _known_Bfr(slots_BfrA, valid_Bf)
        counts_BfrA = known_Bfr[..., None].expand_as(slots_BfrA)
        if self.keys:  # what follows the end is certain
            counts_BfrA = counts_BfrA & (_before(slots_BfrA) != 0)
        labels_BfrA = torch.where(counts_BfrA, slots_BfrA, _IGNORED)
        nats = cross_entropy(
            logits_BfLX.flatten(0, -2).float(),
            labels_BfrA.flatten(),
            ignore_index=_IGNORED,
            reduction="sum",
        )
        likeliest_BfrA = logits_BfLX.detach().argmax(-1).view_as(slots_BfrA)
        right_Bfr = ((likeliest_BfrA == slots_BfrA) | ~counts_BfrA).all(-1) & known_Bfr
        return nats, known_Bfr.sum(), right_Bfr.sum().float()

    @torch.no_grad()
    def sample(
        self,
        tokens_BSD: Tensor | None,
        codes_BSQ: Tensor,
        /,
        *,
        seeds_B: Tensor,
        frame: int,
        temperature: float,
    ) -> Tensor:
        """Return slots_BrA of the r actions that follow a latent frame, int64.

        Its noise is that of `keyed_gumbel` at a level of its own, with symbols in place of cells:
        what (seed, frame) chooses does not depend on the batch.

        Args:
            tokens_BSD: the frame's own tokens after all layers; None for the video's first frame.
            codes_BSQ: int64 codes of the frame.
            seeds_B: int64, one a row.
            frame: index of the latent frame in the video.
            temperature: divides the logits; 0 takes the likeliest of each symbol.
        """
        if tokens_BSD is None:
            tokens_BSD = self.first.weight.expand(len(codes_BSQ), -1, -1)
        context_BfD = self._context(tokens_BSD[:, None], codes_BSQ[:, None])
        sampling = SamplingConfig(temperature=temperature, min_p=0.0)
        length, most = self.rows_LX.shape
        symbols_BfL = torch.full(
            (len(codes_BSQ), 1, length), NULL, dtype=torch.int64, device=codes_BSQ.device
        )
        for place in range(length):
            logits_B1X = self._logits(context_BfD, symbols_BfL)[:, 0, place : place + 1]
            noise_B1X = keyed_gumbel(
                seeds_B, frame, slice(place, place + 1), most, level=NOISE_LEVEL
            )
            symbols_BfL[:, :, place] = sample_codes(logits_B1X, noise_B1X, sampling)
        return rearrange(symbols_BfL, "B 1 (r A) -> B r A", r=self.steps)

    def _context(self, before_BfSD: Tensor, codes_BfSQ: Tensor) -> Tensor:
        """Return context_BfD, what a frame and all before it say about the actions after it."""
        cells_BfSD = before_BfSD + self.code(codes_BfSQ) + self.cell.weight
        cells_BfSD = self.norm(cells_BfSD + self.mix(cells_BfSD))
        weights_BfSJ = self.to_weights(cells_BfSD).softmax(dim=2, dtype=torch.float32)
        weights_BfJS = weights_BfSJ.to(cells_BfSD.dtype).transpose(-1, -2)
        gathered_BfD = self.gather((weights_BfJS @ cells_BfSD).flatten(2))
        context_BfD = gathered_BfD.to(cells_BfSD.dtype)  # norms are slow in bf16
        out_BfD: Tensor = self.out_norm(context_BfD + self.think(context_BfD))
        return out_BfD

    def _logits(self, context_BfD: Tensor, symbols_BfL: Tensor) -> Tensor:
        """Return logits_BfLX, of each symbol from those before it."""
        if self.symbols is None:
            tokens_BfLD = context_BfD[:, :, None]
        else:
            known_BfL = symbols_BfL >= 0
            rows_BfL = torch.where(known_BfL, symbols_BfL + self.starts_L + 1, 0)
            tokens_BfLD = self.symbols(context_BfD, rows_BfL)
        logits_BfLV = self.to_logits(tokens_BfLD)
        rows = self.rows_LX.expand(*logits_BfLV.shape[:2], -1, -1)
        logits_BfLX: Tensor = logits_BfLV.gather(-1, rows)
        return logits_BfLX.masked_fill(self._impossible(symbols_BfL), -torch.inf)

    def _impossible(self, symbols_BfL: Tensor) -> Tensor:
        """Return True for the values that ActionSpec refuses after the symbols before them."""
        if not self.keys:
            return self.none_LX
        slots_BfrA = rearrange(symbols_BfL, "B f (r A) -> B f r A", r=self.steps)
        last_BfL1 = _before(slots_BfrA).flatten(2)[..., None]
        values_X = torch.arange(self.rows_LX.shape[1], device=symbols_BfL.device)
        # After a key come greater ones or the end; after the end nothing.
        return (values_X > 0) & ((values_X <= last_BfL1) | (last_BfL1 == 0))


class Symbols(nn.Module):
    """A causal transformer over the symbols of a latent frame's actions."""

    def __init__(  # noqa: PLR0913 - sizes, all named
        self,
        num_values: int,
        /,
        *,
        length: int,
        dim: int,
        width: int,
        num_heads: int,
        ff_mult: float,
    ) -> None:
        super().__init__()
        self.from_context = Linear(dim, width, bias=False)
        self.place = nn.Embedding(length, width)
        self.value = nn.Embedding(num_values + 1, width)
        for table in (self.place, self.value):
            nn.init.normal_(table.weight, std=0.5)
        self.decoder = Decoder(
            dim=width,
            depth=1,
            heads=num_heads,
            attn_dim_head=max(1, width // num_heads),
            attn_flash=False,  # slower than the plain one on sequences this short
            use_rmsnorm=True,
            ff_mult=ff_mult,
            ff_glu=True,
            ff_swish=True,
            ff_no_bias=True,
            verbose=False,
        )

    def forward(self, context_BfD: Tensor, rows_BfL: Tensor, /) -> Tensor:
        """Return tokens_BfLE, each from the context and the symbols before its own.

        Args:
            context_BfD: what all symbols are about.
            rows_BfL: value + 1 of every symbol, 0 where it is not known; the last is not looked at.
        """
        batch, frames, length = rows_BfL.shape
        before_BfLE = self.value(rows_BfL[..., :-1])
        tokens_BfLE = self.from_context(context_BfD)[:, :, None] + self.place.weight
        tokens_BfLE = torch.cat([tokens_BfLE[:, :, :1], tokens_BfLE[:, :, 1:] + before_BfLE], dim=2)
        flat = self.decoder(rearrange(tokens_BfLE, "B f L E -> (B f) L E"))
        out: Tensor = rearrange(flat, "(B f) L E -> B f L E", B=batch, f=frames, L=length)
        return out


def _known_Bfr(slots_BfrA: Tensor, valid_Bf: Tensor) -> Tensor:
    """Return which steps have a known action and lead to a real frame."""
    return (slots_BfrA >= 0).all(-1) & valid_Bf[..., None]


def _before(slots_BfrA: Tensor) -> Tensor:
    """Return the slot before each of the same step; NULL before the first."""
    return torch.cat([torch.full_like(slots_BfrA[..., :1], NULL), slots_BfrA[..., :-1]], dim=-1)
