"""The action head: which actions are possible, what it may know, and what counts as a label."""

import itertools

import numpy as np
import pytest
import torch
from dynamics.toys import ACTIONS, OPTIONS, STEER, code_spec, codebook_VZ, make_model, random_codes
from einops import rearrange
from worldloom.common import ActionSpec
from worldloom.dynamics import NULL, DynamicsModel, WindowBatch
from worldloom.dynamics.action_head import NOISE_LEVEL, ActionHead
from worldloom.dynamics.objective import Objective, mean_loss
from worldloom.dynamics.sampling import keyed_gumbel

KINDS = {kind: spec for kind, spec in ACTIONS.items() if kind != "none"}
every_kind = pytest.mark.parametrize("spec", KINDS.values(), ids=list(KINDS))
SEEN = {
    name: OPTIONS[name] for name in ("actions prepended", "factorised", "factorised, prepended")
} | {"as it is": {}}


def make_head(spec: ActionSpec, *, steps: int = 1, seed: int = 0) -> ActionHead:
    """A head of its own, in which every layer does something."""
    codes = code_spec(height=2, width=3, vocab_size=6)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        head = ActionHead(
            torch.from_numpy(codebook_VZ(codes))[None],
            spec, steps=steps, cells=6, dim=16, num_heads=2, ff_mult=2.0,
        )  # fmt: skip
        with torch.no_grad():
            for parameter in head.parameters():
                parameter += 0.3 * torch.randn(parameter.shape)
    return head


