"""Promises of rollout.py and kv_cache.py: cached equals uncached, for ever; it can be branched."""

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from dynamics.toys import ACTIONS, code_spec, make_model, random_codes, random_slots
from torch.utils._python_dispatch import TorchDispatchMode
from worldloom.common import FormatError, ShapeError
from worldloom.dynamics import NULL, Rollout, SamplingConfig, generate_codes
from worldloom.dynamics.sequence import flatten_codes

ORDERS = ("raster", "row", "frame")
GREEDY = SamplingConfig(temperature=0.0)


@torch.no_grad()
def cached_logits_BfSQV(model, codes_Bthw, slots_BTA):
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


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("r", [1, 2, 4])
@pytest.mark.parametrize("num_meta_tokens", [0, 5])
@pytest.mark.parametrize("num_levels", [1, 3])
def test_cached_logits_equal_uncached_ones_long_after_the_context_has_slid(
    order, r, num_meta_tokens, num_levels
):
    codes = code_spec(frames_per_latent=r, num_levels=num_levels)
    model = make_model(codes, order=order, num_meta_tokens=num_meta_tokens)
    codes_Bthw, slots_BTA = random_codes(model, 14, batch=3), random_slots(model, 14, batch=3)
    # Context 3: the ring goes around four times. The full forward masks what has slid out.
    cached_BfSQV = cached_logits_BfSQV(model, codes_Bthw, slots_BTA)
    full_BfSQV = model(codes_Bthw, slots_BTA).reshape(cached_BfSQV.shape)
    assert (full_BfSQV.std((0, 1, 2, 4)) > 0.5).all()
    assert (full_BfSQV - cached_BfSQV).abs().max() < 1e-5


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("prompt_frames", [1, 2, 3, 7])
@pytest.mark.parametrize("num_levels", [1, 2])
def test_a_greedy_rollout_takes_what_the_full_forward_finds_likeliest(
    order, prompt_frames, num_levels
):
    model = make_model(code_spec(num_levels=num_levels), order=order)
    slots_BTA = random_slots(model, 10)
    generated_Bthw = generate_codes(
        model,
        random_codes(model, prompt_frames),
        slots_BTA,
        seeds=[0, 1],
        sampling=GREEDY,
    )
    likeliest_BfN = model(generated_Bthw, slots_BTA).argmax(-1).flatten(2)
    assert generated_Bthw.shape == (2, *model.spec.tokenizer.codes.codes_shape(10))
    made = slice(prompt_frames, None)
    assert torch.equal(generated_Bthw.flatten(2)[:, made], likeliest_BfN[:, prompt_frames - 1 :])


@pytest.mark.parametrize("prompt_frames", [1, 4])
@pytest.mark.parametrize("num_levels", [1, 2])
def test_the_prompt_comes_back_untouched(prompt_frames, num_levels):
    model = make_model(code_spec(num_levels=num_levels))
    prompt_Bthw = random_codes(model, prompt_frames)
    kept = prompt_Bthw.clone()
    generated_Bthw = generate(model, prompt_Bthw)
    assert torch.equal(generated_Bthw[:, :prompt_frames], kept)
    assert torch.equal(prompt_Bthw, kept)


def generate(model, prompt_Bthw, *, frames=8, seeds=None, sampling=None):
    return generate_codes(
        model,
        prompt_Bthw,
        random_slots(model, frames, batch=len(prompt_Bthw)),
        seeds=range(len(prompt_Bthw)) if seeds is None else seeds,
        sampling=sampling or SamplingConfig(),
    )


def test_codes_of_any_integer_type_are_a_prompt():
    model = make_model()
    prompt_Bthw = random_codes(model, 2)
    assert torch.equal(generate(model, prompt_Bthw), generate(model, prompt_Bthw.to(torch.uint8)))


def digest() -> str:
    """The hash of what a seed and its actions lead to."""
    model = make_model(order="row")
    return hashlib.sha256(generate(model, random_codes(model, 2)).numpy().tobytes()).hexdigest()


def test_the_same_seed_and_actions_give_the_same_codes_in_another_process():
    program = (
        "import torch; torch.set_num_threads(1); torch.manual_seed(1)\n"
        "from dynamics.test_rollout import digest; print(digest())"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
    )
    assert done.stdout.strip() == digest()


