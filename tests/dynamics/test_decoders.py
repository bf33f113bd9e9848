"""Promises of the decoders: raster's codes, whatever is drawn and guessed, in fewer forwards."""

import math
import time
from dataclasses import replace

import pytest
import torch
from dynamics.toys import ACTIONS, OPTIONS, code_spec, make_model, random_codes, random_slots
from hypothesis import given, settings
from hypothesis import strategies as st
from worldloom.common import ConfigError
from worldloom.dynamics import NULL, Rollout, SamplingConfig, decoders_of
from worldloom.dynamics.decoders import Auto, Jacobi, MaskGIT, Raster, open_decoder
from worldloom.dynamics.guidance import guide
from worldloom.dynamics.sampling import keyed_gumbel

TIE = 1e-5
"""Scores nearer to each other than this may fall either way in floating point."""


class HashDraw:
    """A function from the codes before a group to the group's: any, and exactly the same twice.

    `memory` is how many cells back it looks, so how soon a guess becomes right again.
    """

    def __init__(self, *, group: int, num_groups: int, vocab_size: int, memory: int, seed: int):
        self.group, self.num_groups, self.calls = group, num_groups, 0
        self._vocab_size, self._memory, self._seed = vocab_size, memory, seed
        self.per_call_s = self.per_cell_s = 0.0

    def __call__(self, cells: slice, codes_BSQ: torch.Tensor) -> torch.Tensor:
        assert cells.start % self.group == cells.stop % self.group == 0
        assert 0 <= cells.start < cells.stop <= self.group * self.num_groups
        self.calls += 1
        time.sleep(self.per_call_s + self.per_cell_s * (cells.stop - cells.start))
        drawn_BsQ = codes_BSQ[:, cells].clone()
        for row, codes_SQ in enumerate(codes_BSQ.tolist()):
            for cell in range(cells.start, cells.stop):
                before = cell // self.group * self.group
                seen = tuple(map(tuple, codes_SQ[max(0, before - self._memory) : before]))
                for level in range(codes_BSQ.shape[2]):
                    key = (self._seed, row, cell, level, seen)
                    drawn_BsQ[row, cell - cells.start, level] = hash(key) % self._vocab_size
        return drawn_BsQ


@settings(max_examples=150)
@given(
    group=st.integers(1, 3),
    num_groups=st.integers(1, 12),
    batch=st.integers(1, 4),
    levels=st.integers(1, 2),
    vocab_size=st.integers(1, 4),
    memory=st.integers(0, 20),
    reach=st.sampled_from([0.0, 1.0, 4.0, math.inf]),
    seed=st.integers(0, 2**32),
)
def test_jacobi_gives_rasters_codes_of_any_function_and_any_guess(
    group, num_groups, batch, levels, vocab_size, memory, reach, seed
):
    jacobi, auto = Jacobi(reach=reach), Auto()
    generator = torch.Generator().manual_seed(seed)
    for frame in range(2):
        shape = (batch, group * num_groups, levels)
        guess_BSQ = torch.randint(vocab_size, shape, generator=generator)
        kept_BSQ = guess_BSQ.clone()
        draws = [
            HashDraw(
                group=group, num_groups=num_groups, vocab_size=vocab_size, memory=memory,
                seed=seed + frame,
            )
            for _ in range(3)
        ]  # fmt: skip
        raster_BSQ = Raster().decide(draws[0], guess_BSQ)
        assert draws[0].calls == num_groups
        assert torch.equal(jacobi.decide(draws[1], guess_BSQ), raster_BSQ)
        assert draws[1].calls <= num_groups
        assert torch.equal(auto.decide(draws[2], guess_BSQ), raster_BSQ)
        assert torch.equal(guess_BSQ, kept_BSQ)
        right = HashDraw(
            group=group, num_groups=num_groups, vocab_size=vocab_size, memory=memory,
            seed=seed + frame,
        )  # fmt: skip
        assert torch.equal(Jacobi(reach=math.inf).decide(right, raster_BSQ), raster_BSQ)
        assert right.calls == 1


