"""Promises of objective.py and learner.py: what an update is, however its windows are computed."""

import math
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from dynamics.toys import (
    ACTIONS,
    STEER,
    TRAINING,
    Mover,
    code_spec,
    make_model,
    random_codes,
    random_slots,
    tiny,
    train,
    write_shards,
)
from dynamics.training_options import half_labelled_walks
from torch.nn.functional import cross_entropy
from worldloom.common import Muon, TrainingError, newest_checkpoint, read_metrics
from worldloom.dynamics import NULL, DynamicsModel, DynamicsSpec, WindowBatch, Windows
from worldloom.dynamics.disturbance import disturb
from worldloom.dynamics.learner import Learner, parameter_groups
from worldloom.dynamics.objective import Losses, Objective, mean_loss
from worldloom.dynamics.training import _num_predicted as num_predicted


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return half_labelled_walks(tmp_path_factory.mktemp("half") / "shards")


def fresh(shards, **sizes) -> DynamicsModel:
    config = tiny(action_head=True, **sizes)
    return DynamicsModel(config, DynamicsSpec.of(shards), shards.codebook_VZ(), seed=3)


def make_learner(shards, accelerator, **settings) -> Learner:
    training = replace(TRAINING, **settings)
    return Learner(fresh(shards), None, training=training, accelerator=accelerator)


def windows(shards, step=0):
    """A batch of 8 and what is fed for it."""
    batch = Windows(shards, "train", window_frames=5).batch(step, size=8, seed=1)
    training = replace(TRAINING, action_dropout=0.8)
    fed = disturb(batch, training, vocab_size=2, step=step, rows=range(8))
    assert not batch.valid_Bt.all()  # or padding is not tried
    assert (batch.slots_BTA[batch.valid_Bt[:, 1:]] == NULL).any()  # nor actions nobody knows
    return batch, fed


def gradients(learner: Learner) -> dict[str, torch.Tensor]:
    named = learner.dynamics.named_parameters()
    return {name: p.grad.clone() for name, p in named if p.grad is not None}


@pytest.mark.parametrize("micro_windows", [1, 3, 4])
def test_windows_computed_in_parts_give_the_update_of_all_at_once(
    shards, accelerator, micro_windows
):
    whole = make_learner(shards, accelerator, z_loss=1e-3, action_weight=0.5)
    parts = make_learner(
        shards, accelerator, z_loss=1e-3, action_weight=0.5, micro_windows=micro_windows
    )
    for step in range(3):
        one, other = (each.gradients(*windows(shards, step)) for each in (whole, parts))
        assert one.counts.tolist() == other.counts.tolist()
        assert other.gradient_norm.item() == pytest.approx(one.gradient_norm.item(), rel=1e-6)
        assert other.numbers() == pytest.approx(one.numbers(), rel=1e-6)
        wanted = gradients(whole)
        for name, gradient in gradients(parts).items():
            # Of the whole gradient: what is all but zero is what is left when sums cancel.
            difference = (gradient - wanted[name]).abs().max()
            assert difference < 1e-6 * one.gradient_norm, name
        whole.apply()
        parts.apply()


def test_padding_and_actions_nobody_knows_change_no_count_and_no_loss(shards, accelerator):
    """The loss of an update is that of its labels alone, each weighing the same."""
    learner = make_learner(shards, accelerator, action_weight=0.25)
    batch, fed = windows(shards)
    assert ((fed.slots_BTA == NULL) & (batch.slots_BTA != NULL)).any()  # dropped, but labels
    update = learner.gradients(batch, fed)
    model = learner.dynamics
    with torch.no_grad():
        tokens = model.tokens(batch.codes_Bthw, fed.slots_BTA, inputs_Bthw=fed.codes_Bthw)
        logits_BfSV = model.logits(tokens, batch.codes_Bthw)
        actions_BfLX = model.action_head(
            tokens, batch.codes_Bthw.flatten(2)[..., None], batch.slots_BTA[:, :, None]
        )
    codes, actions = [], []
    for row in range(8):
        for frame in range(4):
            if not batch.valid_Bt[row, frame + 1]:
                continue
            true_S = batch.codes_Bthw[row, frame + 1].flatten()
            codes.append(cross_entropy(logits_BfSV[row, frame], true_S, reduction="none"))
            action = batch.slots_BTA[row, frame]
            if action.item() != NULL:
                actions.append(cross_entropy(actions_BfLX[row, frame], action))
    numbers = update.numbers()
    assert update.counts.tolist() == [16 * len(codes), len(actions)]
    assert numbers["loss"] == pytest.approx(torch.cat(codes).mean().item(), rel=1e-5)
    assert numbers["action_loss"] == pytest.approx(torch.stack(actions).mean().item(), rel=1e-5)


