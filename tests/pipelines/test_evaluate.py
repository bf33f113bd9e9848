"""Promises of evaluate: its numbers are what they are called, and held-out episodes alone count."""

import dataclasses
import json
import math
import re
import shlex
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import cross_entropy
from worldloom.common import ActionSpec, ConfigError, Episodes, FormatError, MismatchError
from worldloom.dynamics import DynamicsModel, SamplingConfig, generate_codes
from worldloom.pipelines import evaluate_tokenizer, measures
from worldloom.pipelines.cli import main
from worldloom.pipelines.evaluate import EvaluateConfig, evaluate
from worldloom.pipelines.world import World
from worldloom.tokenizer.metrics import LIMIT_DB, psnr

HELD_OUT = "episode-000009"


@pytest.fixture
def world(tiny_chain):
    return World(tiny_chain.model, tiny_chain.tokenizer, sampling=SamplingConfig())


@pytest.fixture
def held_out(tiny_chain):
    episodes = Episodes(tiny_chain.folder / "episodes")
    return measures.read_held_out(episodes, [HELD_OUT, "episode-000001"], tiny_chain.tokenizer)


def without_the_clock(numbers):
    return {group: numbers[group] for group in ("tokenizer", "dynamics", "rollout", "settings")}


def test_the_numbers_stand_under_their_stable_keys(evaluated):
    numbers = evaluated.numbers
    for group, key in (
        ("tokenizer", "psnr_db"), ("tokenizer", "moving_psnr_db"), ("tokenizer", "ssim"),
        ("tokenizer", "codes_used_fraction"), ("tokenizer", "perplexity"),
        ("tokenizer", "code_change_rate"),
        ("dynamics", "cross_entropy"), ("dynamics", "teacher_forced_accuracy"),
        ("dynamics", "free_running_accuracy"), ("dynamics", "copy_accuracy"),
        ("rollout", "psnr_over_copy_db"), ("rollout", "delta_psnr_db"),
        ("play", "frames_per_s"), ("play", "p50_ms"), ("play", "p95_ms"),
    ):  # fmt: skip
        assert math.isfinite(numbers[group][key]), (group, key)
    assert numbers["play"]["frames_per_s"] > 0
    assert len(numbers["rollout"]["per_frame"]["model_db"]) == evaluated.settings["horizon"]


def test_only_held_out_episodes_count(evaluated, tiny_chain, tmp_path):
    """Every other episode is replaced by noise; no number changes."""
    copy = tmp_path / "episodes"
    shutil.copytree(tiny_chain.folder / "episodes", copy)
    for path in copy.glob("*.npz"):
        if path.stem != HELD_OUT:
            path.write_bytes(b"not an episode")
    path = evaluate(
        EvaluateConfig(
            **tiny_chain.paths, **evaluated.settings, episodes=copy,
            shards=tiny_chain.folder / "shards", output=tmp_path / "out",
        )
    )  # fmt: skip
    again = json.loads(path.read_text())
    assert without_the_clock(again) == without_the_clock(evaluated.numbers)
    assert again["settings"]["num_episodes"] == 1


def test_the_use_of_the_codebook_is_the_same_from_shards_and_from_episodes(tiny_chain):
    episodes = Episodes(tiny_chain.folder / "episodes")
    from_shards, encoded = (
        evaluate_tokenizer.codebook_use(shards, episodes, tiny_chain.tokenizer).numbers()
        for shards in (tiny_chain.folder / "shards", None)
    )
    assert from_shards == encoded
    assert 0 < from_shards["codes_used_fraction"] <= 1
    assert 1 <= from_shards["perplexity"] <= 16


def test_episodes_encoded_side_by_side_are_encoded_as_alone(held_out, tiny_chain):
    for episode in held_out:
        codes_Bthw = tiny_chain.tokenizer.encode(episode.frames_THWC[None])
        decoded = tiny_chain.tokenizer.decode(codes_Bthw, num_frames=len(episode.frames_THWC))
        assert torch.equal(episode.codes_thw, codes_Bthw[0])
        # Kernels may sum in another order for another batch: a level of grey at most.
        assert (episode.decoded_THWC.int() - decoded[0].int()).abs().max() <= 1


