"""Toy worlds and tiny models: the smallest inputs that can still go wrong.

python toys.py SHARDS RUN NUM_STEPS     trains, for the tests that stop a process
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from worldloom.common import (
    ActionSpec,
    CodeSpec,
    TokenEpisode,
    TokenizerSpec,
    TokenShards,
    write_manifest,
    write_shard,
)
from worldloom.dynamics import (
    DynamicsConfig,
    DynamicsModel,
    DynamicsSpec,
    DynamicsTrainingConfig,
    StreamConfig,
    train_dynamics_model,
)
from worldloom.dynamics.sequence import flatten_codes

STEER = ActionSpec.discrete(["stay", "up", "down", "left", "right"])
KEYS = ActionSpec.keys(["down", "right"])
MOVES = {"stay": (0, 0), "up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}
ACTIONS = {
    "none": ActionSpec.none(),
    "discrete": STEER,
    "keys": ActionSpec.keys(["up", "down", "left", "right"], max_keys=3),
    "multi_discrete": ActionSpec.multi_discrete([3, 2, 7], names=["move", "fire", "weapon"]),
    "continuous": ActionSpec.continuous([-1.0, 0.0], [1.0, 9.0], names=["turn", "gas"], bins=5),
}

TRAINING = DynamicsTrainingConfig(
    num_steps=6,
    batch_windows=4,
    window_frames=5,
    learning_rate=3e-3,
    warmup_steps=2,
    corruption=0.2,
    action_dropout=0.2,
    validate_every=3,
    checkpoint_every=3,
    log_every=1,
    seed=5,
)


def code_spec(
    *,
    height: int = 3,
    width: int = 4,
    vocab_size: int = 32,
    frames_per_latent: int = 1,
    num_levels: int = 1,
) -> CodeSpec:
    """Not square, so that an exchange of height and width cannot hide."""
    return CodeSpec(
        vocab_size=vocab_size,
        grid_height=height,
        grid_width=width,
        code_dim=4,
        frames_per_latent=frames_per_latent,
        num_levels=num_levels,
    )


def tokenizer_spec(codes: CodeSpec) -> TokenizerSpec:
    """The tokenizer that could have written them."""
    return TokenizerSpec(
        name="toy",
        codes=codes,
        height=8 * codes.grid_height,
        width=8 * codes.grid_width,
        resize="exact",
        fps=8.75,
        frame_skip=4,
        compute_dtype="float32",
        fingerprint="0123456789abcdef" * 4,
    )


def codebook_VZ(codes: CodeSpec) -> np.ndarray:
    """Some codebook; of levels, each with vectors half as long as those of the level before."""
    levels = (codes.num_levels,) if codes.num_levels > 1 else ()
    vectors = np.random.default_rng(7).normal(size=(*levels, codes.vocab_size, codes.code_dim))
    if levels:
        vectors *= 0.5 ** np.arange(codes.num_levels)[:, None, None]
    return vectors.astype("f4")


def make_model(
    codes: CodeSpec | None = None, actions: ActionSpec = STEER, *, seed: int = 0, **sizes: object
) -> DynamicsModel:
    """A model in which every layer does something; fresh ones begin as identities."""
    codes = codes or code_spec()
    config = replace(
        DynamicsConfig(num_layers=2, dim=32, num_heads=2, context_frames=3, num_meta_tokens=5),
        **sizes,  # type: ignore[arg-type]
    )
    spec = DynamicsSpec(tokenizer=tokenizer_spec(codes), actions=actions, fps=8.75, frame_skip=4)
    model = DynamicsModel(config, spec, codebook_VZ(codes), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.eval().requires_grad_(requires_grad=False)


def random_codes(model: DynamicsModel, frames: int, *, batch: int = 2, seed: int = 0):
    """codes_Bthw of a model's vocabulary and grid."""
    generator = torch.Generator().manual_seed(seed)
    codes = model.spec.tokenizer.codes
    shape = (batch, *codes.codes_shape(frames))
    return torch.randint(codes.vocab_size, shape, generator=generator)


def random_slots(model: DynamicsModel, frames: int, *, batch: int = 2, seed: int = 0):
    """slots_BTA of the steps between so many latent frames."""
    rng = np.random.default_rng([seed, frames])
    sizes = np.asarray(model.spec.actions.sizes, np.int64)
    steps = (frames - 1) * model.steps_per_frame
    return torch.from_numpy(rng.integers(0, sizes, (batch, steps, len(sizes))))


