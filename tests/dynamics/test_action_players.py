"""Players whose rule is known: the action head finds out what they do, and nothing that is not so.

Codes are thrown anew in every cell and frame, so that only the rule tells one action from another.
"""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from dynamics.toys import code_spec, codebook_VZ, tiny, tokenizer_spec
from einops import rearrange
from worldloom.common import ActionSpec
from worldloom.dynamics import DynamicsModel, DynamicsSpec, WindowBatch
from worldloom.dynamics.objective import Losses, Objective, mean_loss

FIVE = ActionSpec.discrete(["a", "b", "c", "d", "e"])
FOUR_KEYS = ActionSpec.keys(["a", "b", "c", "d"])
CHOICES = ActionSpec.multi_discrete([3, 2, 6], names=["a", "b", "c"])
STICKS = ActionSpec.continuous([-1.0, -1.0], [1.0, 1.0], names=["a", "b"], bins=3)
FRAMES, VALUES, CELLS = 4, 6, 6

Rule = Callable[[np.ndarray, np.ndarray, int, np.random.Generator], np.ndarray]
"""(codes_BtS, slots_BfrA, i, rng) -> the raw actions (B, ...) that are chosen on seeing frame i."""


def draw(
    spec: ActionSpec, rule: Rule, rng: np.random.Generator, *, steps: int, shown: bool = False
) -> WindowBatch:
    """32 windows of the player; with `shown`, the next frame's first cell shows the action."""
    codes_BtS = rng.integers(0, VALUES, (32, FRAMES, CELLS))
    slots_BfrA = np.zeros((32, FRAMES - 1, steps, spec.num_slots), np.int64)
    for index in range(FRAMES - 1):
        for step in range(steps):
            # The second action of a frame looks at cells further on.
            turned_BtS = np.roll(codes_BtS, -step, axis=2)
            slots_BfrA[:, index, step] = spec.encode(rule(turned_BtS, slots_BfrA, index, rng))
        if shown:
            codes_BtS[:, index + 1, 0] = slots_BfrA[:, index, 0, 0]
    return WindowBatch(
        torch.from_numpy(codes_BtS).unflatten(2, (2, 3)),
        torch.from_numpy(slots_BfrA).flatten(1, 2),
        torch.ones(32, FRAMES, dtype=torch.bool),
    )


class Shifted(Objective):
    """The faulty variant: actions are predicted from the tokens of the frame that they lead to."""

    def forward(self, batch: WindowBatch, fed: WindowBatch, /) -> Losses:
        """Return the losses, with the leak."""
        head = self.dynamics.action_head
        tokens_BfSD = self.dynamics.tokens(batch.codes_Bthw, fed.slots_BTA)
        slots_BfrA = batch.slots_BTA[:, :, None]
        logits = head(tokens_BfSD.roll(-1, 1), batch.codes_Bthw.flatten(2)[..., None], slots_BfrA)
        nats, _, right = head.nats(logits, slots_BfrA, batch.valid_Bt[:, 1:])
        return super().forward(batch, fed)._replace(action_nats=nats, actions_right=right)


def learn(
    spec: ActionSpec,
    rule: Rule,
    *,
    updates: int,
    steps: int = 1,
    shown: bool = False,
    objective: type[Objective] = Objective,
) -> Objective:
    """A model that has seen the player for so many updates."""
    codes = code_spec(height=2, width=3, vocab_size=VALUES, frames_per_latent=steps)
    about = DynamicsSpec(tokenizer=tokenizer_spec(codes), actions=spec, fps=8.75, frame_skip=4)
    model = DynamicsModel(tiny(action_head=True, num_layers=1), about, codebook_VZ(codes))
    learner = objective(model, z_loss=False, bf16=False)
    optimizer = torch.optim.AdamW(learner.parameters(), 5e-3, weight_decay=0.0)
    rng = np.random.default_rng(0)
    for update in range(updates):
        for group in optimizer.param_groups:
            left = (updates - update) / updates
            group["lr"] = 5e-3 * min(1.0, (update + 1) / 20, 3 * left)
        batch = draw(spec, rule, rng, steps=steps, shown=shown)
        losses, counts = learner(batch, batch), learner.counts(batch)
        mean_loss(losses, counts, action_weight=1.0, z_loss=0.0).backward()
        torch.nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return learner


@torch.no_grad()
def judge(
    learner: Objective, spec: ActionSpec, rule: Rule, *, first: int = 0, **world: object
) -> tuple[float, float]:
    """(nats per action, share of actions that are right) in fresh windows, after frame `first`."""
    nats = actions = right = 0.0
    rng = np.random.default_rng(1)
    for _ in range(8):
        batch = draw(spec, rule, rng, **{"steps": 1, **world})
        dynamics, valid_Bf = learner.dynamics, batch.valid_Bt[:, 1:].clone()
        valid_Bf[:, :first] = False
        slots_BfrA = rearrange(batch.slots_BTA, "B (f r) A -> B f r A", r=dynamics.steps_per_frame)
        logits_BfLX = dynamics.action_head(
            dynamics.tokens(batch.codes_Bthw, batch.slots_BTA),
            batch.codes_Bthw.flatten(2)[..., None],
            slots_BfrA,
        )
        sums = dynamics.action_head.nats(logits_BfLX, slots_BfrA, valid_Bf)
        nats, actions, right = (
            a + b.item() for a, b in zip((nats, actions, right), sums, strict=True)
        )
    return nats / actions, right / actions


