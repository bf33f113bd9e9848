"""Promises of refinement in passes: what is known and kept, and that the seed decides."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from dynamics.toys import (
    ACTIONS,
    OPTIONS,
    code_spec,
    make_model,
    random_codes,
    random_slots,
    tiny,
    train,
    write_shards,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from worldloom.common import ActionSpec, ConfigError
from worldloom.dynamics import NULL, DynamicsModel, Rollout, SamplingConfig, generate_codes
from worldloom.dynamics.decoders import MaskGIT
from worldloom.dynamics.decoders.maskgit import known_after
from worldloom.dynamics.guidance import guide
from worldloom.dynamics.sampling import keyed_gumbel
from worldloom.dynamics.sequence import flatten_codes


@given(passes=st.integers(1, 40), cells=st.integers(1, 300))
def test_every_pass_makes_more_cells_known_and_the_last_one_all(passes, cells):
    counts = known_after(passes, cells)
    assert len(counts) == min(passes, cells)
    assert all(one < other for one, other in zip([0, *counts], counts, strict=False))
    assert counts[-1] == cells
    if cells >= 8 * passes:  # or one cell at least decides, and not the schedule
        for number, count in enumerate(counts, 1):
            unknown = cells * math.cos(math.pi / 2 * number / passes)
            assert cells - count <= unknown + 1e-9 < cells - count + 1


class HashRefine:
    """Codes and sureness that are any function of what is known; notes what it was asked."""

    def __init__(self, *, passes: int, vocab_size: int, seed: int) -> None:
        self.passes, self.group, self.asked = passes, 0, []
        self._vocab_size, self._seed = vocab_size, seed

    def refine(self, codes_BSQ, known_BS, *, boldness):
        self.asked.append((codes_BSQ.clone(), None if known_BS is None else known_BS.clone()))
        known_BS = torch.zeros(codes_BSQ.shape[:2]).bool() if known_BS is None else known_BS
        drawn_BSQ, sureness_BS = codes_BSQ.clone(), torch.full(known_BS.shape, math.inf)
        for row, (codes_SQ, known_S) in enumerate(zip(codes_BSQ, known_BS, strict=True)):
            seen = tuple(codes_SQ[known_S].flatten().tolist())
            for cell in (~known_S).nonzero()[:, 0].tolist():
                number = abs(hash((self._seed, row, cell, seen)))
                drawn_BSQ[row, cell] = number % self._vocab_size
                sureness_BS[row, cell] = -float(number % 3)
        return drawn_BSQ, sureness_BS


@settings(max_examples=100)
@given(
    passes=st.integers(1, 9),
    cells=st.integers(1, 12),
    batch=st.integers(1, 3),
    levels=st.integers(1, 2),
    seed=st.integers(0, 2**32),
)
def test_what_is_known_stays_and_the_surest_become_known(passes, cells, batch, levels, seed):
    draw = HashRefine(passes=passes, vocab_size=5, seed=seed)
    guess_BSQ = torch.full((batch, cells, levels), 77)
    made_BSQ = MaskGIT().decide(draw, guess_BSQ)
    assert (guess_BSQ == 77).all()
    assert not (made_BSQ == 77).any()
    assert len(draw.asked) == min(passes, cells)
    assert draw.asked[0][1] is None
    kept = [*draw.asked[1:], (made_BSQ, torch.ones(batch, cells, dtype=torch.bool))]
    before_BS = torch.zeros(batch, cells, dtype=torch.bool)
    for (codes_BSQ, known_BS), count in zip(kept, known_after(passes, cells), strict=True):
        assert known_BS.sum(1).tolist() == [count] * batch
        assert (known_BS | ~before_BS).all()
        assert torch.equal(codes_BSQ[known_BS], made_BSQ[known_BS])
        before_BS = known_BS
    # In each pass nothing that stayed unknown was surer than what became known.
    known_BS = torch.zeros(batch, cells, dtype=torch.bool)
    for asked, (_, later_BS) in zip(list(draw.asked), kept, strict=True):
        _, sureness_BS = draw.refine(*asked, boldness=0.0)
        for row in range(batch):
            chosen, left = later_BS[row] & ~known_BS[row], ~later_BS[row]
            assert not left.any() or sureness_BS[row, chosen].min() >= sureness_BS[row, left].max()
        known_BS = later_BS


def masked_model(*, seed=0, levels=1, kind="discrete", **options) -> DynamicsModel:
    codes = code_spec(height=2, width=4, vocab_size=16, num_levels=levels)
    return make_model(codes, ACTIONS[kind], seed=seed, order="masked", **options)


def made(model, prompt_Bthw, slots_BTA, seeds, sampling):
    return generate_codes(model, prompt_Bthw, slots_BTA, seeds=seeds, sampling=sampling)


@pytest.mark.slow
@settings(max_examples=40)
@given(
    options=st.sampled_from([{}, *OPTIONS.values()]),
    kind=st.sampled_from(sorted(ACTIONS)),
    levels=st.sampled_from([1, 2]),
    temperature=st.sampled_from([0.0, 0.5, 1.0, 1.5]),
    min_p=st.sampled_from([0.0, 0.1]),
    scale=st.sampled_from([1.0, 2.0]),
    refinements=st.sampled_from([1, 2, 4, 8, 20]),
    seed=st.integers(0, 1000),
)
def test_a_world_is_the_same_alone_and_in_any_batch_and_its_prompt_is_untouched(
    options, kind, levels, temperature, min_p, scale, refinements, seed
):
    model = masked_model(seed=seed, levels=levels, kind=kind, **options)
    sampling = SamplingConfig(
        temperature=temperature,
        min_p=min_p,
        guidance_scale=scale if ACTIONS[kind].num_slots else 1.0,
        decoder="maskgit",
        refinements=refinements,
    )
    frames, first = 7, 1 + seed % 5
    prompt_Bthw = random_codes(model, first, batch=3, seed=seed)
    slots_BTA = random_slots(model, frames, batch=3, seed=seed)
    together = made(model, prompt_Bthw, slots_BTA, [4, 5, 6], sampling)
    assert torch.equal(together[:, :first], prompt_Bthw)
    assert torch.equal(made(model, prompt_Bthw, slots_BTA, [4, 5, 6], sampling), together)
    order = [2, 0]
    others = made(model, prompt_Bthw[order], slots_BTA[order], [6, 4], sampling)
    alone = made(model, prompt_Bthw[1:2], slots_BTA[1:2], [5], sampling)
    assert torch.equal(others, together[order])
    assert torch.equal(alone[0], together[1])


@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_one_pass_at_temperature_0_takes_what_is_likeliest_with_all_masked(levels, guidance_scale):
    model = masked_model(levels=levels)
    prompt_Bthw, slots_BTA = random_codes(model, 2), random_slots(model, 9)
    way = SamplingConfig(temperature=0.0, refinements=1)
    codes_Bthw = made(model, prompt_Bthw, slots_BTA, [0, 1], way)
    likeliest_BfN = model(codes_Bthw, slots_BTA).argmax(-1).flatten(2)
    assert torch.equal(codes_Bthw[:, 2:].flatten(2), likeliest_BfN[:, 1:])
    refined = made(model, prompt_Bthw, slots_BTA, [0, 1], replace(way, refinements=4))
    assert not torch.equal(refined, codes_Bthw)


@torch.inference_mode()
def by_hand(model, prompt_Bthw, slots_BTA, seeds, way):
    """The same rollout from the full forward of a window alone, no cache, one world at a time."""
    worlds, spec, cells = [], model.spec.tokenizer.codes, model.grid.cells
    for row, seed in enumerate(seeds):
        codes_BtSQ = flatten_codes("codes", prompt_Bthw[row : row + 1], spec)
        for frame in range(prompt_Bthw.shape[1], slots_BTA.shape[1] + 1):
            slots_1TA = slots_BTA[row : row + 1, :frame]
            now_1SQ = torch.zeros_like(codes_BtSQ[:, -1])
            known_S = torch.zeros(cells, dtype=torch.bool)
            counts = known_after(way.refinements, cells)
            for number, count in enumerate(counts, 1):
                window_1tSQ = torch.cat([codes_BtSQ, now_1SQ[:, None]], dim=1)
                rows = [
                    refined_tokens(model, window_1tSQ, slots, known_S)
                    for slots in (slots_1TA, torch.full_like(slots_1TA, NULL))
                ]
                sure_S = torch.zeros(cells)
                for cell in range(cells):
                    for level in range(spec.num_levels):
                        below = now_1SQ[:, cell : cell + 1, :level]
                        pair = [model.level_logits(one[:, cell : cell + 1], below) for one in rows]
                        logits_V = pair[0][0, 0]
                        if way.guided:
                            logits_V = guide(
                                *pair, scale=way.guidance_scale, parallel_keep_frac=1.0
                            )[0, 0]
                        if not known_S[cell]:
                            noise_V = keyed_noise(seed, frame, cell, level, 16)
                            now_1SQ[0, cell, level] = (
                                logits_V / way.temperature + noise_V
                            ).argmax()
                        sure_S[cell] += logits_V.log_softmax(-1)[now_1SQ[0, cell, level]]
                    noise = keyed_noise(seed, frame, cell, spec.num_levels, 1)
                    sure_S[cell] += way.temperature * (1 - number / len(counts)) * noise[0]
                sure_S[known_S] = math.inf
                known_S = known_S.scatter(0, sure_S.topk(count).indices, value=True)
            codes_BtSQ = torch.cat([codes_BtSQ, now_1SQ[:, None]], dim=1)
        worlds.append(codes_BtSQ)
    return torch.cat(worlds)


def refined_tokens(model, window_1tSQ, slots_1TA, known_S):
    """tokens_1SD that refine the last frame of a window."""
    spec = model.spec.tokenizer.codes
    known_tS = torch.zeros(window_1tSQ.shape[1], len(known_S), dtype=torch.bool)
    known_tS[-1] = known_S
    grid = (spec.grid_height, spec.grid_width)
    codes_1thw = window_1tSQ.unflatten(2, grid)
    codes_1thw = codes_1thw if spec.num_levels > 1 else codes_1thw[..., 0]
    known_1thw = known_tS.unflatten(1, grid)[None]
    return model.tokens_and_refined(codes_1thw, slots_1TA, known_1thw)[1][:, -1]


def keyed_noise(seed, frame, cell, level, vocab_size):
    """Noise of one cell's level."""
    cells = slice(cell, cell + 1)
    return keyed_gumbel(torch.tensor([seed]), frame, cells, vocab_size, level=level)[0, 0]