def test_labels_are_counted_before_the_forward_as_the_forward_counts_them():
    for name, spec in ACTIONS.items():
        model = make_model(code_spec(frames_per_latent=2), spec, action_head=True)
        objective = Objective(model, z_loss=False, bf16=False)
        codes, slots = (make(model, 4, batch=3) for make in (random_codes, random_slots))
        slots[1, 2:4] = NULL
        valid = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 0]]).bool()
        found = objective.counts(WindowBatch(codes, slots, valid)).tolist()
        assert found == [8 * 12, 0 if name == "none" else (9 - 1 - 1) * 2], name


def test_the_z_loss_is_the_mean_square_of_the_log_denominator(shards):
    batch, fed = windows(shards)
    model = fresh(shards)
    losses = Objective(model, z_loss=True, bf16=False)(batch, fed)
    plain = Objective(model, z_loss=False, bf16=False)(batch, fed)
    with torch.no_grad():
        logits_BfSV = model(batch.codes_Bthw, fed.slots_BTA, inputs_Bthw=fed.codes_Bthw)
    squares_BfS = logits_BfSV.logsumexp(-1).square()
    expected = squares_BfS[batch.valid_Bt[:, 1:]].sum()
    torch.testing.assert_close(losses.squares, expected)
    torch.testing.assert_close(losses.code_nats, plain.code_nats)
    assert plain.squares == 0
    counts = torch.tensor([100, 10])
    with_it = mean_loss(losses, counts, action_weight=0.0, z_loss=0.5)
    torch.testing.assert_close(with_it, losses.code_nats / 100 + 0.5 * expected / 100)


def test_a_z_loss_adds_its_own_gradient_times_its_weight_and_nothing_else(shards, accelerator):
    batch, fed = windows(shards)
    with_it, without = (make_learner(shards, accelerator, z_loss=z, clip=0.0) for z in (0.5, 0.0))
    codes = with_it.gradients(batch, fed).counts[0]
    without.gradients(batch, fed)
    model = fresh(shards)
    logits_BfSV = model(batch.codes_Bthw, fed.slots_BTA, inputs_Bthw=fed.codes_Bthw)
    squares_BfS = logits_BfSV.logsumexp(-1).square()
    (squares_BfS[batch.valid_Bt[:, 1:]].sum() / codes).backward()
    ones, zeros = gradients(with_it), gradients(without)
    assert model.head.to_logits.weight.grad.abs().max() > 0.01
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(
                ones[name] - zeros[name], 0.5 * parameter.grad, rtol=1e-4, atol=1e-6
            )


def test_a_z_loss_takes_back_a_shift_of_all_logits_which_nothing_else_moves(shards, accelerator):
    """The cross-entropy does not change when all logits grow alike, so neither do they by it."""
    found = {}
    for weight in (0.0, 1.0):
        learner = make_learner(
            shards, accelerator, z_loss=weight, num_steps=60, learning_rate=0.3, weight_decay=0.0
        )
        model = learner.dynamics.requires_grad_(requires_grad=False)
        bias = model.head.to_logits.bias.requires_grad_()
        with torch.no_grad():
            bias += 4.0
        for step in range(60):
            learner.gradients(*windows(shards, step))
            learner.apply()
        batch, fed = windows(shards)
        with torch.no_grad():
            logits_BfSV = model(batch.codes_Bthw, fed.slots_BTA, inputs_Bthw=fed.codes_Bthw)
        found[weight] = logits_BfSV.logsumexp(-1)[batch.valid_Bt[:, 1:]].abs().mean().item()
    assert found[0.0] > 4
    assert found[1.0] < 0.25


