"""Several codes per cell through every command: tokenize, train, evaluate, generate, info."""

import json

import numpy as np
import pytest
import torch
from chain_worlds import save_tokenizer, write_pushed_squares
from torch.nn.functional import cross_entropy
from worldloom.common import MismatchError, TokenShards
from worldloom.dynamics import (
    DynamicsConfig,
    DynamicsModel,
    DynamicsTrainingConfig,
    SamplingConfig,
    generate_codes,
)
from worldloom.pipelines import measures
from worldloom.pipelines.evaluate import EvaluateConfig, evaluate
from worldloom.pipelines.generate import GenerateConfig, generate
from worldloom.pipelines.info import InfoConfig, describe, info
from worldloom.pipelines.tokenize import TokenizeConfig, tokenize
from worldloom.pipelines.train_dynamics import TrainDynamicsConfig, train_dynamics
from worldloom.pipelines.world import World


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """A folder of episodes, a tokenizer of two levels, its shards and a model."""
    folder = tmp_path_factory.mktemp("levels")
    write_pushed_squares(folder / "episodes", tuple(range(12, 24)))
    tokenizer = save_tokenizer(folder / "tokenizer", num_levels=2)
    tokenize(
        TokenizeConfig(
            episodes=folder / "episodes",
            tokenizer=str(tokenizer),
            output=folder / "shards",
            device="cpu",
        )
    )
    train_dynamics(training(folder))
    return folder


def training(folder, **settings):
    return TrainDynamicsConfig(
        shards=(folder / "shards",),
        output=folder / "run",
        tokenizer=str(folder / "tokenizer"),
        cpu=True,
        model=DynamicsConfig(num_layers=1, dim=16, num_heads=2, context_frames=6),
        training=DynamicsTrainingConfig(num_steps=4, batch_windows=4, window_frames=5),
        **settings,
    )


@pytest.fixture
def world(chain):
    return World.from_pretrained(
        chain / "run" / "model", str(chain / "tokenizer"), sampling=SamplingConfig()
    )


@pytest.fixture
def held_out(chain, world):
    shards = TokenShards(chain / "shards")
    (index,) = shards.split("validation")
    slots_TA = shards.slots_TA(index)
    codes = torch.from_numpy(shards.codes_thw(index).astype(np.int64))
    frames = world.tokenizer.decode(codes[None], num_frames=len(slots_TA) + 1)[0]
    return measures.HeldOut(shards.episodes[index].key, frames, frames, codes, slots_TA)


def test_the_shards_hold_what_the_tokenizer_says_of_every_level(chain, world):
    shards = TokenShards(chain / "shards")
    assert shards.codes.num_levels == 2
    assert np.array_equal(shards.codebook_VZ(), world.tokenizer.codebook.numpy())
    codes = shards.codes_thw(0)
    assert codes.shape == (shards.episodes[0].num_frames, 4, 4, 2)
    assert all(len(np.unique(codes[..., level])) > 1 for level in range(2))


def test_pictures_of_validation_are_drawn(chain):
    assert list((chain / "run" / "samples").glob("*.png"))


def test_a_dry_run_counts_the_codes_of_every_level_and_the_parameters_of_the_model(chain):
    told = train_dynamics(training(chain, dry_run=True))
    model = DynamicsModel.from_pretrained(chain / "run" / "model")
    assert told.parameters == sum(p.numel() for p in model.parameters())
    assert told.items_per_update == 4 * 4 * 16 * 2


def test_generate_gives_what_the_library_gives_from_shards_and_from_episodes(chain, world):
    made = {}
    for start in ("shards", "episodes"):
        folder = generate(
            GenerateConfig(
                model=chain / "run" / "model",
                tokenizer=str(chain / "tokenizer"),
                start=chain / start,
                output=chain / f"generated-{start}",
                actions="RIGHT*3,LEFT*2",
                prompt_frames=3,
                num_samples=2,
                seed=4,
                device="cpu",
            )
        )
        made[start] = np.load(folder / "codes.npz")["codes"]
        assert (folder / "generated.gif").exists()
        assert describe(folder, verify=True)["num_samples"] == 2
    shards = TokenShards(chain / "shards")
    (index,) = shards.split("validation")
    slots = [*shards.slots_TA(index, 0, 2)[:, 0], 2, 2, 2, 1, 1]
    wanted = generate_codes(
        world.model,
        torch.from_numpy(shards.codes_thw(index, 0, 3).astype(np.int64)).expand(2, -1, -1, -1, -1),
        torch.tensor(np.array(slots)).expand(2, -1)[..., None],
        seeds=[4, 5],
        sampling=SamplingConfig(),
    )
    assert made["shards"].shape == (2, 3 + 5, 4, 4, 2)
    assert np.array_equal(made["shards"], wanted.numpy())
    assert np.array_equal(made["episodes"], made["shards"])