@pytest.mark.parametrize(
    ("levels", "refinements", "guidance_scale", "options"),
    [
        (1, 3, 1.0, {}),
        (2, 4, 1.0, {"action_input": "prepended"}),
        (1, 8, 1.0, {"attention": "factorised"}),
        (2, 3, 2.0, {}),
    ],
)
def test_a_refined_rollout_is_what_the_full_forward_gives_cell_by_cell(
    levels, refinements, guidance_scale, options
):
    """So what the cache remembers is what training sees, long after the window has slid."""
    model = masked_model(levels=levels, **options)
    prompt_Bthw, slots_BTA = random_codes(model, 2), random_slots(model, 9)
    way = SamplingConfig(
        temperature=0.8, min_p=0.0, guidance_scale=guidance_scale, refinements=refinements
    )
    found = made(model, prompt_Bthw, slots_BTA, [3, 4], way)
    wanted = by_hand(model, prompt_Bthw, slots_BTA, [3, 4], way)
    assert torch.equal(flatten_codes("found", found, model.spec.tokenizer.codes), wanted)


def test_a_frame_takes_as_many_forwards_as_passes_and_no_more_than_cells():
    model = masked_model()
    slots_BTA = random_slots(model, 9)
    rollout = Rollout(
        model, random_codes(model, 1), slots_BTA[:, :0], seeds=[0, 1], sampling=SamplingConfig()
    )
    forwards = []
    for step, passes in enumerate([4, 1, 2, 8, 30]):
        rollout.sampling = replace(rollout.sampling, refinements=passes)
        rollout.step(slots_BTA[:, step : step + 1])
        forwards.append(rollout.forwards)
    assert forwards == [4, 1, 2, 8, 8]