OPTIONS: dict[str, dict[str, object]] = {
    "dot head": {"head": "dot"},
    "distance head": {"head": "distance"},
    "time alone": {"positions": "time"},
    "no cell embedding": {"cell_embedding": False},
    "actions prepended": {"action_input": "prepended"},
    "factorised": {"attention": "factorised"},
    "factorised, prepended": {"attention": "factorised", "action_input": "prepended"},
    "two streams": {"residual_streams": 2},
    "four streams, factorised": {"residual_streams": 4, "attention": "factorised"},
    "no value residual": {"value_residual": False},
    "no meta tokens": {"num_meta_tokens": 0},
    "no meta tokens, factorised": {"num_meta_tokens": 0, "attention": "factorised"},
    "action head": {"action_head": True},
}
"""The model's options, each apart from its default."""


@torch.no_grad()
def cached_logits_BfSQV(model: DynamicsModel, codes_Bthw: torch.Tensor, slots_BTA: torch.Tensor):
    """The logits of frames 1 .. t-1, asked for group by group and level by level by the cache."""
    r, cache = model.steps_per_frame, model.start_cache(batch=len(codes_Bthw))
    codes_BtSQ, logits = flatten_codes("codes", codes_Bthw, model.spec.tokenizer.codes), []
    for frame in range(model.grid.first_frame, codes_BtSQ.shape[1]):
        slots_BrA = slots_BTA[:, (frame - 1) * r : frame * r] if frame else None
        there = model.open_frame(frame, codes_BtSQ[:, max(0, frame - 1)], slots_BrA, cache)
        # What is not decided yet must not matter, so it is nonsense until it is.
        known_BSQ = torch.full_like(codes_BtSQ[:, 0], 31)
        parts = []
        for start, stop in model.grid.groups():
            cells = slice(start, stop)
            tokens_BsD = model.cached_tokens(there, cells, known_BSQ)
            levels = []
            for level in range(codes_BtSQ.shape[-1]):
                levels.append(model.level_logits(tokens_BsD, known_BSQ[:, cells, :level]))
                known_BSQ[:, cells, level] = codes_BtSQ[:, frame, cells, level]
            parts.append(torch.stack(levels, dim=2))
        logits.append(torch.cat(parts, dim=1))
    return torch.stack(logits[1 - model.grid.first_frame :], dim=1)


def write_shards(
    folder: Path,
    episodes: Sequence[tuple[np.ndarray, np.ndarray | None]],
    codes: CodeSpec,
    actions: ActionSpec,
    *,
    held_out: int = 1,
    per_shard: int = 4,
) -> TokenShards:
    """Write episodes (codes_thw, slots_TA) named e0, e1, ...; the last are for validation.

    Slots are None where nobody knows the actions.
    """
    folder.mkdir(parents=True)
    rows = [
        TokenEpisode(
            key=f"e{number}",
            codes_thw=codes_thw,
            slots_TA=slots_TA,
            num_frames=(
                codes.pixel_frames(len(codes_thw)) if slots_TA is None else len(slots_TA) + 1
            ),
            split="validation" if number >= len(episodes) - held_out else "train",
        )
        for number, (codes_thw, slots_TA) in enumerate(episodes)
    ]
    records = [
        write_shard(folder, index, rows[start : start + per_shard], codes=codes, actions=actions)
        for index, start in enumerate(range(0, len(rows), per_shard))
    ]
    write_manifest(
        folder,
        records,
        tokenizer=tokenizer_spec(codes),
        actions=actions,
        codebook_VZ=codebook_VZ(codes),
        fps=8.75,
        frame_skip=4,
        metrics={},
        source={"environment": "toy"},
    )
    return TokenShards(folder)