def test_a_tokenizer_of_one_level_is_refused_naming_the_field(chain, tmp_path):
    one = save_tokenizer(tmp_path / "one")
    with pytest.raises(MismatchError, match=r"codes\.num_levels \(2 against 1\)"):
        World.from_pretrained(chain / "run" / "model", str(one), sampling=SamplingConfig())


def test_a_world_steps_to_codes_of_every_level(world, held_out):
    frames = world.reset(held_out.codes_thw[:3], held_out.slots_TA[:2], seed=1)
    assert frames.shape == (3, 16, 16, 3)
    frames, codes = world.step(held_out.slots_TA[2:3])
    assert (frames.shape, codes.shape) == ((1, 16, 16, 3), (4, 4, 2))


def test_cross_entropy_and_accuracy_are_those_of_each_level_and_their_mean(world, held_out):
    measured = measures.given_the_past(world, [held_out], 3)
    length = world.model.config.context_frames
    nats, right = [], []
    for first in range(0, len(held_out.codes_thw) - 1, length - 1):
        codes = held_out.codes_thw[first : first + length]
        slots = torch.from_numpy(held_out.slots_TA[first : first + len(codes) - 1])
        logits = world.model(codes[None], slots[None])[0]
        targets = codes[1:].flatten(1, 2)
        nats.append(cross_entropy(logits.movedim(-1, 1), targets, reduction="none").flatten(0, 1))
        right.append((logits.argmax(-1) == targets).float().flatten(0, 1))
    for name, parts in (("cross_entropy", nats), ("teacher_forced_accuracy", right)):
        levels = torch.cat(parts).mean(0)
        assert measured["levels"][name] == pytest.approx(levels.tolist(), rel=1e-5)
        assert measured[name] == pytest.approx(levels.mean().item(), rel=1e-5)


def test_evaluate_measures_and_draws_a_world_of_levels(chain):
    path = evaluate(
        EvaluateConfig(
            model=chain / "run" / "model",
            tokenizer=str(chain / "tokenizer"),
            episodes=chain / "episodes",
            shards=chain / "shards",
            output=chain / "evaluation",
            horizon=3,
            prompt_frames=3,
            num_rollouts=4,
            num_first_frames=6,
            held_frames=2,
            device="cpu",
        )
    )
    numbers = json.loads(path.read_text())
    dynamics = numbers["dynamics"]
    assert len(dynamics["levels"]["cross_entropy"]) == 2
    assert 0 <= dynamics["free_running_accuracy"] <= 1
    # Levels have a codebook each: pooled, they would seem to share one.
    assert len(numbers["tokenizer"]["levels"]["perplexity"]) == 2
    assert {"held", "rollouts", "drift"} <= numbers["pictures"].keys()
    assert str(path.parent) in info(InfoConfig(path=path.parent))


def test_info_tells_the_use_of_each_levels_codebook(chain):
    shards = TokenShards(chain / "shards")
    usage = describe(chain / "shards")["code_usage"]
    codes_NQ = np.concatenate([shards.codes_thw(i).reshape(-1, 2) for i in range(12)])
    used, entropies = [], []
    for level in range(2):
        share = np.bincount(codes_NQ[:, level], minlength=16) / len(codes_NQ)
        used.append(int((share > 0).sum()))
        entropies.append(-(share[share > 0] * np.log(share[share > 0])).sum())
    assert usage["levels"]["codes_used"] == used
    assert usage["levels"]["codes_used_fraction"] == [count / 16 for count in used]
    assert usage["levels"]["perplexity"] == pytest.approx(np.exp(entropies))
    assert (usage["vocab_size"], usage["codes_used"]) == (16, sum(used))
    assert usage["codes_used_fraction"] == sum(used) / 32
    assert usage["perplexity"] == pytest.approx(np.exp(np.mean(entropies)))
    assert describe(chain / "shards")["num_codes"] == codes_NQ.size
    text = info(InfoConfig(path=chain / "shards"))
    assert f"{used[0] / 16:.1%}, {used[1] / 16:.1%}" in text