def test_the_action_weight_weighs_nats_per_action_beside_nats_per_code():
    losses = Losses(*torch.tensor([60.0, 0.0, 8.0, 0.0, 0.0]))
    loss = mean_loss(losses, torch.tensor([30, 4]), action_weight=0.25, z_loss=0.0)
    assert loss.item() == pytest.approx(60 / 30 + 0.25 * 8 / 4)
    # No action of the update is known: nothing is divided by zero.
    nothing = losses._replace(action_nats=torch.tensor(0.0))
    loss = mean_loss(nothing, torch.tensor([30, 0]), action_weight=0.25, z_loss=0.0)
    assert loss.item() == pytest.approx(2)


def test_an_action_weight_of_zero_teaches_the_action_head_nothing_and_the_rest_the_same(
    shards, accelerator
):
    batch, fed = windows(shards)
    with_head, without = (make_learner(shards, accelerator, action_weight=w) for w in (1.0, 0.0))
    for learner in (with_head, without):
        learner.gradients(batch, fed)
    heads = [g for n, g in gradients(without).items() if n.startswith("action_head")]
    assert all((g == 0).all() for g in heads)
    ones = gradients(with_head)
    assert any((g != 0).any() for n, g in ones.items() if n.startswith("action_head"))
    name = "transformer.layers.1.feed_forward.1.ff.2.weight"
    assert not torch.equal(ones[name], gradients(without)[name])  # it also teaches the layers


def test_only_windows_without_known_actions_still_train(tmp_path):
    world = Mover(STEER)
    walks = [(world.episode(6, seed)[0], None) for seed in range(5)]
    shards = write_shards(tmp_path / "shards", walks, world.codes, world.actions)
    train(shards.folder, tmp_path / "run", model=tiny(action_head=True), num_steps=3)
    rows = read_metrics(tmp_path / "run")
    assert all("action_loss" not in row and math.isfinite(row.get("loss", 0)) for row in rows)


def test_what_an_environment_says_of_accumulation_changes_no_gradient(
    shards, accelerator, monkeypatch
):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    told = Accelerator(cpu=True)
    assert told.gradient_accumulation_steps == 4
    norms = [
        make_learner(shards, which).gradients(*windows(shards)).gradient_norm
        for which in (accelerator, told)
    ]
    assert norms[0] == norms[1]


def test_gradients_are_clipped_to_the_setting_and_not_at_zero(shards, accelerator):
    norms = {}
    for clip in (0.0, 0.01, 1e6):
        learner = make_learner(shards, accelerator, clip=clip)
        update = learner.gradients(*windows(shards))
        squares = sum(g.square().sum() for g in gradients(learner).values())
        norms[clip] = (update.gradient_norm.item(), squares.sqrt().item())
    told = norms[0.0][0]
    assert told > 0.01
    assert all(before == pytest.approx(told) for before, _ in norms.values())
    assert norms[0.0][1] == pytest.approx(told, rel=1e-5)
    assert norms[1e6][1] == pytest.approx(told, rel=1e-5)
    assert norms[0.01][1] == pytest.approx(0.01, rel=1e-4)


def test_the_norm_of_many_gradients_is_exact_on_a_cpu(shards, accelerator):
    """torch's own comes out 3e-4 too small."""
    learner = make_learner(shards, accelerator)
    many = torch.nn.Parameter(torch.empty(10_000_000))
    many.grad = torch.randn(many.shape, generator=torch.Generator().manual_seed(0))
    learner.dynamics.register_parameter("many", many)
    exact = many.grad.double().norm().item()
    assert learner._place.clip(float("inf")).item() == pytest.approx(exact, rel=2e-5)


def test_an_update_has_the_gradients_of_its_own_windows_and_none_of_the_one_before(
    shards, accelerator
):
    going_on = make_learner(shards, accelerator)
    going_on.gradients(*windows(shards, 0))
    going_on.apply()
    begun = make_learner(shards, accelerator)
    begun.dynamics.load_state_dict(going_on.dynamics.state_dict())
    for learner in (going_on, begun):
        learner.gradients(*windows(shards, 1))
    found, wanted = gradients(going_on), gradients(begun)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(gradient, wanted[name]) for name, gradient in found.items())


