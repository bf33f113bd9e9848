"""The defects of genie2-pytorch: each is found, and is not in ours.

For every sentence there is a check of what it breaks, and a variant in which the defect is built in
on purpose: ours passes, the variant fails. Not here: the sentence about the interactive prompt,
which is `worldloom play`'s; and what a tokenizer may do wrong (tests/tokenizer).
"""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from dynamics.toys import (
    ACTIONS,
    KEYS,
    STEER,
    cached_logits_BfSQV,
    code_spec,
    make_model,
    random_codes,
    random_slots,
)
from einops import rearrange
from torch import nn
from torch.nn.functional import cross_entropy as plain_cross_entropy
from worldloom.dynamics import (
    NULL,
    Rollout,
    SamplingConfig,
    WindowBatch,
    cross_entropy,
    generate_codes,
    layout,
)
from worldloom.dynamics import model as model_module
from worldloom.dynamics.action_head import ActionHead
from worldloom.dynamics.actions import ActionEmbedding
from worldloom.dynamics.disturbance import drop_actions
from worldloom.dynamics.guidance import guide
from worldloom.dynamics.meta_tokens import MetaTokens
from worldloom.dynamics.objective import Losses, Objective, mean_loss

GREEDY = SamplingConfig(temperature=0.0, refinements=1)


def check_both(check: Callable[..., None], ours: object, faulty: object) -> None:
    """Ours keeps the promise; the faulty variant breaks it, and the check sees that."""
    check(ours)
    with pytest.raises(AssertionError):
        check(faulty)


def a_batch(model, frames=4, *, valid_Bt=None):
    """Random windows of a model."""
    codes_Bthw, slots_BTA = (make(model, frames) for make in (random_codes, random_slots))
    if model.spec.actions.kind == "keys":
        slots_BTA = rising(slots_BTA)
    valid_Bt = torch.ones(2, frames, dtype=torch.bool) if valid_Bt is None else valid_Bt
    return WindowBatch(codes_Bthw, slots_BTA, valid_Bt)


def rising(slots_BTA):
    """Key slots as ActionSpec has them: the first two keys, then one, then none, in turn."""
    keys_TA = torch.zeros_like(slots_BTA[0])
    keys_TA[::3, 0], keys_TA[::3, 1], keys_TA[1::3, 0] = 1, 2, 2
    return keys_TA.expand_as(slots_BTA).clone()


def total(objective, batch):
    """What an update lowers."""
    counts = objective.counts(batch)
    return mean_loss(objective(batch, batch), counts, action_weight=1.0, z_loss=0.0)


# Zero-initialised meta tokens stop all training.