def test_jacobi_grows_wider_while_its_guesses_are_right_and_narrower_while_they_are_not():
    jacobi, calls = Jacobi(), []
    for frame in range(40):
        still = frame < 20
        draw = HashDraw(group=1, num_groups=64, vocab_size=9, memory=64, seed=0 if still else frame)
        raster_BSQ = Raster().decide(draw, torch.zeros(1, 64, 1, dtype=torch.int64))
        draw.calls = 0
        guess_BSQ = raster_BSQ if still else (raster_BSQ + 1) % 9
        sizes = []
        jacobi.decide(watched(draw, sizes), guess_BSQ)
        calls.append((draw.calls, max(sizes)))
    assert calls[0][0] > 1
    assert calls[19] == (1, 64)
    # All wrong, and right again only cell by cell: no more is drawn than a few cells ahead.
    assert calls[39][1] <= 16


@pytest.mark.parametrize("moved_by", [-9, -1, 1, 8])
def test_jacobi_takes_few_forwards_where_the_picture_has_moved_as_a_whole(moved_by):
    """Each code follows the one beside it, so whatever comes of a wrong guess is wrong, too."""
    before_BSQ = torch.randperm(64, generator=torch.Generator().manual_seed(0))[None, :, None]
    after_BSQ = before_BSQ.roll(moved_by, dims=1)
    successor = dict(zip(after_BSQ[0, :-1, 0].tolist(), after_BSQ[0, 1:, 0].tolist(), strict=True))

    class Neighbours:
        group, calls = 1, 0

        def __call__(self, cells: slice, codes_BSQ: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            drawn_BsQ = codes_BSQ[:, cells].clone()
            for cell in range(cells.start, cells.stop):
                beside = int(codes_BSQ[0, cell - 1, 0])
                code = successor.get(beside, 0) if cell else int(after_BSQ[0, 0, 0])
                drawn_BsQ[0, cell - cells.start, 0] = code
            return drawn_BsQ

    draw = Neighbours()
    assert torch.equal(Jacobi().decide(draw, before_BSQ), after_BSQ)
    # It sees that it moved after three codes, and that what moved in from the border did not.
    assert draw.calls <= 20


def watched(draw: HashDraw, sizes: list[int]) -> HashDraw:
    """The same draw, which notes how many cells it was asked for."""

    class Watched:
        group = draw.group

        def __call__(self, cells: slice, codes_BSQ: torch.Tensor) -> torch.Tensor:
            sizes.append(cells.stop - cells.start)
            return draw(cells, codes_BSQ)

    return Watched()  # type: ignore[return-value]


@pytest.mark.parametrize("cost", ["per call", "per cell"])
def test_auto_stays_with_the_fastest(cost):
    """Where calls cost, with whoever makes few; where cells cost and guesses are wrong, raster."""
    auto = Auto()
    for frame in range(13):
        draw = HashDraw(group=1, num_groups=8, vocab_size=9, memory=8, seed=frame)
        right_BSQ = Raster().decide(draw, torch.zeros(1, 8, 1, dtype=torch.int64))
        if cost == "per call":
            draw.per_call_s, guess_BSQ = 0.01, right_BSQ
        else:
            draw.per_cell_s, guess_BSQ = 0.01, (right_BSQ + 1) % 9
        assert torch.equal(auto.decide(draw, guess_BSQ), right_BSQ)
    assert isinstance(auto.chosen, Jacobi if cost == "per call" else Raster)


DECODERS = {
    "raster": {"own": Jacobi, "jacobi": Jacobi, "raster": Raster, "auto": Auto},
    "row": {"own": Jacobi, "jacobi": Jacobi, "row": Raster, "raster": Raster, "auto": Auto},
    "frame": {"own": Raster, "frame": Raster, "raster": Raster, "jacobi": Jacobi, "auto": Auto},
    "masked": {"own": MaskGIT, "maskgit": MaskGIT, "auto": MaskGIT},
}
"""Order -> the names that its models take, and what decides then."""
NAMES = ("own", "jacobi", "raster", "row", "frame", "auto", "maskgit")


@pytest.mark.parametrize("order", DECODERS)
def test_every_order_has_its_decoders_and_another_is_refused_where_it_meets_the_model(order):
    model, taken = make_model(order=order), DECODERS[order]
    assert ["own", *decoders_of(order)] == list(taken)
    prompt_Bthw, slots_BTA = random_codes(model, 1), random_slots(model, 1)
    start = {"seeds": [0, 1], "sampling": SamplingConfig()}
    rollout = Rollout(model, prompt_Bthw, slots_BTA, **start)
    own = rollout.sampling
    assert own.decoder == decoders_of(order)[0]
    for name in NAMES:
        way = SamplingConfig(decoder=name)
        if name in taken:
            assert type(open_decoder(name, order)) is taken[name]
            rollout.sampling = way
            rollout.sampling = own
            continue
        sentence = f"decoder is {name}, but this model's order is {order}, .* {', '.join(taken)}"
        sentence = sentence.replace("own, ", "")
        with pytest.raises(ConfigError, match=sentence):
            Rollout(model, prompt_Bthw, slots_BTA, **{**start, "sampling": way})
        with pytest.raises(ConfigError, match=sentence):
            rollout.sampling = way
        assert rollout.sampling == own


def test_a_decoder_that_there_is_not_is_refused():
    with pytest.raises(ConfigError, match=r"decoder is 'fastest', must be one of own, jacobi"):
        SamplingConfig(decoder="fastest")  # type: ignore[arg-type]


def roll(model, prompt_Bthw, slots_BTA, sampling, *, seeds, frames, restore_at=None):
    """codes_Bthw of a rollout, and its forwards; on the way it may be thrown off and restored."""
    r, first = model.steps_per_frame, prompt_Bthw.shape[1]
    prompt_slots = slots_BTA[:, : (first - 1) * r]
    rollout = Rollout(model, prompt_Bthw, prompt_slots, seeds=seeds, sampling=sampling)
    codes, forwards = [prompt_Bthw], 0
    for frame in range(first, frames):
        if frame == restore_at:
            start = rollout.snapshot()
            for other in range(3):
                rollout.step(slots_BTA[:, other * r : (other + 1) * r])
            rollout.restore(start)
        codes.append(rollout.step(slots_BTA[:, (frame - 1) * r : frame * r])[:, None])
        forwards += rollout.forwards
    return torch.cat(codes, dim=1), forwards


def assert_same_or_tied(model, one_Bthw, other_Bthw, slots_BTA, sampling, seeds, first):
    """Refuse a world whose codes differ, unless where they first do two codes' scores tie."""
    for row in range(len(one_Bthw)):
        pair = torch.stack([one_Bthw[row], other_Bthw[row]]).flatten(2)
        if torch.equal(pair[0], pair[1]):
            continue
        levels = model.spec.tokenizer.codes.num_levels
        frame, place = (pair[0] != pair[1]).nonzero()[0].tolist()
        cell, level = divmod(place, levels)
        codes_Bthw = one_Bthw[row : row + 1, : frame + 1]
        slots = slots_BTA[row : row + 1, : frame * model.steps_per_frame]
        logits_V = model(codes_Bthw, slots)[0, -1].flatten(0, -2)[place]
        if sampling.guided:
            start = max(0, first - model.config.context_frames)
            null = torch.full_like(slots[:, start * model.steps_per_frame :], NULL)
            free = model(codes_Bthw[:, start:], null)[0, -1].flatten(0, -2)[place]
            logits_V = guide(
                logits_V[None, None], free[None, None], scale=sampling.guidance_scale,
                parallel_keep_frac=sampling.parallel_keep_frac,
            )[0, 0]  # fmt: skip
        scaled_V = (logits_V - logits_V.max()) / max(sampling.temperature, 1e-6)
        noise_V = keyed_gumbel(
            torch.tensor([seeds[row]]), frame, slice(cell, cell + 1), len(logits_V), level=level
        )[0, 0]
        scores_V = scaled_V + noise_V if sampling.temperature else logits_V
        best = scores_V[pair[:, frame, place]]
        edge = scaled_V[pair[:, frame, place]] - math.log(sampling.min_p or 1e-30)
        assert abs(best[0] - best[1]) < TIE or edge.abs().min() < TIE, (row, frame, cell, level)


@pytest.mark.slow
@settings(max_examples=40)
@given(
    way=st.sampled_from(
        [
            ("raster", "jacobi"),
            ("raster", "jacobi"),
            ("raster", "auto"),
            ("raster", "own"),
            ("row", "jacobi"),
            ("row", "row"),
            ("row", "auto"),
            ("frame", "frame"),
            ("frame", "jacobi"),
            ("frame", "auto"),
        ]
    ),
    options=st.sampled_from([{}, *OPTIONS.values()]),
    kind=st.sampled_from(sorted(ACTIONS)),
    batch=st.sampled_from([1, 8]),
    levels=st.sampled_from([1, 1, 2]),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 1.5]),
    min_p=st.sampled_from([0.0, 0.1]),
    scale=st.sampled_from([1.0, 2.0]),
    sureness=st.sampled_from([0.1, 1.0, 5.0]),
    seed=st.integers(0, 1000),
)
def test_every_exact_decoder_gives_rasters_codes(
    way, options, kind, batch, levels, temperature, min_p, scale, sureness, seed
):
    """Models that know nothing and models that are sure; long after the window has slid."""
    order, decoder = way
    codes = code_spec(height=2, width=4, vocab_size=16, num_levels=levels)
    model = make_model(codes, ACTIONS[kind], seed=seed, order=order, **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(("head.", "level_head.")):
                parameter *= sureness
    sampling = SamplingConfig(
        temperature=temperature,
        min_p=min_p,
        guidance_scale=scale if ACTIONS[kind].num_slots else 1.0,
        parallel_keep_frac=0.5,
        decoder="raster",
    )
    frames, first = 11, 1 + seed % 4
    seeds = list(range(seed, seed + batch))
    prompt_Bthw = random_codes(model, first, batch=batch, seed=seed)
    slots_BTA = random_slots(model, frames, batch=batch, seed=seed)
    (raster_Bthw, most), (found_Bthw, forwards) = (
        roll(
            model, prompt_Bthw, slots_BTA, replace(sampling, decoder=name),
            seeds=seeds, frames=frames, restore_at=restore_at,
        )
        for name, restore_at in (("raster", None), (decoder, first + 4))
    )  # fmt: skip
    assert_same_or_tied(model, raster_Bthw, found_Bthw, slots_BTA, sampling, seeds, first)
    assert forwards <= most == (frames - first) * len(model.grid.groups())


@pytest.mark.parametrize(
    ("order", "scale", "decoder"),
    [
        ("raster", 1.0, "jacobi"), ("raster", 2.5, "jacobi"), ("row", 2.5, "jacobi"),
        ("row", 1.0, "row"), ("frame", 2.5, "frame"), ("raster", 2.5, "auto"),
    ],
)  # fmt: skip
def test_exact_decoders_give_rasters_codes_after_the_window_has_slid_100_times(
    order, scale, decoder
):
    model = make_model(code_spec(height=2, width=3), order=order)
    prompt_Bthw, slots_BTA = random_codes(model, 2), random_slots(model, 106)
    way = SamplingConfig(temperature=0.7, guidance_scale=scale, decoder="raster")
    (raster_Bthw, most), (found_Bthw, forwards) = (
        roll(model, prompt_Bthw, slots_BTA, sampling, seeds=[0, 1], frames=106)
        for sampling in (way, replace(way, decoder=decoder))
    )
    assert_same_or_tied(model, raster_Bthw, found_Bthw, slots_BTA, way, [0, 1], 2)
    # Of two rows one is guessed right too rarely.
    assert forwards < most or order != "raster"


def test_noise_too_large_to_keep_is_the_noise_that_is_kept(monkeypatch):
    model = make_model(code_spec(num_levels=2), order="raster")
    prompt_Bthw, slots_BTA = random_codes(model, 1), random_slots(model, 4)
    way = SamplingConfig(temperature=1.0)
    whole, _ = roll(model, prompt_Bthw, slots_BTA, way, seeds=[0, 1], frames=4)
    monkeypatch.setattr("worldloom.dynamics.decoders.drawing._MOST_NOISE", 0)
    pieces, _ = roll(model, prompt_Bthw, slots_BTA, way, seeds=[0, 1], frames=4)
    assert torch.equal(whole, pieces)


def test_the_order_frame_takes_one_forward_whatever_the_decoder():
    model = make_model(order="frame")
    prompt_Bthw, slots_BTA = random_codes(model, 1), random_slots(model, 6)
    for name in ("own", "frame", "raster", "jacobi", "auto"):
        way = SamplingConfig(decoder=name)
        _, forwards = roll(model, prompt_Bthw, slots_BTA, way, seeds=[0, 1], frames=6)
        assert forwards == 5