def test_reconstruction_is_the_psnr_of_all_frames_together(held_out):
    true = torch.cat([episode.frames_THWC for episode in held_out])
    decoded = torch.cat([episode.decoded_THWC for episode in held_out])
    measured = measures.reconstruction(held_out)
    assert measured["psnr_db"] == pytest.approx(psnr(true[None], decoded[None]), abs=1e-4)
    assert measured["num_frames"] == len(true)


def test_cross_entropy_predicts_every_frame_once_from_its_window(world, held_out):
    length = world.model.config.context_frames
    nats, right = [], []
    for episode in held_out:
        slots_TA = torch.from_numpy(episode.slots_TA)
        for first in range(0, len(episode.codes_thw) - 1, length - 1):
            codes_thw = episode.codes_thw[first : first + length]
            slots = slots_TA[first : first + len(codes_thw) - 1]
            logits_NV = world.model(codes_thw[None], slots[None]).detach().flatten(0, -2)
            nats.append(cross_entropy(logits_NV, codes_thw[1:].flatten(), reduction="none"))
            right.append(logits_NV.argmax(-1) == codes_thw[1:].flatten())
    assert sum(map(len, nats)) == sum(16 * (len(e.codes_thw) - 1) for e in held_out)
    for batch in (1, 5):
        measured = measures.given_the_past(world, held_out, batch)
        assert measured["cross_entropy"] == pytest.approx(float(torch.cat(nats).mean()), rel=1e-5)
        assert measured["teacher_forced_accuracy"] == pytest.approx(
            float(torch.cat(right).float().mean())
        )


def plan(**settings):
    return measures.Plan(**({"prompt_frames": 3, "horizon": 5, "batch": 4, "seed": 0} | settings))


def test_copy_accuracy_is_the_share_of_codes_that_stay(world, held_out):
    stays = [(episode.codes_thw[2:-1] == episode.codes_thw[3:]).flatten() for episode in held_out]
    measured = measures.first_frames(world, held_out, plan(), count=10_000)
    assert measured["copy_accuracy"] == pytest.approx(float(torch.cat(stays).float().mean()))
    assert measured["num_first_frames"] == sum(len(e.codes_thw) - 3 for e in held_out)


def test_free_running_accuracy_does_not_depend_on_the_batch(world, held_out):
    together = measures.first_frames(world, held_out, plan(batch=32), count=20)
    alone = measures.first_frames(world, held_out, plan(batch=1), count=20)
    assert together == alone


def test_starts_are_different_and_have_all_that_follows(world, held_out):
    starts = measures.find_starts(held_out, frames=8, count=10_000, world=world, seed=0)
    assert len({(s.episode.key, s.first) for s in starts}) == len(starts)
    assert len(starts) == sum(len(e.codes_thw) - 7 for e in held_out)
    assert max(s.first for s in starts if s.episode is held_out[0]) + 8 == len(
        held_out[0].codes_thw
    )


def test_rollouts_are_compared_with_the_frames_that_truly_followed(world, held_out):
    starts = measures.find_starts(held_out, frames=8, count=6, world=world, seed=0)
    rollouts = measures.roll_out(world, starts, plan())
    for index, start in enumerate(starts):
        frames = start.episode.frames_THWC[start.first : start.first + 8]
        assert torch.equal(rollouts.prompt_NTHWC[index], frames[:3])
        assert torch.equal(rollouts.true_NTHWC[index], frames[3:])
        assert torch.equal(rollouts.copy_NTHWC[index], frames[2:3].expand(5, -1, -1, -1))
        slots_TA = start.episode.slots_TA[start.first : start.first + 7]
        assert np.array_equal(rollouts.slots_NTA[index].numpy(), slots_TA)
        generated_Bthw = generate_codes(
            world.model,
            start.episode.codes_thw[None, start.first : start.first + 3],
            torch.from_numpy(slots_TA)[None],
            seeds=measures._seeds([start], 0),
            sampling=world.sampling,
        )
        decoded = world.tokenizer.decode(generated_Bthw, num_frames=8)
        assert torch.equal(rollouts.model_NTHWC[index], decoded[0, 3:])