@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
def test_after_a_restore_the_same_frames_follow_and_passes_are_those_asked_for_now(guidance_scale):
    model = masked_model(levels=2)
    slots_BTA = random_slots(model, 20)
    way = SamplingConfig(temperature=1.0, guidance_scale=guidance_scale, refinements=3)
    rollout = Rollout(model, random_codes(model, 1), slots_BTA[:, :0], seeds=[0, 1], sampling=way)

    def go(first, last):
        return torch.stack([rollout.step(slots_BTA[:, s : s + 1]) for s in range(first, last)])

    go(0, 6)
    start = rollout.snapshot()
    expected = go(6, 12)
    rollout.sampling = replace(way, refinements=1)
    go(12, 15)
    rollout.restore(start)
    other = go(6, 12)
    assert rollout.forwards == 1
    assert not torch.equal(other, expected)
    rollout.restore(start)
    rollout.sampling = way
    assert torch.equal(go(6, 12), expected)


@pytest.mark.parametrize("refinements", [0, -1, 1.5])
def test_a_number_of_passes_that_is_none_is_refused(refinements):
    with pytest.raises(ConfigError, match=rf"refinements is {refinements}, must be a number of"):
        SamplingConfig(refinements=refinements)


def write_coins(folder):
    """A world in which all cells of a frame show the same side of a coin, thrown every frame."""
    codes = code_spec(height=2, width=3, vocab_size=2)
    rng = np.random.default_rng(0)
    throws = [rng.integers(0, 2, (9, 1, 1)) for _ in range(96)]
    episodes = [
        (np.broadcast_to(sides, (9, 2, 3)).astype(np.uint8), np.zeros((8, 0), np.int64))
        for sides in throws
    ]
    return write_shards(folder, episodes, codes, ActionSpec.none(), held_out=8)