def test_another_seed_gives_other_codes_and_temperature_0_needs_none():
    model = make_model()
    prompt_Bthw = random_codes(model, 1).expand(2, -1, -1, -1)[:1].repeat(2, 1, 1, 1)
    slots_BTA = random_slots(model, 5, batch=1).repeat(2, 1, 1)
    for sampling, same in ((SamplingConfig(min_p=0.0), False), (GREEDY, True)):
        one, two = generate_codes(model, prompt_Bthw, slots_BTA, seeds=[1, 2], sampling=sampling)
        assert torch.equal(one, two) == same


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("num_levels", [1, 3])
def test_a_world_is_the_same_alone_and_in_any_company(order, num_levels):
    model = make_model(code_spec(num_levels=num_levels), order=order)
    prompt_Bthw, slots_BTA = random_codes(model, 2, batch=5), random_slots(model, 9, batch=5)
    seeds = [3, 1, 4, 1, -5]

    def worlds(rows):
        return generate_codes(
            model,
            prompt_Bthw[rows],
            slots_BTA[rows],
            seeds=[seeds[row] for row in rows],
            sampling=SamplingConfig(),
        )

    together = worlds([0, 1, 2, 3, 4])
    assert torch.equal(worlds([4, 2, 0]), together[[4, 2, 0]])
    for row in range(5):
        assert torch.equal(worlds([row])[0], together[row])


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("num_levels", [1, 2])
def test_a_snapshot_branches_a_rollout_exactly_and_more_than_once(order, num_levels):
    model = make_model(code_spec(num_levels=num_levels), order=order)
    slots_BTA = random_slots(model, 20)
    rollout = Rollout(
        model, random_codes(model, 2), slots_BTA[:, :1], seeds=[7, 8], sampling=SamplingConfig()
    )

    def go(steps):
        return torch.stack([rollout.step(slots_BTA[:, s : s + 1]) for s in steps], dim=1)

    go(range(1, 6))
    snapshot = rollout.snapshot()
    first = go(range(6, 14))
    for _ in range(2):
        rollout.restore(snapshot)
        other = go(range(13, 5, -1))  # other actions
        assert not torch.equal(first, other)
        rollout.restore(snapshot)
        assert rollout.frame == 7
        assert torch.equal(go(range(6, 14)), first)


def test_changing_what_a_step_returned_changes_no_later_frame():
    model = make_model()
    slots_BTA = random_slots(model, 3)
    frames = []
    for harm in (False, True):
        rollout = Rollout(
            model, random_codes(model, 1), slots_BTA[:, :0], seeds=[0, 1], sampling=GREEDY
        )
        with torch.inference_mode():
            first = rollout.step(slots_BTA[:, :1])
            first.mul_(0 if harm else 1)
        frames.append(rollout.step(slots_BTA[:, 1:2]))
    assert torch.equal(*frames)


