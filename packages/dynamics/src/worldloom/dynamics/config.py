"""Settings of the dynamics model. Needs no torch."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

from worldloom.common import ConfigError

Order = Literal["raster", "row", "frame", "masked"]
"""What a cell may see of its own latent frame, besides all earlier frames.

    raster  every cell before it, row by row: one forward a cell
    row     the rows above it: one forward a row
    frame   nothing: one forward a frame
    masked  nothing, and then, in as many passes as are asked for, the cells that were surest
"""

AttentionKind = Literal["full", "factorised"]
"""Among which tokens attention runs.

    full        every layer sees all cells of all frames in the context
    factorised  layers take turns: the cells of a frame, then the frames of a cell
"""

Positions = Literal["axial", "time"]
"""What turns with a token's place: latent frame, row and column, or the latent frame alone."""

ActionInput = Literal["added", "prepended"]
"""How actions enter: added to every cell of the frame they lead to, or as tokens in front of it."""

Head = Literal["linear", "dot", "distance"]
"""How tokens become logits.

    linear    a matrix of its own
    dot       projected, then the dot product with the codebook's vectors, scaled
    distance  projected, then the negative distance to them, with a learned temperature
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class DynamicsConfig:
    """Sizes and parts of the transformer. Stored in its directory, which it is enough to rebuild.

    docs/log.md has the table by which the defaults were chosen.
    """

    num_layers: int = 8
    """Transformer layers."""
    dim: int = 512
    """Width of the residual stream, D. A multiple of num_heads."""
    num_heads: int = 8
    """Attention heads, N; the width of one head is dim / num_heads."""
    ff_mult: float = 2.0
    """Width of the gated feed-forward layers, as a multiple of dim."""
    order: Order = "frame"
    """What a cell may see of its own frame: raster (all before it), row (rows above), frame
    (nothing), masked (nothing, then any: it learns to refine, and updates take twice as long)."""
    context_frames: int = 16
    """Latent frames visible at once, t, the current one included. Not pixel frames."""
    num_meta_tokens: int = 16
    """Learned tokens in front of the sequence that every frame sees; may be 0."""
    action_head: bool = False
    """Whether it also learns to predict the action that is chosen on seeing a frame."""
    action_input: ActionInput = "added"
    """Whether actions are added to the cells of their frame or prepended as tokens of their own."""
    attention: AttentionKind = "full"
    """Among all tokens at once, or factorised: layers take turns between space and time."""
    head: Head = "linear"
    """How logits are made: linear, dot (codebook's dot product) or distance (to its vectors)."""
    positions: Positions = "axial"
    """Rotary positions of time, row and column, or of time alone."""
    cell_embedding: bool = True
    """Whether every cell of the grid has a learned vector of its own."""
    previous_frame: bool = True
    """Whether a cell is fed its own code of one latent frame before; orders frame and
    masked need it."""
    value_residual: bool = True
    """Whether values mix with the first layer's by a learned share (arXiv:2410.17897)."""
    residual_streams: int = 1
    """Parallel residual streams; above 1, hyper-connections mix them (arXiv:2409.19606)."""

    def __post_init__(self) -> None:
        """Refuse sizes that do not fit together."""
        self._check_choices()
        for name, count in (
            ("num_layers", self.num_layers),
            ("num_heads", self.num_heads),
            ("residual_streams", self.residual_streams),
        ):
            if count < 1:
                raise ConfigError(f"dynamics: {name} is {count}, must be at least 1")
        if self.num_meta_tokens < 0:
            raise ConfigError(
                f"dynamics: num_meta_tokens is {self.num_meta_tokens}, must be at least 0"
            )
        if not self.dim * self.ff_mult >= 2:
            raise ConfigError(
                f"dynamics: dim {self.dim} times ff_mult {self.ff_mult} leaves the feed-forward "
                "layers no width"
            )
        if self.dim % self.num_heads or (self.dim // self.num_heads) % 2:
            raise ConfigError(
                f"dynamics: dim {self.dim} over {self.num_heads} heads is not an even whole "
                "number; rotary positions turn pairs of channels"
            )
        if self.context_frames < 2:
            raise ConfigError(
                f"dynamics: context_frames is {self.context_frames}, must be at least 2: "
                "a past and a present"
            )
        if self.attention == "factorised" and self.num_layers < 2:
            raise ConfigError(
                "dynamics: attention factorised with one layer would never look along time: layers "
                "take turns between space and time; choose at least 2"
            )
        if self.order in ("frame", "masked") and not self.previous_frame:
            raise ConfigError(
                f"dynamics: order {self.order} with previous_frame off would feed no codes at all, "
                "since its cells see nothing of their own frame; choose order row or raster, or "
                "leave previous_frame on"
            )

    def _check_choices(self) -> None:
        """Refuse words that name nothing."""
        choices: dict[str, Any] = {
            "order": Order,
            "action_input": ActionInput,
            "attention": AttentionKind,
            "head": Head,
            "positions": Positions,
        }
        for name, kind in choices.items():
            value = getattr(self, name)
            if value not in get_args(kind):
                known = ", ".join(get_args(kind))
                raise ConfigError(f"dynamics: {name} is {value!r:.40}, must be one of {known}")