def test_the_same_seeds_under_the_same_actions_give_no_difference(tiny_chain, held_out):
    """Where there is one action, random ones are the true ones: dPSNR is 0, so it is paired."""
    spec = dataclasses.replace(tiny_chain.model.spec, actions=ActionSpec.discrete(["ONLY"]))
    codebook_VZ = tiny_chain.tokenizer.codebook.numpy()
    model = DynamicsModel(tiny_chain.model.config, spec, codebook_VZ, seed=2).eval()
    world = World(model, tiny_chain.tokenizer, sampling=SamplingConfig())
    only = [dataclasses.replace(e, slots_TA=np.zeros_like(e.slots_TA)) for e in held_out]
    starts = measures.find_starts(only, frames=8, count=4, world=world, seed=0)
    rollouts = measures.roll_out(world, starts, plan())
    assert torch.equal(rollouts.model_NTHWC, rollouts.random_NTHWC)
    assert measures.score(rollouts, plan())["delta_psnr_db"] == 0


def test_random_actions_change_the_rollouts_of_a_model_that_listens(world, held_out):
    starts = measures.find_starts(held_out, frames=8, count=4, world=world, seed=0)
    rollouts = measures.roll_out(world, starts, plan())
    assert not torch.equal(rollouts.model_NTHWC, rollouts.random_NTHWC)


def grey(value, *, frames=4, rollouts=2):
    return torch.full((rollouts, frames, 12, 12, 3), value, dtype=torch.uint8)


def test_scores_are_their_closed_forms():
    model = grey(110)
    model[:, 2:] = 120  # errors of 10, 10, 20, 20
    rollouts = measures.Rollouts(
        true_NTHWC=grey(100), model_NTHWC=model, random_NTHWC=grey(140), copy_NTHWC=grey(150),
        decoded_NTHWC=grey(100), prompt_NTHWC=grey(100), slots_NTA=torch.zeros(2, 6, 1),
    )  # fmt: skip

    def decibels(*differences):
        return -10 * math.log10(np.mean([(d / 255) ** 2 for d in differences]))

    numbers = measures.score(rollouts, plan())
    assert numbers["psnr_db"] == pytest.approx(decibels(10, 10, 20, 20), abs=1e-4)
    assert numbers["psnr_over_copy_db"] == pytest.approx(
        decibels(10, 10, 20, 20) - decibels(50), abs=1e-4
    )
    assert numbers["delta_psnr_db"] == pytest.approx(
        decibels(10, 10, 20, 20) - decibels(40), abs=1e-4
    )
    assert numbers["reconstruction_psnr_db"] == LIMIT_DB
    curve = [decibels(d) for d in (10, 10, 20, 20)]
    assert numbers["per_frame"]["model_db"] == pytest.approx(curve, abs=1e-4)
    # The line of least squares, by hand: x is -1.5, -.5, .5, 1.5 around its mean.
    slope = (-1.5 * curve[0] - 0.5 * curve[1] + 0.5 * curve[2] + 1.5 * curve[3]) / 5
    assert numbers["drift_db_per_frame"] == pytest.approx(slope, abs=1e-4)
    assert slope < 0  # frames that get worse lose decibels


def test_drift_is_the_decibels_that_every_further_frame_costs():
    """Errors that double every frame lose 6.02 dB a frame; those that stay lose none."""
    true = grey(0)
    for differences, slope in (((5, 10, 20, 40), -20 * math.log10(2)), ((7, 7, 7, 7), 0.0)):
        model = true.clone()
        for frame, difference in enumerate(differences):
            model[:, frame] = difference
        rollouts = measures.Rollouts(
            true_NTHWC=true, model_NTHWC=model, random_NTHWC=true, copy_NTHWC=true,
            decoded_NTHWC=true, prompt_NTHWC=true, slots_NTA=torch.zeros(2, 6, 1),
        )  # fmt: skip
        assert measures.score(rollouts, plan())["drift_db_per_frame"] == pytest.approx(
            slope, abs=1e-3
        )