def windows(batch: int = 2, frames: int = 4, *, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """tokens_BfSD and codes_BtSQ as a model would hand them to such a head."""
    generator = torch.Generator().manual_seed(seed)
    tokens_BfSD = torch.randn(batch, frames - 1, 6, 16, generator=generator)
    return tokens_BfSD, torch.randint(6, (batch, frames, 6, 1), generator=generator)


def actions(spec: ActionSpec, *shape: int, seed: int = 0) -> torch.Tensor:
    """slots_..A of actions that the spec allows; no two kinds of them are equally long."""
    every_NA = all_actions(spec)
    rows = np.random.default_rng(seed).integers(0, len(every_NA), shape)
    return torch.from_numpy(every_NA[rows])


def all_actions(spec: ActionSpec) -> np.ndarray:
    """slots_NA of every action there is."""
    if spec.kind == "keys":
        pressed = itertools.product((0, 1), repeat=len(spec.names))
        return spec.encode(np.array([raw for raw in pressed if sum(raw) <= spec.num_slots]))
    return np.array(list(itertools.product(*map(range, spec.sizes))))


def all_real(slots_BfrA: torch.Tensor) -> torch.Tensor:
    """valid_Bf without padding."""
    return torch.ones(slots_BfrA.shape[:2], dtype=torch.bool)


def nats_of(head: ActionHead, slots_BfrA: torch.Tensor, *, seed: int = 0) -> torch.Tensor:
    """The loss of these actions in the windows of `seed`."""
    logits_BfLX = head(*windows(len(slots_BfrA), slots_BfrA.shape[1] + 1, seed=seed), slots_BfrA)
    return head.nats(logits_BfLX, slots_BfrA, all_real(slots_BfrA))[0]


# --- what is possible ---------------------------------------------------------------------------


@every_kind
def test_the_probabilities_of_all_actions_of_a_kind_sum_to_one(spec):
    """So no probability is lost to actions that the game does not have."""
    head, every_NA = make_head(spec), torch.from_numpy(all_actions(spec))
    tokens_BfSD, codes_BtSQ = (part.expand(len(every_NA), -1, -1, -1) for part in windows(1, 2))
    slots_N1rA = every_NA[:, None, None]
    logits = head(tokens_BfSD, codes_BtSQ, slots_N1rA).detach()
    probabilities_N = torch.stack(
        [
            head.nats(logits[n : n + 1], slots_N1rA[n : n + 1], torch.ones(1, 1, dtype=torch.bool))[
                0
            ]
            for n in range(len(every_NA))
        ]
    ).neg().exp()  # fmt: skip
    assert probabilities_N.sum().item() == pytest.approx(1, abs=1e-5)
    assert (probabilities_N > 0).all()


@pytest.mark.parametrize("steps", [1, 3])
@every_kind
def test_every_action_that_is_drawn_is_one_of_the_game(spec, steps):
    head, (tokens_BfSD, codes_BtSQ) = make_head(spec, steps=steps), windows(256, 2)
    for temperature in (0.0, 1.0, 50.0):
        slots_BrA = head.sample(
            tokens_BfSD[:, 0], codes_BtSQ[:, 1],
            seeds_B=torch.arange(256), frame=1, temperature=temperature,
        )  # fmt: skip
        assert slots_BrA.shape == (256, steps, spec.num_slots)
        spec.check_slots(slots_BrA.flatten(0, 1).numpy())


@every_kind
def test_actions_are_drawn_as_often_as_their_loss_says(spec):
    head, count = make_head(spec), 8192
    every_NA = torch.from_numpy(all_actions(spec))
    tokens_BfSD, codes_BtSQ = windows(1, 2)
    slots_BrA = head.sample(
        tokens_BfSD[:, 0].expand(count, -1, -1), codes_BtSQ[:, 1].expand(count, -1, -1),
        seeds_B=torch.arange(count), frame=1, temperature=1.0,
    )  # fmt: skip
    drawn_N = (slots_BrA[:, 0, None] == every_NA).all(-1).float().mean(0)
    # The same context as frame 1 has in a window of three frames.
    said = []
    for slots_A in every_NA:
        slots_BfrA = torch.stack([every_NA[0], slots_A])[None, :, None]
        window = (tokens_BfSD.expand(-1, 2, -1, -1), codes_BtSQ[:, [0, 1, 0]])
        only_second = torch.tensor([[False, True]])
        said.append(head.nats(head(*window, slots_BfrA), slots_BfrA, only_second)[0])
    said_N = torch.stack(said).neg().exp().detach()
    assert said_N.sum().item() == pytest.approx(1, abs=1e-5)
    assert 0.5 * (drawn_N - said_N).abs().sum() < 0.03


@every_kind
def test_temperature_0_takes_the_likeliest_symbol_after_each_symbol(spec):
    """And what it takes is what the loss counts as right."""
    head, (tokens_BfSD, codes_BtSQ) = make_head(spec, steps=2), windows(16, 3)
    slots_BrA = head.sample(
        tokens_BfSD[:, 0], codes_BtSQ[:, 1], seeds_B=torch.arange(16), frame=1, temperature=0.0
    )
    slots_BfrA = torch.stack([torch.full_like(slots_BrA, NULL), slots_BrA], dim=1)
    logits_BfLX = head(tokens_BfSD, codes_BtSQ, slots_BfrA)
    _, num_actions, right = head.nats(logits_BfLX, slots_BfrA, all_real(slots_BfrA))
    assert (num_actions, right) == (32, 32)


def test_what_seed_and_frame_choose_depends_on_no_batch():
    spec = ACTIONS["keys"]
    head, (tokens_BfSD, codes_BtSQ) = make_head(spec, steps=2), windows(32, 2)
    seeds_B = torch.arange(32) * 977

    def sample(rows: list[int], *, frame: int = 7) -> torch.Tensor:
        return head.sample(
            tokens_BfSD[rows, 0], codes_BtSQ[rows, 1],
            seeds_B=seeds_B[rows], frame=frame, temperature=1.0,
        )  # fmt: skip

    everyone = sample(list(range(32)))
    for row in range(32):
        assert torch.equal(sample([row])[0], everyone[row])
    assert torch.equal(sample([9, 4]), everyone[[9, 4]])
    assert not torch.equal(sample(list(range(32)), frame=8), everyone)


def test_actions_have_a_noise_of_their_own():
    """Where all is equally likely, the action must not follow from a code that the seed draws."""
    head, seeds_B = make_head(STEER), torch.arange(1000)
    torch.nn.init.zeros_(head.to_logits.weight)
    torch.nn.init.zeros_(head.to_logits.bias)
    codes_B6Q = torch.zeros(1000, 6, 1, dtype=torch.int64)
    chosen = head.sample(None, codes_B6Q, seeds_B=seeds_B, frame=3, temperature=1.0)[:, 0, 0]
    for cell in range(6):
        for frame in (3, 4):
            codes_B = keyed_gumbel(seeds_B, frame, slice(cell, cell + 1), 5)[:, 0].argmax(-1)
            assert (chosen == codes_B).float().mean() < 0.25
    assert (chosen.bincount(minlength=5) > 150).all()
    assert NOISE_LEVEL > 1 << 16  # no tokenizer has so many levels


# --- what it may know ---------------------------------------------------------------------------


def action_logits(model: DynamicsModel, codes_Bthw, slots_BTA) -> torch.Tensor:
    """logits_BfLX of a model's own head."""
    tokens_BfSD = model.tokens(codes_Bthw, slots_BTA)
    slots_BfrA = rearrange(slots_BTA, "B (f r) A -> B f r A", r=model.steps_per_frame)
    codes_BtSQ = codes_Bthw.flatten(2)[..., None]
    return model.action_head(tokens_BfSD, codes_BtSQ, slots_BfrA)


@pytest.mark.parametrize("options", SEEN.values(), ids=list(SEEN))
@pytest.mark.parametrize("order", ["raster", "row", "frame", "masked"])
def test_neither_the_frame_after_an_action_nor_the_action_reaches_its_prediction(order, options):
    model = make_model(order=order, action_head=True, context_frames=6, **options)
    codes_Bthw, slots_BTA = random_codes(model, 6, batch=1), actions(STEER, 1, 5)
    before_BfLX = action_logits(model, codes_Bthw, slots_BTA)
    for index in range(5):  # action i is chosen on seeing frame i and leads to frame i + 1
        later_codes, later_slots = codes_Bthw.clone(), slots_BTA.clone()
        later_codes[:, index + 1 :] = (later_codes[:, index + 1 :] + 1) % 32
        later_slots[:, index:] = (later_slots[:, index:] + 1) % 5
        after_BfLX = action_logits(model, later_codes, later_slots)
        assert torch.equal(before_BfLX[:, : index + 1], after_BfLX[:, : index + 1])
        # It does know its own frame, the frame before and the action before.
        changed = [(later_codes, slots_BTA, index + 1), (codes_Bthw, later_slots, index + 1)]
        for codes, slots, place in changed if index < 4 else []:
            after_BfLX = action_logits(model, codes, slots)
            assert not torch.equal(before_BfLX[:, place], after_BfLX[:, place])
        if index:
            earlier = codes_Bthw.clone()
            earlier[:, index - 1] = (earlier[:, index - 1] + 1) % 32
            after_BfLX = action_logits(model, earlier, slots_BTA)
            assert not torch.equal(before_BfLX[:, index], after_BfLX[:, index])


@every_kind
def test_a_symbol_is_predicted_from_those_before_it_alone(spec):
    head, (tokens_BfSD, codes_BtSQ) = make_head(spec, steps=2), windows(8, 2)
    slots_BfrA, others_BfrA = actions(spec, 8, 1, 2), actions(spec, 8, 1, 2, seed=1)
    length = 2 * spec.num_slots
    before_BfLX = head(tokens_BfSD, codes_BtSQ, slots_BfrA)
    for place in range(length):
        mixed_BfL = torch.cat(
            [slots_BfrA.flatten(2)[..., :place], others_BfrA.flatten(2)[..., place:]], dim=-1
        )
        after_BfLX = head(tokens_BfSD, codes_BtSQ, mixed_BfL.view_as(slots_BfrA))
        assert torch.equal(before_BfLX[:, :, : place + 1], after_BfLX[:, :, : place + 1])
        if place + 1 < length:
            assert not torch.equal(before_BfLX[:, :, place + 1], after_BfLX[:, :, place + 1])


@pytest.mark.parametrize("order", ["raster", "row", "frame", "masked"])
def test_cached_tokens_choose_the_actions_that_training_would(order):
    """Frame by frame through the cache, and with no tokens before the first frame."""
    model = make_model(
        code_spec(frames_per_latent=2), ACTIONS["keys"], order=order, action_head=True
    )
    codes_Bthw, slots_BTA = random_codes(model, 7, batch=3), actions(ACTIONS["keys"], 3, 12)
    codes_BtSQ, cache = codes_Bthw.flatten(2)[..., None], model.start_cache(batch=3)
    chosen = []
    for frame in range(6):
        tokens_BSD = None
        if frame >= model.grid.first_frame:
            slots_BrA = slots_BTA[:, 2 * frame - 2 : 2 * frame] if frame else None
            there = model.open_frame(frame, codes_BtSQ[:, max(0, frame - 1)], slots_BrA, cache)
            tokens_BSD = model.remember(there, codes_BtSQ[:, frame])
        slots_BrA = model.action_head.sample(
            tokens_BSD if frame else None, codes_BtSQ[:, frame],
            seeds_B=torch.arange(3), frame=frame, temperature=0.0,
        )  # fmt: skip
        chosen.append(slots_BrA)
    chosen_BfrA = torch.stack(chosen, dim=1)
    tokens_BfSD = model.tokens(codes_Bthw, slots_BTA)
    logits_BfLX = model.action_head(tokens_BfSD, codes_BtSQ, chosen_BfrA)
    _, num_actions, right = model.action_head.nats(logits_BfLX, chosen_BfrA, all_real(chosen_BfrA))
    assert (num_actions, right) == (36, 36)


def test_every_level_of_a_cells_code_is_looked_at():
    model = make_model(code_spec(num_levels=2), action_head=True)
    codes_Bthw, slots_BTA = random_codes(model, 2, batch=1), actions(STEER, 1, 1)
    codes_BtSQ = codes_Bthw.flatten(2, 3)
    before = model.action_head(model.tokens(codes_Bthw, slots_BTA), codes_BtSQ, slots_BTA[:, None])
    for level in range(2):
        edited_BtSQ = codes_BtSQ.clone()
        edited_BtSQ[:, 0, 5, level] = (edited_BtSQ[:, 0, 5, level] + 1) % 32
        after = model.action_head(
            model.tokens(codes_Bthw, slots_BTA), edited_BtSQ, slots_BTA[:, None]
        )
        assert not torch.equal(before, after)


# --- what is a label ----------------------------------------------------------------------------


@every_kind
def test_a_step_without_a_known_action_is_no_label(spec):
    """genie2-pytorch's padding of -1 became action 0; so does that of the variant here."""

    def ignores_null(nats) -> bool:
        head = make_head(spec, steps=2)
        slots_BfrA = actions(spec, 3, 3, 2)
        slots_BfrA[1, 1], slots_BfrA[2] = NULL, NULL
        tokens_BfSD, codes_BtSQ = windows(3, 4)
        logits_BfLX = head(tokens_BfSD, codes_BtSQ, slots_BfrA)
        known = nats(head, logits_BfLX, slots_BfrA)
        # Whatever is predicted where no action is known, the sum stays the same.
        unknown = (slots_BfrA < 0).flatten(2)[..., None]
        logits_BfLX = torch.where(
            unknown & logits_BfLX.isfinite(), logits_BfLX.flip(0), logits_BfLX
        )
        logits_BfLX = logits_BfLX - unknown * 3.0 * torch.arange(logits_BfLX.shape[-1])
        return torch.equal(known, nats(head, logits_BfLX, slots_BfrA))

    def ours(head, logits_BfLX, slots_BfrA):
        nats, num_actions, _ = head.nats(logits_BfLX, slots_BfrA, all_real(slots_BfrA))
        assert num_actions == 10
        return nats

    def faulty(head, logits_BfLX, slots_BfrA):
        return ours_without_null(head, logits_BfLX, slots_BfrA.clamp(min=0))

    def ours_without_null(head, logits_BfLX, slots_BfrA):
        return head.nats(logits_BfLX, slots_BfrA, all_real(slots_BfrA))[0]

    assert ignores_null(ours)
    assert not ignores_null(faulty)


def test_padding_is_no_label_whatever_lies_in_it():
    """genie2-pytorch's loss of single actions ignored the lengths; so does the variant here."""
    head, slots_BfrA = make_head(STEER), actions(STEER, 3, 5, 1)
    valid_Bf = torch.arange(5) < torch.tensor([[5], [2], [0]])
    tokens_BfSD, codes_BtSQ = windows(3, 6)

    def ignores_padding(nats) -> bool:
        sums = []
        for filling in range(5):
            filled_BfrA = torch.where(valid_Bf[..., None, None], slots_BfrA, filling)
            sums.append(nats(head(tokens_BfSD, codes_BtSQ, filled_BfrA), filled_BfrA))
        return all(torch.equal(sums[0], other) for other in sums)

    def ours(logits_BfLX, filled_BfrA):
        nats, num_actions, _ = head.nats(logits_BfLX, filled_BfrA, valid_Bf)
        assert num_actions == head.num_labels(filled_BfrA, valid_Bf) == 7
        return nats

    def faulty(logits_BfLX, filled_BfrA):
        return head.nats(logits_BfLX, filled_BfrA, torch.ones_like(valid_Bf))[0]

    assert ignores_padding(ours)
    assert not ignores_padding(faulty)


def test_what_follows_the_end_of_the_keys_is_no_label():
    """The loss of one key and the end is that of two symbols, whatever the third would be."""
    head = make_head(ACTIONS["keys"])
    slots_BfrA = torch.tensor([2, 0, 0]).expand(2, 3, 1, 3)
    logits_BfLX = head(*windows(2, 4), slots_BfrA).detach()
    nats, num_actions, _ = head.nats(logits_BfLX, slots_BfrA, all_real(slots_BfrA))
    log_probs = logits_BfLX.log_softmax(-1)
    assert nats.item() == pytest.approx(-(log_probs[..., 0, 2] + log_probs[..., 1, 0]).sum().item())
    assert num_actions == 6
    logits_BfLX[:, :, 2] = torch.tensor([-9.0, 9, 9, 9, 9])
    assert torch.equal(head.nats(logits_BfLX, slots_BfrA, all_real(slots_BfrA))[0], nats)


@every_kind
def test_without_any_label_loss_and_gradient_are_zero(spec):
    """A mean over no labels would be NaN, and every weight after the update."""
    model = make_model(actions=spec, action_head=True).requires_grad_()
    codes_Bthw = random_codes(model, 3)
    batch = WindowBatch(
        codes_Bthw,
        torch.full((2, 2, spec.num_slots), NULL),
        torch.ones(2, 3, dtype=torch.bool),
    )
    objective = Objective(model, z_loss=False, bf16=False)
    losses, counts = objective(batch, batch), objective.counts(batch)
    assert (losses.action_nats, counts[1]) == (0, 0)
    loss = mean_loss(losses, counts, action_weight=1.0, z_loss=0.0)
    assert loss.isfinite()
    loss.backward()
    gradients = [parameter.grad for parameter in model.action_head.parameters()]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)
    assert model.head.to_logits.weight.grad.any()