@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch's tracer warns of itself
@pytest.mark.parametrize("options", [{}, {"residual_streams": 2, "attention": "factorised"}])
def test_every_layer_is_traced_whole_as_compiling_does_and_gives_the_same_gradients(
    shards, accelerator, options
):
    """As the learner compiles layers on CUDA, but for the backend, which a CPU may lack."""
    found = {}
    for traced in (False, True):
        model = fresh(shards, **options)
        learner = Learner(model, None, training=TRAINING, accelerator=accelerator)
        if traced:
            for layer in model.transformer.layers:
                layer.compile(backend="eager", fullgraph=True)
        update = learner.gradients(*windows(shards))
        found[traced] = (gradients(learner), update.gradient_norm.item())
    torch.compiler.reset()
    for name, gradient in found[True][0].items():
        difference = (gradient - found[False][0][name]).abs().max()
        assert difference < 1e-6 * found[False][1], name


def test_muon_moves_hidden_matrices_and_nothing_else(shards):
    model = fresh(shards)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    hidden, matrices, vectors = parameter_groups(model, weight_decay=0.1)
    assert [g["orthogonal"] for g in (hidden, matrices, vectors)] == [True, False, False]
    assert [g["weight_decay"] for g in (hidden, matrices, vectors)] == [0.1, 0.1, 0.0]
    sets = [{names[id(p)] for p in g["params"]} for g in (hidden, matrices, vectors)]
    assert set().union(*sets) == set(names.values())
    assert sum(map(len, sets)) == len(names)
    assert {n for n in sets[0] if n.startswith("transformer")} == {
        f"transformer.layers.{layer}.{part}.weight"
        for layer in range(2)
        for part in (
            "attention.to_qkv",
            "attention.to_out",
            "feed_forward.1.ff.0.proj",
            "feed_forward.1.ff.2",
        )
    }
    assert {
        "meta.tokens_MD", "before.latent_to_model.weight", "before.learned.weight", "cell.weight",
        "actions.table.weight", "head.to_logits.weight", "action_head.to_logits.weight",
        "action_head.to_weights.weight", "action_head.first.weight",
    } <= sets[1]  # fmt: skip
    assert all(model.get_parameter(name).ndim < 2 for name in sets[2])


def test_the_optimizer_is_the_one_that_was_asked_for(shards, accelerator):
    muon = make_learner(shards, accelerator)
    adamw = make_learner(shards, accelerator, optimizer="adamw")
    assert isinstance(muon._optimizer, Muon)
    assert type(adamw._optimizer) is torch.optim.AdamW
    batch, fed = windows(shards)
    before = muon.dynamics.head.to_logits.weight.detach().clone()
    for learner in (muon, adamw):
        learner.gradients(batch, fed)
        learner.apply()
    # What is no hidden matrix moves alike under both.
    assert not torch.equal(muon.dynamics.head.to_logits.weight, before)
    torch.testing.assert_close(
        muon.dynamics.head.to_logits.weight, adamw.dynamics.head.to_logits.weight
    )
    name = "transformer.layers.0.attention.to_out.weight"
    assert not torch.allclose(
        muon.dynamics.get_parameter(name), adamw.dynamics.get_parameter(name), rtol=0.1
    )