def by_frame(spec: ActionSpec) -> Rule:
    """Every slot's value is that of a cell of its own, of the frame that is seen."""

    def rule(codes_BtS, slots_BfrA, i, rng):
        now_BS = codes_BtS[:, i]
        if spec.kind == "discrete":
            return now_BS[:, 4] % 5
        if spec.kind == "keys":  # none to all four at once
            return now_BS[:, :4] % 2
        sizes = np.array(spec.sizes)
        values = now_BS[:, : len(sizes)] % sizes
        return spec.decode(values) if spec.kind == "continuous" else values

    return rule


@pytest.mark.parametrize("spec", [FIVE, FOUR_KEYS, CHOICES, STICKS], ids=lambda spec: spec.kind)
def test_what_a_player_does_on_seeing_a_frame_is_known_wholly_after_150_updates(spec):
    rule = by_frame(spec)
    nats, right = judge(learn(spec, rule, updates=150), spec, rule)
    assert right == 1
    assert nats < 0.05


def test_both_actions_of_a_latent_frame_are_known_after_200_updates():
    rule = by_frame(FOUR_KEYS)
    learner = learn(FOUR_KEYS, rule, updates=200, steps=2)
    nats, right = judge(learner, FOUR_KEYS, rule, steps=2)
    assert right == 1
    assert nats < 0.05


def by_two_frames(codes_BtS, slots_BfrA, i, rng):
    """Cell 0 now plus cell 0 one frame before: neither alone says anything."""
    if i == 0:
        return rng.integers(0, 5, len(codes_BtS))
    return (codes_BtS[:, i, 0] % 5 + codes_BtS[:, i - 1, 0] % 5) % 5


def by_habit(codes_BtS, slots_BfrA, i, rng):
    """What was done before, where cell 0 is even; else what cell 1 says."""
    if i == 0:
        return rng.integers(0, 5, len(codes_BtS))
    return np.where(codes_BtS[:, i, 0] % 2, codes_BtS[:, i, 1] % 5, slots_BfrA[:, i - 1, 0, 0])


@pytest.mark.parametrize("rule", [by_two_frames, by_habit])
def test_a_player_who_remembers_is_known_wholly_after_200_updates(rule):
    """In the window's first frame, before which nothing was seen, only guessing is left."""
    learner = learn(FIVE, rule, updates=200)
    nats, right = judge(learner, FIVE, rule, first=1)
    assert right == 1
    assert nats < 0.05
    _, right = judge(learner, FIVE, rule, first=0)
    assert right == pytest.approx(1 / 3 * 1 / 5 + 2 / 3, abs=0.05)


def by_chance(codes_BtS, slots_BfrA, i, rng):
    """A die of five sides."""
    return rng.integers(0, 5, len(codes_BtS))


def test_of_a_player_who_throws_dice_only_the_entropy_is_learned():
    """Though the next frame shows the action: a head that saw it would know, as the variant does.

    The dynamics knows the action, and so does say what the next frame shows.
    """
    learner = learn(FIVE, by_chance, updates=100, shown=True)
    nats, right = judge(learner, FIVE, by_chance, shown=True)
    assert nats == pytest.approx(math.log(5), rel=0.02)
    assert right == pytest.approx(1 / 5, abs=0.05)
    batch = draw(FIVE, by_chance, np.random.default_rng(2), steps=1, shown=True)
    shown = learner.dynamics(batch.codes_Bthw, batch.slots_BTA)[:, :, 0].argmax(-1)
    assert torch.equal(shown, batch.codes_Bthw[:, 1:, 0, 0])
    faulty = learn(FIVE, by_chance, updates=60, shown=True, objective=Shifted)
    losses = faulty(batch, batch)
    assert losses.action_nats / faulty.counts(batch)[1] < 0.8 * math.log(5)


def twins(codes_BtS, slots_BfrA, i, rng):
    """Both sticks in the same of three places, by chance."""
    return STICKS.decode(np.repeat(rng.integers(0, 3, (len(codes_BtS), 1)), 2, axis=1))


def test_what_one_choice_says_of_the_next_is_learned():
    """genie2-pytorch's head was not teacher-forced; the variant here sees no symbol either."""
    learner = learn(STICKS, twins, updates=150)
    nats, _ = judge(learner, STICKS, twins)
    assert nats == pytest.approx(math.log(3), rel=0.02)
    slots_B1A = learner.dynamics.action_head.sample(
        None, torch.zeros(64, CELLS, 1, dtype=torch.int64),
        seeds_B=torch.arange(64), frame=0, temperature=1.0,
    )[:, 0]  # fmt: skip
    assert (slots_B1A[:, 0] == slots_B1A[:, 1]).all()
    assert set(slots_B1A[:, 0].tolist()) == {0, 1, 2}
    value = learner.dynamics.action_head.symbols.value
    with torch.no_grad():
        value.weight[:] = value.weight[0]
    faulty_nats, _ = judge(learner, STICKS, twins)
    assert faulty_nats > 1.9 * math.log(3)