@dataclass(frozen=True)
class Mover:
    """A world whose rule is known: one lit cell (code 1) on a ring of rows and columns.

    With STEER one of four directions moves it, with KEYS all those that are pressed.
    """

    actions: ActionSpec
    height: int = 4
    width: int = 4

    @property
    def codes(self) -> CodeSpec:
        return code_spec(height=self.height, width=self.width, vocab_size=2)

    def next_place(self, place: np.ndarray, slots_A: np.ndarray) -> np.ndarray:
        """Where the lit cell goes."""
        if self.actions.kind == "keys":
            slots_A = slots_A[slots_A > 0] - 1  # 0 is no key
        for value in slots_A:
            place = place + MOVES[self.actions.names[value]]
        return place % (self.height, self.width)

    def episode(self, num_frames: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """codes_thw and slots_TA of a walk."""
        rng = np.random.default_rng(seed)
        if self.actions.kind == "keys":
            raw = rng.integers(0, 2, (num_frames - 1, 2))
        else:
            raw = rng.integers(0, 5, num_frames - 1)
        slots_TA = self.actions.encode(raw)
        place = rng.integers(0, (self.height, self.width))
        codes_thw = np.zeros((num_frames, self.height, self.width), np.uint8)
        for index in range(num_frames):
            if index:
                place = self.next_place(place, slots_TA[index - 1])
            codes_thw[index, place[0], place[1]] = 1
        return codes_thw, slots_TA

    def write(
        self, folder: Path, *, episodes: int, num_frames: int | tuple[int, int]
    ) -> TokenShards:
        """Write shards of walks; (3, 6) gives them 3, 4, 5, 6, 3, ... frames."""
        least, most = num_frames if isinstance(num_frames, tuple) else (num_frames,) * 2
        walks = [self.episode(least + seed % (most - least + 1), seed) for seed in range(episodes)]
        return write_shards(folder, walks, self.codes, self.actions, held_out=max(1, episodes // 8))


@dataclass(frozen=True)
class Dice:
    """A world that can be known in part: dice, and what their second codes make of them.

    Level 0 of every cell is thrown anew in every frame; level 1 is level 0 plus the action that
    leads to the frame, plus the number of the cell; level 2 is level 0 plus level 1.
    """

    num_levels: int = 2

    @property
    def codes(self) -> CodeSpec:
        return code_spec(height=2, width=3, vocab_size=6, num_levels=self.num_levels)

    def later_levels(self, first_thw: np.ndarray, slots_TA: np.ndarray) -> np.ndarray:
        """codes_thwQ that level 0 and the actions make necessary; frame 0 as if after action 0."""
        actions_t = np.concatenate([[0], slots_TA[:, 0]])
        second_thw = (first_thw + actions_t[:, None, None] + np.arange(6).reshape(2, 3)) % 6
        levels = [first_thw, second_thw, (first_thw + second_thw) % 6]
        return np.stack(levels[: self.num_levels], axis=-1)

    def episode(self, num_frames: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """codes_thwQ and slots_TA of a game."""
        rng = np.random.default_rng(seed)
        slots_TA = rng.integers(0, 5, (num_frames - 1, 1))
        return self.later_levels(rng.integers(0, 6, (num_frames, 2, 3)), slots_TA), slots_TA

    def write(self, folder: Path, *, episodes: int, num_frames: int) -> TokenShards:
        """Write shards of games."""
        games = [self.episode(num_frames, seed) for seed in range(episodes)]
        return write_shards(folder, games, self.codes, STEER, held_out=max(1, episodes // 8))


def tiny(**sizes: object) -> DynamicsConfig:
    """The sizes of a model that trains in seconds."""
    config = DynamicsConfig(num_layers=2, dim=32, num_heads=2, context_frames=4, num_meta_tokens=3)
    return replace(config, **sizes)  # type: ignore[arg-type]


def train(
    shards: Path | Sequence[Path],
    run: Path,
    *,
    model: DynamicsConfig | None = None,
    weights: Sequence[float] | None = None,
    stream: StreamConfig | None = None,
    on_validation: Callable[[DynamicsModel, int], None] | None = None,
    **settings: object,
) -> Path:
    """Train a tiny model on a folder of shards, or on several."""
    elsewhere = stream is not None
    opened: TokenShards | list[TokenShards]
    if isinstance(shards, Path):
        opened = TokenShards(shards, tars_elsewhere=elsewhere)
    else:
        opened = [TokenShards(folder, tars_elsewhere=elsewhere) for folder in shards]
    return train_dynamics_model(
        opened,
        run,
        model=model or tiny(),
        training=replace(TRAINING, **settings),  # type: ignore[arg-type]
        weights=weights,
        stream=stream,
        cpu=True,
        on_validation=on_validation,
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(Path(sys.argv[1]), Path(sys.argv[2]), num_steps=int(sys.argv[3]))