def test_the_learning_rate_follows_the_schedule_that_was_asked_for(shards, accelerator):
    rates = {}
    for schedule in ("cosine", "wsd"):
        learner = make_learner(
            shards,
            accelerator,
            schedule=schedule,
            num_steps=20,
            warmup_steps=4,
            decay_share=0.25,
            learning_rate=1.0,
        )
        rates[schedule] = []
        for step in range(20):
            learner.step = step
            rates[schedule].append(learner.learning_rate)
    assert rates["wsd"][:4] == rates["cosine"][:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates["wsd"][4:16] == [1.0] * 12
    assert 1 > rates["wsd"][16] > rates["wsd"][19] > 0.01
    assert rates["cosine"][15] < 0.5


def test_layers_computed_again_give_the_same_gradients_to_the_last_bit_and_keep_less(
    shards, accelerator
):
    found = {}
    for recompute in (False, True):
        learner = make_learner(shards, accelerator, recompute=recompute)
        kept: dict[int, int] = {}
        tensors = []

        def note(tensor, kept=kept, tensors=tensors):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            tensors.append(tensor)  # so that no two of them have one address
            return tensor

        learner.dynamics.train()
        for _ in range(2):
            learner.gradients(*windows(shards))
            learner.apply()
        objective = Objective(learner.dynamics, z_loss=False, bf16=False)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            objective(*windows(shards))
        update = learner.gradients(*windows(shards))
        found[recompute] = (gradients(learner), update.numbers(), sum(kept.values()))
    (gradients_kept, numbers_kept, most), (gradients_again, numbers_again, least) = (
        found[False],
        found[True],
    )
    assert numbers_kept == numbers_again
    assert all(torch.equal(gradients_kept[name], g) for name, g in gradients_again.items())
    assert least < 0.6 * most


def test_a_part_that_is_not_finite_stops_before_any_of_the_update_is_done(shards, accelerator):
    learner = make_learner(shards, accelerator, micro_windows=2)
    for step in range(2):
        learner.gradients(*windows(shards, step))
        learner.apply()
    before = {n: p.detach().clone() for n, p in learner.dynamics.named_parameters()}
    batch, fed = windows(shards)
    calls = []

    def spoil(module, inputs, output):
        calls.append(len(calls))
        return output * float("nan") if len(calls) == 3 else output

    handle = learner.dynamics.head.register_forward_hook(spoil)
    update = learner.gradients(batch, fed)
    handle.remove()
    assert len(calls) == 4  # of eight windows
    assert not update.is_finite()
    assert not math.isfinite(update.numbers()["loss"])
    assert all(torch.equal(p, before[n]) for n, p in learner.dynamics.named_parameters())


def test_a_run_in_parts_that_diverges_keeps_its_last_checkpoint_finite(shards, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(TrainingError, match="the update was not done"):
        train(
            shards.folder,
            run,
            learning_rate=1e18,
            checkpoint_every=1,
            num_steps=50,
            micro_windows=1,
            ema_decay=0.9,
        )
    checkpoint, _ = newest_checkpoint(run)
    for group in checkpoint.tensors.values():
        assert all(torch.isfinite(tensor).all() for tensor in group.values())


def test_the_log_says_what_an_update_cost_and_brought(shards, tmp_path):
    train(shards.folder, tmp_path / "run", model=tiny(action_head=True), num_steps=3)
    row = next(row for row in read_metrics(tmp_path / "run") if "loss" in row)
    assert {
        "loss", "accuracy", "action_loss", "action_accuracy", "gradient_norm", "learning_rate",
        "tokens_per_s", "data_wait_share",
    } <= row.keys()  # fmt: skip
    assert row["learning_rate"] == pytest.approx(TRAINING.learning_rate / TRAINING.warmup_steps)
    spec = DynamicsSpec.of(shards)
    assert num_predicted(spec, TRAINING) == 4 * 4 * 16


def test_parts_that_fit_are_found_without_changing_anything(shards, accelerator):
    found, given = (make_learner(shards, accelerator, micro_windows=n) for n in (-1, 0))
    batch, fed = windows(shards)
    refused = []

    def refuse(module, inputs):
        if len(inputs[0].valid_Bt) > 3:
            refused.append(len(inputs[0].valid_Bt))
            raise torch.OutOfMemoryError("so many do not fit")

    handle = found._objective.register_forward_pre_hook(refuse)
    found.find_micro_windows(batch, fed)
    handle.remove()
    assert refused == [8, 4]
    assert found.micro_windows == 2
    assert all(p.grad is None for p in found.dynamics.parameters())
    one, other = (each.gradients(batch, fed) for each in (found, given))
    assert one.numbers() == pytest.approx(other.numbers(), rel=1e-6)