@every_kind
def test_windows_without_actions_weigh_nothing_beside_others(spec):
    """A data set of which half has actions gives the gradient of that half."""
    head = make_head(spec)
    slots_BfrA = actions(spec, 4, 3, 1)
    half_BfrA = slots_BfrA.clone()
    half_BfrA[2:] = NULL
    tokens_BfSD, codes_BtSQ = windows(4, 4)

    def result(rows: slice) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        slots = half_BfrA[rows]
        logits = head(tokens_BfSD[rows], codes_BtSQ[rows], slots)
        sums = head.nats(logits, slots, all_real(slots))
        return list(sums), list(torch.autograd.grad(sums[0], list(head.parameters())))

    (nats, count, right), gradients = result(slice(4))
    (nats_2, count_2, right_2), gradients_2 = result(slice(2))
    assert (count, right) == (count_2, right_2)
    assert count == 6
    torch.testing.assert_close([nats, *gradients], [nats_2, *gradients_2], rtol=1e-4, atol=1e-5)


def test_an_action_is_right_only_if_all_its_symbols_are():
    head = make_head(ACTIONS["keys"])
    slots_BfrA = torch.tensor([[1, 3, 0]]).expand(1, 1, 1, 3)
    logits_BfLX = torch.full((1, 1, 3, 5), -5.0)
    logits_BfLX[0, 0, [0, 1, 2], [1, 3, 0]] = 5.0

    def right(logits: torch.Tensor) -> float:
        return head.nats(logits, slots_BfrA, all_real(slots_BfrA))[2].item()

    assert right(logits_BfLX) == 1
    for place in range(3):
        wrong = logits_BfLX.clone()
        wrong[0, 0, place] = wrong[0, 0, place].roll(1)
        assert right(wrong) == 0


def test_in_bf16_the_loss_is_nearly_the_same_and_its_sum_is_float32():
    head, slots_BfrA = make_head(ACTIONS["keys"], steps=2), actions(ACTIONS["keys"], 4, 3, 2)
    exact = nats_of(head, slots_BfrA)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = nats_of(head, slots_BfrA)
    assert narrow.dtype == torch.float32
    assert narrow.item() == pytest.approx(exact.item(), rel=0.03)
    assert narrow.item() != exact.item()


def test_the_head_is_there_only_where_it_is_asked_for_and_actions_are():
    assert make_model().action_head is None
    assert make_model(actions=ActionSpec.none(), action_head=True).action_head is None
    weights, others = make_model(action_head=True).state_dict(), make_model().state_dict()
    assert set(others) < set(weights)
    # Whoever adds it to a recipe trains the same model beside it.
    assert all(torch.equal(weights[name], others[name]) for name in others)