def test_zero_initialised_meta_tokens_stop_all_training():
    """A norm's gradient at zero is huge: clipped, it leaves nothing of all others."""

    def check(zeros):
        model = make_model().train().requires_grad_()
        fresh = MetaTokens(model.config.num_meta_tokens, model.config.dim)
        with torch.no_grad():
            model.meta.tokens_MD.copy_(fresh.tokens_MD * (not zeros))
        total(Objective(model, z_loss=False, bf16=False), a_batch(model)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        others = [p.grad.norm() for name, p in model.named_parameters() if name[:4] != "meta"]
        assert torch.stack(others).norm() > 0.1

    assert MetaTokens(1000, 64).tokens_MD.std().item() == pytest.approx(0.02, rel=0.05)
    check_both(check, False, True)


# Rotary time positions computed from a partial sequence are wrong while sampling.


def test_rotary_time_positions_computed_from_a_partial_sequence_are_wrong_while_sampling(
    monkeypatch,
):
    """What is asked of the cache, frame by frame, is what the whole window says."""
    codes_Bthw, slots_BTA = (make(make_model(), 6) for make in (random_codes, random_slots))

    def check(model):
        full_BfSV = model(codes_Bthw, slots_BTA)
        cached_BfSQV = cached_logits_BfSQV(model, codes_Bthw, slots_BTA)
        assert (cached_BfSQV[:, :, :, 0] - full_BfSV).abs().max() < 2e-5

    check(make_model(order="raster"))
    true_in_time = layout.in_time

    def counted_from_what_is_fed(frames_L, axes):
        return true_in_time(torch.arange(len(frames_L)), axes)

    monkeypatch.setattr(layout, "in_time", counted_from_what_is_fed)
    with pytest.raises(AssertionError):
        check(make_model(order="raster"))


# The variable-length mask is inverted.


def test_the_variable_length_mask_is_inverted():
    """Only real frames are learned from, and what stands in the padding changes nothing."""
    model = make_model()
    valid_Bt = torch.tensor([[True] * 5, [True, True, True, False, False]])
    batch = a_batch(model, 5, valid_Bt=valid_Bt)

    def check(loss):
        logits_BfSV = model(batch.codes_Bthw, batch.slots_BTA).requires_grad_()
        nats, count = loss(logits_BfSV, batch)
        nats.backward()
        used_Bf = logits_BfSV.grad.flatten(2).any(-1)
        assert used_Bf.tolist() == [[True] * 4, [True, True, False, False]]
        assert count == (4 + 2) * 12

    def inverted(logits_BfSV, batch):
        return cross_entropy(logits_BfSV, replace(batch, valid_Bt=~batch.valid_Bt))

    check_both(check, cross_entropy, inverted)


# Multi-key actions with the action loss never construct.


@pytest.mark.parametrize("kind", sorted(set(ACTIONS) - {"none"}))
@pytest.mark.parametrize("r", [1, 2])
def test_multi_key_actions_with_the_action_loss_never_construct(monkeypatch, kind, r):
    """Every kind of action is learned with the action loss on, down to its last weight."""

    def check(head):
        monkeypatch.setattr(model_module, "ActionHead", head)
        try:
            model = make_model(code_spec(frames_per_latent=r), ACTIONS[kind], action_head=True)
            total(
                Objective(model.requires_grad_(), z_loss=False, bf16=False), a_batch(model)
            ).backward()
        except (TypeError, ValueError) as error:
            raise AssertionError("several symbols a latent frame do not work") from error
        assert all(p.grad.abs().max() > 0 for p in model.action_head.parameters())

    class OneChoiceOnly(ActionHead):
        def __init__(self, codebook_QVZ, actions, /, *, steps, **sizes):
            if steps * actions.num_slots > 1:
                raise TypeError("unexpected keyword argument")
            super().__init__(codebook_QVZ, actions, steps=steps, **sizes)

    check(ActionHead)
    if (kind, r) != ("discrete", 1):
        with pytest.raises(AssertionError):
            check(OneChoiceOnly)


# `actions=None` crashes when the action loss is on; so does `num_actions=None`.


class LabelsAsTheyAre(ActionHead):
    """Faulty: what is not known goes into the loss like any label."""

    def nats(self, logits_BfLX, slots_BfrA, valid_Bf):
        labels = rearrange(slots_BfrA, "B f r A -> (B f r A)")
        nats = plain_cross_entropy(logits_BfLX.flatten(0, 2), labels, reduction="sum")
        return nats, torch.tensor(labels.numel()), torch.zeros(())


@pytest.mark.parametrize("kind", sorted(ACTIONS))
def test_actions_none_crashes_when_the_action_loss_is_on(monkeypatch, kind):
    """No actions at all (A = 0), and null everywhere, train and generate."""

    def check(head):
        monkeypatch.setattr(model_module, "ActionHead", head)
        model = make_model(actions=ACTIONS[kind], action_head=True).requires_grad_()
        batch = a_batch(model)
        batch = replace(batch, slots_BTA=torch.full_like(batch.slots_BTA, NULL))
        objective = Objective(model, z_loss=False, bf16=False)
        try:
            loss = total(objective, batch)
        except (IndexError, RuntimeError) as error:
            raise AssertionError("windows without actions cannot be learned from") from error
        loss.backward()
        codes_alone = total(
            Objective(make_model(actions=ACTIONS[kind]), z_loss=False, bf16=False), batch
        )
        assert loss.item() == pytest.approx(codes_alone.item(), rel=1e-6)
        made_Bthw = generate_codes(
            model, batch.codes_Bthw[:, :1], batch.slots_BTA, seeds=[0, 1], sampling=GREEDY
        )
        assert made_Bthw.shape == batch.codes_Bthw.shape

    check(ActionHead)
    if kind != "none":
        with pytest.raises(AssertionError):
            check(LabelsAsTheyAre)


# Non-interactive generation ignores actions.


def test_non_interactive_generation_ignores_actions():
    model = make_model()
    prompt_Bthw = random_codes(model, 2, batch=1)

    def check(generate):
        made = {
            action: generate(
                model, prompt_Bthw, torch.full((1, 6, 1), action), seeds=[0], sampling=GREEDY
            )
            for action in range(5)
        }
        assert len({tuple(codes.flatten().tolist()) for codes in made.values()}) == 5

    def deaf(model, prompt_Bthw, slots_BTA, **settings):
        return generate_codes(model, prompt_Bthw, torch.full_like(slots_BTA, NULL), **settings)

    check_both(check, generate_codes, deaf)


# Padding -1 becomes action 0 in the labels. The single-action loss ignores lengths.


class PaddingIsActionZero(ActionHead):
    """Faulty: -1 is clamped to the first action before the loss is taken."""

    def nats(self, logits_BfLX, slots_BfrA, valid_Bf):
        return super().nats(logits_BfLX, slots_BfrA.clamp_min(0), valid_Bf)


class EveryFrameCounts(ActionHead):
    """Faulty: nobody asks how long an episode is."""

    def nats(self, logits_BfLX, slots_BfrA, valid_Bf):
        return super().nats(logits_BfLX, slots_BfrA, torch.ones_like(valid_Bf))


def check_padding(make_head, *, padding: int) -> None:
    """The action loss of a short episode is that of its real steps alone."""
    model = make_model(action_head=True)
    model.action_head.__class__ = make_head
    valid_Bt = torch.tensor([[True] * 5, [True, True, True, False, False]])
    batch = a_batch(model, 5, valid_Bt=valid_Bt)
    batch.slots_BTA[1, 2:] = padding
    objective = Objective(model, z_loss=False, bf16=False)
    whole = objective(batch, batch)
    first = batch.rows(slice(0, 1))
    short = WindowBatch(batch.codes_Bthw[1:, :3], batch.slots_BTA[1:, :2], valid_Bt[1:, :3])
    parts = [objective(part, part) for part in (first, short)]
    assert objective.counts(batch).tolist() == [(4 + 2) * 12, 4 + 2]
    wanted = sum(part.action_nats for part in parts)
    assert whole.action_nats.item() == pytest.approx(wanted.item(), rel=1e-5)


def test_padding_becomes_action_0_in_the_labels():
    """Real steps whose action nobody knows: their label is -1, and they are no padding."""
    model = make_model(action_head=True)
    batch = a_batch(model, 5)
    batch.slots_BTA[:, 2:] = NULL

    def check(head):
        model.action_head.__class__ = head
        losses = Objective(model, z_loss=False, bf16=False)(batch, batch)
        tokens_BfSD = model.tokens(batch.codes_Bthw, batch.slots_BTA)
        logits_BfLX = model.action_head(
            tokens_BfSD, batch.codes_Bthw.flatten(2)[..., None], batch.slots_BTA[:, :, None]
        )
        known = plain_cross_entropy(
            logits_BfLX[:, :2, 0].flatten(0, 1), batch.slots_BTA[:, :2].flatten(), reduction="sum"
        )
        assert losses.action_nats.item() == pytest.approx(known.item(), rel=1e-5)

    check_both(check, ActionHead, PaddingIsActionZero)


@pytest.mark.parametrize("padding", [NULL, 0, 3])
def test_the_single_action_loss_ignores_lengths(padding):
    check_padding(ActionHead, padding=padding)
    if padding != NULL:  # that is no label in any case
        with pytest.raises(AssertionError):
            check_padding(EveryFrameCounts, padding=padding)


# All cells of a frame share one position.


@pytest.mark.parametrize("options", [{}, {"positions": "time"}, {"cell_embedding": False}])
def test_all_cells_of_a_frame_share_one_position(options):
    """Fed the same everywhere they are told apart: by a vector of their own, or by their place."""

    def check(model):
        codes_Bthw = random_codes(model, 3, batch=1)
        codes_Bthw[:, 1] = 7  # what every cell is fed; what it sees differs
        logits_SV = model(codes_Bthw, random_slots(model, 3, batch=1))[0, 1]
        assert len({tuple(row) for row in logits_SV.tolist()}) == 12

    faulty = make_model(cell_embedding=False)
    one = layout.Rotary(*(part[:1].expand(12, -1) for part in faulty.layout._space_rotary()))
    faulty.layout._space_rotary = lambda: one
    check_both(check, make_model(**options), faulty)


# Temporal compression misaligns positions.


@pytest.mark.parametrize("r", [2, 4])
def test_temporal_compression_misaligns_positions(monkeypatch, r):
    """A latent frame is one step of time, however many pixel frames and actions it has."""

    def check(true_in_time):
        plain, compressed = make_model(), make_model(code_spec(frames_per_latent=r))
        with torch.no_grad():
            for name, parameter in plain.named_parameters():
                if name != "actions.table.weight":
                    compressed.get_parameter(name).copy_(parameter)
            for model in (plain, compressed):
                model.actions.table.weight.zero_()
        codes_Bthw = random_codes(plain, 6)
        plain_BfSV = plain(codes_Bthw, random_slots(plain, 6))
        monkeypatch.setattr(layout, "in_time", true_in_time)
        compressed_BfSV = compressed(codes_Bthw, random_slots(compressed, 6))
        monkeypatch.undo()
        assert torch.equal(plain_BfSV, compressed_BfSV)

    def in_pixel_frames(frames_L, axes):
        return ours(frames_L * r, axes)

    ours = layout.in_time
    check_both(check, ours, in_pixel_frames)


# The reconstruction loss is added only with the action loss.


@pytest.mark.parametrize("action_weight", [0.0, 1.0])
def test_the_reconstruction_loss_is_added_only_with_the_action_loss(action_weight):
    """What is lowered counts the codes alike with an action head, without, and at weight 0."""

    def check(mean):
        without, having = make_model(), make_model(action_head=True)
        batch = a_batch(without)
        losses = []
        for model in (without, having):
            objective = Objective(model, z_loss=False, bf16=False)
            losses.append(
                mean(
                    objective(batch, batch),
                    objective.counts(batch),
                    action_weight=action_weight,
                    z_loss=0.0,
                )
            )
        nats, count = cross_entropy(without(batch.codes_Bthw, batch.slots_BTA), batch)
        assert losses[0].item() == pytest.approx(nats.item() / count, rel=1e-5)
        assert losses[1] == losses[0] if action_weight == 0 else losses[1] > losses[0]

    def only_together(losses, counts, **weights):
        if losses.action_nats == 0:
            losses = Losses(losses.code_nats * 0, *losses[1:])
        return mean_loss(losses, counts, **weights)

    check_both(check, mean_loss, only_together)


# Cross-entropy flows into the encoder while the EMA codebook is the output head.


@pytest.mark.parametrize("head", ["linear", "dot", "distance"])
def test_cross_entropy_moves_the_codebook(head):
    """The codebook is the tokenizer's, at the input and at the output: what learns is beside it."""

    def check(learned):
        model = make_model(order="raster", head=head)
        if learned:
            codebook = model.before.vectors
            del model.before.vectors
            model.before.vectors = nn.Parameter(codebook)
        books = [
            model.get_submodule(path).get_buffer(name)
            if not learned
            else getattr(model.get_submodule(path), name)
            for path, name in (
                ("before", "vectors"),
                ("beside", "vectors"),
                *([("head", "vectors_VZ")] if head != "linear" else []),
            )
        ]
        before = [book.detach().clone() for book in books]
        optimizer = torch.optim.SGD(model.train().requires_grad_().parameters(), lr=1.0)
        total(Objective(model, z_loss=False, bf16=False), a_batch(model)).backward()
        optimizer.step()
        assert all(torch.equal(*pair) for pair in zip(before, books, strict=True))

    check_both(check, False, True)


# Guidance dropout is per batch and null equals no-op.


def test_guidance_dropout_is_per_batch():
    """Of the windows of a batch some lose their actions, all of them or none."""

    def check(drop):
        slots_BTA = torch.ones(64, 3, 1, dtype=torch.int64)
        rngs = [torch.Generator().manual_seed(row) for row in range(64)]
        dropped_BT = (drop(slots_BTA, 0.5, rngs) == NULL)[..., 0]
        assert torch.equal(dropped_BT.any(1), dropped_BT.all(1))
        assert 16 < dropped_BT[:, 0].sum() < 48

    def per_batch(slots_BTA, rate, rngs):
        dropped = torch.rand(1, generator=rngs[0]) < rate
        return slots_BTA.masked_fill(dropped[:, None, None], NULL)

    check_both(check, drop_actions, per_batch)


def test_null_equals_no_op():
    embedding = ActionEmbedding(STEER, steps=2, dim=8)

    def check(embed):
        no_op, null = torch.zeros(1, 1, 2, 1, dtype=torch.int64), torch.full((1, 1, 2, 1), NULL)
        assert not torch.equal(embed(no_op), embed(null))
        for slots_BfrA, rows in ((no_op, [1, 7]), (null, [0, 6])):
            embedding.table.weight.grad = None
            embed(slots_BfrA).sum().backward()
            touched = embedding.table.weight.grad.abs().sum(1).nonzero().flatten().tolist()
            assert touched == rows

    check_both(check, embedding, lambda slots_BfrA: embedding(slots_BfrA.clamp_min(0)))


@pytest.mark.parametrize("kind", sorted(ACTIONS))
def test_an_action_shares_a_row_with_another_or_with_null(kind):
    """Each value of each slot has its own; but a key has one in all slots."""
    spec = ACTIONS[kind]
    embedding = ActionEmbedding(spec, steps=2, dim=8)
    slots = 1 if kind == "keys" else len(spec.sizes)
    count = 2 * sum(spec.sizes[slot] + 1 for slot in range(slots))

    def check(first_rows_rA):
        rows = {
            int(first_rows_rA[step, slot]) + value
            for step in range(2)
            for slot in range(slots)
            for value in range(NULL, spec.sizes[slot])
        }
        assert rows == set(range(count))

    assert len(embedding.table.weight) == max(1, count)
    check(embedding.first_rows_rA)
    if kind != "none":
        with pytest.raises(AssertionError):
            check(embedding.first_rows_rA[:1].expand(2, -1))


# The action head is not teacher-forced.


class FromItsOwnGuesses(ActionHead):
    """Faulty: a key is predicted without the true ones before it."""

    def forward(self, tokens_BfSD, codes_BtSQ, slots_BfrA):
        return super().forward(tokens_BfSD, codes_BtSQ, torch.full_like(slots_BfrA, NULL))


def test_the_action_head_is_not_teacher_forced():
    """The loss of the second key is taken with the true first one known."""
    model = make_model(actions=KEYS, action_head=True)
    codes_BtSQ = random_codes(model, 2).flatten(2)[..., None]
    tokens_BfSD = model.tokens(random_codes(model, 2), torch.zeros(2, 1, 2, dtype=torch.int64))

    def check(head):
        model.action_head.__class__ = head
        logits = [
            model.action_head(tokens_BfSD, codes_BtSQ, torch.tensor([[[[first, 0]]]] * 2))
            for first in (1, 2)
        ]
        assert torch.equal(logits[0][:, :, 0], logits[1][:, :, 0])
        assert not torch.equal(logits[0][:, :, 1], logits[1][:, :, 1])

    check_both(check, ActionHead, FromItsOwnGuesses)


# No KV cache; guidance costs two full passes; no context limit.


class WithoutCache:
    """Faulty: each frame is predicted from all frames so far, read again."""

    def __init__(self, model, codes_Bthw, slots_BTA, **_):
        self.model, self.codes_Bthw, self.slots_BTA = model, codes_Bthw, slots_BTA

    def step(self, slots_BrA):
        self.slots_BTA = torch.cat([self.slots_BTA, slots_BrA], dim=1)
        codes_Bthw = torch.cat([self.codes_Bthw, self.codes_Bthw[:, -1:]], dim=1)
        logits_BfSV = self.model(codes_Bthw, self.slots_BTA)
        codes_Bthw[:, -1] = logits_BfSV[:, -1].argmax(-1).unflatten(-1, (3, 4))
        self.codes_Bthw = codes_Bthw
        return codes_Bthw[:, -1]

    @property
    def size_bytes(self):
        return 8 * self.codes_Bthw.numel()


def forwards_of(model, compute) -> list[tuple[int, int]]:
    """(rows, tokens) of every forward through the transformer while something is computed."""
    shapes = []
    hook = model.transformer.register_forward_pre_hook(
        lambda _module, args: shapes.append(tuple(args[0].shape[:2]))
    )
    compute()
    hook.remove()
    return shapes


def test_no_kv_cache():
    """A step computes one frame's tokens, not the past's again."""
    model = make_model()
    prompt = random_codes(model, 3), random_slots(model, 3)

    def check(kind):
        rollout = kind(model, *prompt, seeds=[0, 1], sampling=GREEDY)
        shapes = forwards_of(model, lambda: rollout.step(random_slots(model, 2)))
        assert shapes == [(2, 12)]

    check_both(check, Rollout, WithoutCache)


def test_guidance_costs_two_full_passes():
    """Worlds under their actions and under none are rows of one forward."""
    model = make_model()
    guided = replace(GREEDY, guidance_scale=2.0)

    class TwoPasses:
        def __init__(self, model, codes_Bthw, slots_BTA, **settings):
            plain = {**settings, "sampling": GREEDY}
            nulls = torch.full_like(slots_BTA, NULL)
            self.both = [Rollout(model, codes_Bthw, slots, **plain) for slots in (slots_BTA, nulls)]

        def step(self, slots_BrA):
            for rollout in self.both:
                rollout.step(slots_BrA)

    def check(kind):
        rollout = kind(
            model, random_codes(model, 3), random_slots(model, 3), seeds=[0, 1], sampling=guided
        )
        rollout.step(random_slots(model, 2))  # the first reads the past without actions, once
        shapes = forwards_of(model, lambda: rollout.step(random_slots(model, 2)))
        assert shapes == [(4, 12)]

    check_both(check, Rollout, TwoPasses)


def test_no_context_limit():
    """A long rollout costs what a short one costs, in tokens and in memory."""
    model = make_model()
    assert model.config.context_frames == 3

    def check(kind):
        rollout = kind(
            model, random_codes(model, 3), random_slots(model, 3), seeds=[0, 1], sampling=GREEDY
        )
        costs = []
        for _ in range(30):
            shapes = forwards_of(model, lambda: rollout.step(random_slots(model, 2)))
            costs.append((rollout.size_bytes, shapes))
        assert costs[0] == costs[-1]

    check_both(check, Rollout, WithoutCache)


# Guidance projects over the whole sequence.


def test_guidance_projects_over_the_whole_sequence():
    """Each cell is guided by what it expects itself, whatever the other cells expect."""
    generator = torch.Generator().manual_seed(0)
    given_BsV, free_BsV = (torch.randn(2, 3, 8, generator=generator) for _ in range(2))

    def check(guided):
        how = {"scale": 3.0, "parallel_keep_frac": 0.0}
        together = guided(given_BsV, free_BsV, **how)
        alone = guided(given_BsV[:, :1], free_BsV[:, :1], **how)
        assert (together[:, :1] - alone).abs().max() < 1e-5

    def over_all(given_BsV, free_BsV, **how):
        flat = (rearrange(logits, "B s V -> B 1 (s V)") for logits in (given_BsV, free_BsV))
        return guide(*flat, **how).view_as(given_BsV)

    check_both(check, guide, over_all)


# Square grids only.


@pytest.mark.parametrize(("height", "width"), [(1, 5), (5, 1), (2, 7), (3, 12)])
@pytest.mark.parametrize("order", ["raster", "row", "frame", "masked"])
def test_square_grids_only(height, width, order):
    """A grid is as high and as wide as it is: what it generates is what the forward finds best."""

    def check(make):
        model = make(code_spec(height=height, width=width), order=order)
        slots_BTA = random_slots(model, 4)
        prompt_Bthw = torch.randint(32, (2, 1, height, width))
        try:
            codes_Bthw = generate_codes(
                model, prompt_Bthw, slots_BTA, seeds=[0, 1], sampling=GREEDY
            )
        except Exception as error:
            raise AssertionError("this grid cannot be generated") from error
        assert codes_Bthw.shape == (2, 4, height, width)
        assert torch.equal(model(codes_Bthw, slots_BTA).argmax(-1), codes_Bthw[:, 1:].flatten(2))

    def square(codes, **options):
        side = int((codes.grid_height * codes.grid_width) ** 0.5)
        return make_model(code_spec(height=side, width=side), **options)

    check_both(check, make_model, square)


# Importing it needs the network.


def test_importing_it_needs_the_network():
    def check(imports):
        program = (
            "import sys\n"
            "def refuse(event, args):\n"
            "    if event in ('socket.connect', 'socket.getaddrinfo', 'urllib.Request'):\n"
            "        raise SystemExit(f'{event} {args}')\n"
            "sys.addaudithook(refuse)\n" + imports
        )
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True
        )
        assert (done.returncode, done.stderr) == (0, "")

    ours = "import worldloom.dynamics as d\n[getattr(d, name) for name in dir(d)]\n"
    check_both(check, ours, "import socket\nsocket.getaddrinfo('127.0.0.1', 80)\n")