class Cost(TorchDispatchMode):
    """Counts operations and the elements that they return."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.operations += 1
        self.elements += out.numel() if isinstance(out, torch.Tensor) else 0
        return out


@pytest.mark.parametrize("order", ["row", "frame"])
def test_frame_2000_costs_what_frame_50_costs_and_has_no_nan(order):
    model = make_model(code_spec(height=2, width=2), num_layers=1, dim=8, num_heads=1, order=order)
    rollout = Rollout(
        model,
        random_codes(model, 1, batch=1),
        random_slots(model, 1, batch=1),
        seeds=[0],
        sampling=SamplingConfig(),
    )
    slots_BTA = random_slots(model, 2, batch=1)
    costs, sizes = {}, set()
    while rollout.frame <= 2000:
        if rollout.frame in (50, 2000):
            with Cost() as cost:
                codes_Bhw = rollout.step(slots_BTA)
            costs[rollout.frame] = (cost.operations, cost.elements)
        else:
            codes_Bhw = rollout.step(slots_BTA)
        sizes.add(rollout.size_bytes)
    assert costs[51] == costs[2001]
    assert len(sizes) == 1
    assert rollout._cache.keys.isfinite().all()
    assert rollout._cache.values.isfinite().all()
    assert 0 <= codes_Bhw.min() <= codes_Bhw.max() < 32


def test_every_kind_of_actions_steers_a_rollout():
    for kind, actions in ACTIONS.items():
        model = make_model(code_spec(frames_per_latent=2), actions)
        prompt_Bthw, slots_BTA = random_codes(model, 2), random_slots(model, 5)
        codes = generate_codes(model, prompt_Bthw, slots_BTA, seeds=[0, 1], sampling=GREEDY)
        unknown_BTA = torch.full_like(slots_BTA, NULL)
        free = generate_codes(model, prompt_Bthw, unknown_BTA, seeds=[0, 1], sampling=GREEDY)
        assert codes.shape == (2, 5, 3, 4)
        assert torch.equal(codes, free) == (kind == "none")


BAD_PROMPTS = {
    "another grid": (torch.zeros(1, 2, 4, 3, dtype=torch.int64), 1, [0], ShapeError, "h is 4"),
    "no frame": (torch.zeros(1, 0, 3, 4, dtype=torch.int64), 0, [0], ShapeError, "0 latent frames"),
    "no world": (torch.zeros(0, 1, 3, 4, dtype=torch.int64), 0, [], ShapeError, "0 worlds"),
    "too few actions": (torch.zeros(1, 3, 3, 4, dtype=torch.int64), 1, [0], ShapeError, "T is 1"),
    "too many seeds": (torch.zeros(1, 1, 3, 4, dtype=torch.int64), 0, [0, 1], ShapeError, "seeds"),
    "a code too high": (torch.full((1, 1, 3, 4), 32), 0, [0], FormatError, r"\[32, 32\]"),
    "a negative code": (torch.full((1, 1, 3, 4), -1), 0, [0], FormatError, r"\[-1, -1\]"),
    "no integers": (torch.zeros(1, 1, 3, 4), 0, [0], FormatError, "float32"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_PROMPTS)
def test_a_prompt_that_is_none_is_refused_in_a_sentence(name):
    codes_Bthw, steps, seeds, error, match = BAD_PROMPTS[name]
    slots_BTA = torch.zeros(len(codes_Bthw), steps, 1, dtype=torch.int64)
    with pytest.raises(error, match=match):
        Rollout(make_model(), codes_Bthw, slots_BTA, seeds=seeds, sampling=GREEDY)


@pytest.mark.parametrize("bad", [5, 99, -2])
def test_an_action_that_is_none_is_refused_and_nothing_happens(bad):
    model = make_model()
    prompt_Bthw, slots_BTA = random_codes(model, 2), random_slots(model, 4)
    rollout, undisturbed = (
        Rollout(model, prompt_Bthw, slots_BTA[:, :1], seeds=[0, 1], sampling=SamplingConfig())
        for _ in range(2)
    )
    broken_BTA = slots_BTA[:, 1:2].clone()
    broken_BTA[1, 0, 0] = bad
    with pytest.raises(FormatError, match=rf"slot 0 of step 0 of world 1 is {bad}, must be in \[0"):
        rollout.step(broken_BTA)
    with pytest.raises(ShapeError, match="T is 2"):
        rollout.step(slots_BTA[:, 1:3])
    with pytest.raises(FormatError, match="prompt actions"):
        Rollout(model, prompt_Bthw, broken_BTA, seeds=[0, 1], sampling=GREEDY)
    with pytest.raises(FormatError, match="float32"):
        rollout.step(slots_BTA[:, 1:2].float())
    for step in (1, 2):
        now_BrA = slots_BTA[:, step : step + 1]
        assert torch.equal(rollout.step(now_BrA), undisturbed.step(now_BrA))


@pytest.mark.parametrize("steps", [1, 3, 5])
def test_actions_that_do_not_fill_whole_latent_frames_are_refused(steps):
    model = make_model(code_spec(frames_per_latent=2))
    slots_BTA = torch.zeros(2, steps, 1, dtype=torch.int64)
    with pytest.raises(ShapeError, match=f"{steps} steps, must be 2 for the prompt and then 2"):
        generate_codes(model, random_codes(model, 2), slots_BTA, seeds=[0, 1], sampling=GREEDY)