def test_there_is_a_picture_of_everything_that_is_named(evaluated):
    numbers, folder = evaluated.numbers, evaluated.folder
    pictures = numbers["pictures"]
    named = {pictures["reconstructions"], pictures["drift"], "evaluation.json"}
    for entry in pictures["rollouts"] + pictures["held"]:
        named |= {entry["png"], entry["gif"]}
    assert {path.name for path in folder.iterdir()} == named
    assert [entry["action"] for entry in pictures["held"]] == ["STAY", "LEFT", "RIGHT"]
    for name in named - {"evaluation.json"}:
        with Image.open(folder / name) as picture:
            picture.verify()


def test_a_world_plays_what_the_library_generates(world, held_out):
    episode = held_out[0]
    world.reset(episode.codes_thw[:3], episode.slots_TA[:2], seed=11)
    played, codes = zip(
        *(world.step(episode.slots_TA[i : i + 1]) for i in range(2, 7)), strict=True
    )
    wanted = generate_codes(
        world.model,
        episode.codes_thw[None, :3],
        torch.from_numpy(episode.slots_TA[None, :7]),
        seeds=[11],
        sampling=world.sampling,
    )
    assert torch.equal(torch.stack(codes), wanted[0, 3:])
    decoded = world.tokenizer.decode(wanted, num_frames=8)[0, 3:]
    assert np.array_equal(np.concatenate(played), decoded.numpy())


def test_a_world_before_its_first_reset_says_so(world):
    with pytest.raises(ValueError, match="before its first reset"):
        world.step(np.zeros((1, 1), np.int64))


def config(tiny_chain, output, **settings):
    settings = {**tiny_chain.paths, "episodes": tiny_chain.folder / "episodes"} | settings
    return EvaluateConfig(output=output, **settings)


def test_the_next_step_can_be_pasted(tiny_chain, evaluated, tmp_path, capsys):
    where = tmp_path / "evaluation"
    evaluate(config(tiny_chain, where, **evaluated.settings))
    (line,) = re.findall(r"^next: (worldloom generate .*)$", capsys.readouterr().err, re.MULTILINE)
    assert main([*shlex.split(line)[1:], "--horizon", "2", "--device", "cpu"]) == 0
    assert (tmp_path / "generated/generated.gif").exists()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"batch": 0}, "--batch must be at least 1, got 0"),
        ({"small_pixels": 0}, "--small-pixels must be at least 1, got 0"),
        ({"max_episodes": -1}, "--max-episodes must be at least 0, got -1"),
    ],
)
def test_numbers_that_leave_nothing_to_measure_are_refused(tiny_chain, tmp_path, settings, said):
    with pytest.raises(ConfigError, match=said):
        config(tiny_chain, tmp_path / "out", **settings)


def test_one_episode_is_too_few_to_hold_one_out(tiny_chain, tmp_path):
    one = tmp_path / "one"
    one.mkdir()
    for name in ("episodes.json", "episode-000001.npz"):
        shutil.copy(tiny_chain.folder / "episodes" / name, one / name)
    with pytest.raises(FormatError, match="none is held out"):
        evaluate(config(tiny_chain, tmp_path / "out", episodes=one))


def test_episodes_shorter_than_a_rollout_are_refused(tiny_chain, tmp_path):
    with pytest.raises(FormatError, match="the longest has 29; lower --horizon"):
        evaluate(config(tiny_chain, tmp_path / "out", horizon=26))
    assert not (tmp_path / "out").exists()


def test_another_tokenizer_is_refused(build_tokenizer, tiny_chain, tmp_path):
    build_tokenizer(seed=5).save(tmp_path / "other", card="other")
    with pytest.raises(MismatchError, match="fingerprint"):
        evaluate(config(tiny_chain, tmp_path / "out", tokenizer=str(tmp_path / "other")))


def test_a_folder_of_something_else_is_not_replaced(tiny_chain, tmp_path):
    (tmp_path / "diary.txt").write_text("dear diary")
    with pytest.raises(ConfigError, match="not written by evaluate"):
        evaluate(config(tiny_chain, tmp_path))
    assert (tmp_path / "diary.txt").exists()
