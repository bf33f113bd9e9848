"""Worlds whose rule is known, with every kind of action: a model must get them wholly right.

    Walk(actions, ...).episode(num_frames, seed)  ->  codes_thw (or thwQ) and slots_TA of a walk

One cell is lit, on a ring of rows and columns, and actions move it. So that every part of a
sequence decides something, a walk may act late, be told several actions a latent frame of which
the last that moves counts, and have a second code a cell that the action alone decides.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from dynamics.toys import KEYS, MOVES, STEER, code_spec, write_shards
from worldloom.common import ActionSpec, CodeSpec, TokenShards

TWO_CHOICES = ActionSpec.multi_discrete([2, 3], names=["down", "sideways"])
STICK = ActionSpec.continuous([-1.0, -1.0], [1.0, 1.0], names=["down", "right"], bins=3)


@dataclass(frozen=True)
class Walk:
    """A lit cell that actions move: the frame after them is certain."""

    actions: ActionSpec = STEER
    """STEER, KEYS, TWO_CHOICES, STICK; without actions the cell goes on, line by line."""
    height: int = 2
    width: int = 3
    frames_per_latent: int = 1
    """Steps a latent frame, r; of its r actions the last that moves counts."""
    delay: int = 0
    """Latent frames between an action and the move."""
    num_levels: int = 1
    """With 2, every cell has a second code, of whether it is lit and of the last action."""

    @property
    def codes(self) -> CodeSpec:
        return code_spec(
            height=self.height,
            width=self.width,
            vocab_size=2 if self.num_levels == 1 else 10,
            frames_per_latent=self.frames_per_latent,
            num_levels=self.num_levels,
        )

    @property
    def prompt_frames(self) -> int:
        """Latent frames after which everything is decided by what was seen."""
        return 1 + self.delay

    def draw(self, latent_frames: int, rng: np.random.Generator) -> np.ndarray:
        """slots_TA of the steps between latent frames; of several a frame most do not move."""
        sizes = np.asarray(self.actions.sizes, np.int64)
        steps = (latent_frames - 1) * self.frames_per_latent
        if self.actions == KEYS:
            return KEYS.encode(rng.integers(0, 2, (steps, 2)))
        slots_TA = rng.integers(0, sizes, (steps, len(sizes)))
        if self.frames_per_latent > 1:
            slots_TA *= rng.random((steps, 1)) < 2 / self.frames_per_latent  # 0 is to stay
        return slots_TA

    def move(self, slots_A: np.ndarray) -> tuple[int, int]:
        """By how many rows and columns one action moves."""
        if self.actions == STICK:
            return int(slots_A[0]) - 1, int(slots_A[1]) - 1
        if self.actions == TWO_CHOICES:
            return int(slots_A[0]), int(slots_A[1]) - 1
        values = slots_A[slots_A > 0] - 1 if self.actions == KEYS else slots_A  # 0 is no key
        moves = [MOVES[self.actions.names[value]] for value in values]
        return sum(rows for rows, _ in moves), sum(columns for _, columns in moves)

    def next_place(self, place_2: np.ndarray, frame: int, slots_TA: np.ndarray) -> np.ndarray:
        """Where the lit cell is in a latent frame, from where it was."""
        if self.actions.kind == "none":
            rows, column = divmod(int(place_2[1]) + 1, self.width)
            return np.array([(place_2[0] + rows) % self.height, column])
        r, group = self.frames_per_latent, frame - 1 - self.delay
        for slots_A in reversed(slots_TA[group * r : (group + 1) * r] if group >= 0 else []):
            if self.move(slots_A) != (0, 0):
                return (place_2 + self.move(slots_A)) % (self.height, self.width)
        return place_2

    def episode(self, latent_frames: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """codes_thw (codes_thwQ with levels) and slots_TA of a walk."""
        rng = np.random.default_rng(seed)
        slots_TA = self.draw(latent_frames, rng)
        place_2 = rng.integers(0, (self.height, self.width))
        codes_thw = np.zeros((latent_frames, self.height, self.width), np.uint8)
        for frame in range(latent_frames):
            if frame:
                place_2 = self.next_place(place_2, frame, slots_TA)
            codes_thw[frame, place_2[0], place_2[1]] = 1
        if self.num_levels == 1:
            return codes_thw, slots_TA
        last_t = np.array([0, *slots_TA[self.frames_per_latent - 1 :: self.frames_per_latent, 0]])
        second_thw = 5 * codes_thw + last_t[:, None, None]
        return np.stack([codes_thw, second_thw], axis=-1).astype(np.uint8), slots_TA

    def write(
        self,
        folder: Path,
        *,
        episodes: int,
        latent_frames: tuple[int, int],
        half_labelled: bool = False,
    ) -> TokenShards:
        """Write shards of walks; (3, 6) gives them 3, 4, 5, 6, 3, ... latent frames.

        Half labelled, nobody knows the actions of every second walk.
        """
        least, most = latent_frames
        walks: list[tuple[np.ndarray, np.ndarray | None]] = []
        for seed in range(episodes):
            codes_thw, slots_TA = self.episode(least + seed % (most - least + 1), seed)
            # By the pair, or short walks alone would be labelled.
            walks.append((codes_thw, None if half_labelled and seed // 2 % 2 else slots_TA))
        return write_shards(
            folder, walks, self.codes, self.actions, held_out=episodes // 8, per_shard=episodes
        )