@pytest.mark.slow
def test_cells_that_must_agree_do_so_after_refinement_and_not_after_one_pass(tmp_path):
    """What order frame cannot do: choose one of two futures with all cells together."""
    shards = write_coins(tmp_path / "shards")
    folder = train(
        shards.folder, tmp_path / "run", model=tiny(order="masked"), num_steps=200,
        batch_windows=16, learning_rate=4e-3, corruption=0.0, validate_every=200,
        checkpoint_every=200, log_every=50,
    )  # fmt: skip
    model = DynamicsModel.from_pretrained(folder)
    prompt_Bthw = torch.zeros(64, 1, 2, 3, dtype=torch.int64)
    slots_BTA = torch.zeros(64, 8, 0, dtype=torch.int64)
    agreeing = {}
    for refinements in (1, 2, 6):
        way = SamplingConfig(temperature=1.0, min_p=0.0, refinements=refinements)
        frames_N6 = made(model, prompt_Bthw, slots_BTA, range(64), way)[:, 1:].reshape(-1, 6)
        sides_N = frames_N6.float().mean(1)
        agreeing[refinements] = ((sides_N == 0) | (sides_N == 1)).float().mean().item()
        assert 0.4 < sides_N.mean() < 0.6, agreeing  # both sides come up
    # Of six coins 3% agree by chance.
    assert agreeing[1] < 0.1, agreeing
    assert agreeing[6] > 0.97, agreeing
    assert agreeing[1] < agreeing[2] <= agreeing[6], agreeing
