"""Promises of rollout.py and kv_cache.py: cached equals uncached, for ever; it can be branched."""

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from dynamics.toys import (
    ACTIONS,
    cached_logits_BfSQV,
    code_spec,
    make_model,
    random_codes,
    random_slots,
)
from torch.utils._python_dispatch import TorchDispatchMode
from worldloom.common import ConfigError, FormatError, ShapeError
from worldloom.dynamics import NULL, Rollout, SamplingConfig, generate_codes

ORDERS = ("raster", "row", "frame", "masked")
GREEDY = SamplingConfig(temperature=0.0, refinements=1)


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
    logits_BfNV = model(generated_Bthw, slots_BTA).reshape(2, 9, 12 * num_levels, -1)
    assert generated_Bthw.shape == (2, *model.spec.tokenizer.codes.codes_shape(10))
    taken_BfN1 = generated_Bthw[:, 1:].flatten(2)[..., None]
    short_BfN = logits_BfNV.amax(-1) - logits_BfNV.gather(-1, taken_BfN1)[..., 0]
    # Where two codes' logits are nearer than that, either may be found likeliest.
    assert (short_BfN[:, prompt_frames - 1 :] < 1e-5).all()


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


def test_changing_the_prompts_memory_changes_no_later_frame():
    model = make_model()
    slots_BTA = random_slots(model, 4)
    frames = []
    for harm in (1, 0):
        prompt_Bthw = random_codes(model, 3)
        rollout = Rollout(model, prompt_Bthw, slots_BTA[:, :2], seeds=[0, 1], sampling=GREEDY)
        prompt_Bthw.mul_(harm)
        frames.append(rollout.step(slots_BTA[:, 2:3]))
    assert torch.equal(*frames)


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


@pytest.mark.parametrize(
    ("order", "guidance_scale"), [("row", 1.0), ("frame", 1.0), ("frame", 2.0)]
)
def test_frame_2000_costs_what_frame_50_costs_and_has_no_nan(order, guidance_scale):
    model = make_model(code_spec(height=2, width=2), num_layers=1, dim=8, num_heads=1, order=order)
    rollout = Rollout(
        model,
        random_codes(model, 1, batch=1),
        random_slots(model, 1, batch=1),
        seeds=[0],
        # jacobi's cost depends on what it guesses, frame by frame.
        sampling=SamplingConfig(guidance_scale=guidance_scale, decoder="raster"),
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
        if rollout.frame >= model.config.context_frames:
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


def test_how_codes_are_drawn_may_change_between_any_two_frames():
    """A frame depends on its own settings, not on those before; guidance, on since when it is."""
    model = make_model(order="row")
    slots_BTA = random_slots(model, 12)
    ways = [
        SamplingConfig(temperature=0.0, decoder="raster"),
        SamplingConfig(temperature=1.0, top_p=0.7, guidance_scale=3.0),
        SamplingConfig(temperature=1.5, min_p=0.0, top_k=3, decoder="auto"),
        SamplingConfig(temperature=0.7, guidance_scale=0.5, parallel_keep_frac=0.3),
        SamplingConfig(temperature=1.2, min_p=0.3, decoder="jacobi"),
    ]
    rollout = Rollout(
        model, random_codes(model, 1), slots_BTA[:, :0], seeds=[0, 1], sampling=ways[0]
    )
    codes_Bthw = random_codes(model, 1)
    seen = set()
    for step in range(11):
        rollout.sampling = ways[step % len(ways)]
        now_BrA = slots_BTA[:, step : step + 1]
        before = rollout.snapshot()
        made_Bhw = rollout.step(now_BrA)
        # The same frame by a rollout that knew no other settings.
        other = Rollout(
            model, codes_Bthw, slots_BTA[:, :step], seeds=[0, 1], sampling=rollout.sampling
        )
        assert torch.equal(other.step(now_BrA), made_Bhw)
        rollout.restore(before)
        rollout.sampling = ways[(step + 1) % len(ways)]
        seen.add(torch.equal(rollout.step(now_BrA), made_Bhw))
        rollout.sampling = ways[step % len(ways)]
        rollout.restore(before)
        assert torch.equal(rollout.step(now_BrA), made_Bhw)
        codes_Bthw = torch.cat([codes_Bthw, made_Bhw[:, None]], dim=1)
    assert False in seen


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_a_fork_has_as_many_futures_of_every_world_as_asked_each_with_its_seed(
    order, guidance_scale
):
    model = make_model(code_spec(num_levels=2), order=order)
    slots_BTA = random_slots(model, 10, batch=2)
    sampling = SamplingConfig(temperature=1.0, min_p=0.0, guidance_scale=guidance_scale)
    rollout = Rollout(
        model, random_codes(model, 2), slots_BTA[:, :1], seeds=[3, 4], sampling=sampling
    )
    for step in range(1, 5):
        rollout.step(slots_BTA[:, step : step + 1])
    start = rollout.snapshot()
    forked = rollout.fork(3, seeds=[3, 30, 31, 40, 4, 41])
    assert forked.batch == 6
    many = torch.stack(
        [forked.step(slots_BTA[:, s : s + 1].repeat_interleave(3, 0)) for s in range(5, 9)], dim=1
    )
    assert rollout.frame == 6  # the fork's steps are its own
    alone = torch.stack([rollout.step(slots_BTA[:, s : s + 1]) for s in range(5, 9)], dim=1)
    assert torch.equal(many[[0, 4]], alone)
    assert len(torch.unique(many.flatten(1), dim=0)) == 6
    rollout.restore(start)
    assert torch.equal(rollout.step(slots_BTA[:, 5:6]), alone[:, 0])


def test_a_fork_without_copies_or_with_too_few_seeds_is_refused():
    model = make_model()
    rollout = Rollout(
        model, random_codes(model, 1), random_slots(model, 1), seeds=[0, 1], sampling=GREEDY
    )
    with pytest.raises(ShapeError, match="0 copies"):
        rollout.fork(0, seeds=[])
    with pytest.raises(ShapeError, match="seeds: 2 for 6 worlds"):
        rollout.fork(3, seeds=[0, 1])


def test_a_snapshot_of_other_worlds_is_refused_and_nothing_happens():
    model = make_model()
    slots_BTA = random_slots(model, 3)

    def rollout(model, batch):
        prompt_Bthw = random_codes(model, 1, batch=batch)
        slots = random_slots(model, 1, batch=batch)
        return Rollout(model, prompt_Bthw, slots, seeds=range(batch), sampling=GREEDY)

    own, undisturbed = rollout(model, 2), rollout(model, 2)
    with pytest.raises(ShapeError, match="a snapshot of 3 worlds"):
        own.restore(rollout(model, 3).snapshot())
    with pytest.raises(ShapeError, match="of this model"):
        own.restore(rollout(make_model(context_frames=5), 2).snapshot())
    assert torch.equal(own.step(slots_BTA[:, :1]), undisturbed.step(slots_BTA[:, :1]))


@pytest.mark.parametrize(
    ("order", "decoder"),
    [
        *((order, decoder) for order in ORDERS[:3] for decoder in ("raster", "jacobi")),
        ("masked", "maskgit"),
    ],
)
@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_the_action_head_is_asked_about_the_last_frame_as_training_asks_it(
    order, guidance_scale, decoder
):
    model = make_model(order=order, action_head=True)
    prompt_Bthw, slots_BTA = random_codes(model, 1), random_slots(model, 9)
    sampling = SamplingConfig(guidance_scale=guidance_scale, decoder=decoder)
    rollout = Rollout(model, prompt_Bthw, slots_BTA[:, :0], seeds=[5, 6], sampling=sampling)
    codes_Bthw, chosen = prompt_Bthw, []
    for step in range(8):
        chosen.append(rollout.act(temperature=0.0))
        assert torch.equal(rollout.act(temperature=0.0), chosen[-1])
        made_Bhw = rollout.step(slots_BTA[:, step : step + 1])
        codes_Bthw = torch.cat([codes_Bthw, made_Bhw[:, None]], dim=1)
    tokens_BfSD = model.tokens(codes_Bthw, slots_BTA)
    logits_BfLX = model.action_head(
        tokens_BfSD, codes_Bthw.flatten(2)[..., None], slots_BTA[:, :, None]
    )
    likeliest_Bf = logits_BfLX[:, :, 0].argmax(-1)
    assert torch.equal(torch.cat(chosen, dim=1)[..., 0], likeliest_Bf)
    assert len(likeliest_Bf.unique()) > 1
    drawn_BrA = model.action_head.sample(
        tokens_BfSD[:, -1], codes_Bthw[:, -1].flatten(1)[..., None],
        seeds_B=torch.tensor([5, 6]), frame=8, temperature=5.0,
    )  # fmt: skip
    assert torch.equal(rollout.act(temperature=5.0), drawn_BrA)


def test_a_model_without_an_action_head_says_so():
    model = make_model()
    rollout = Rollout(
        model, random_codes(model, 1), random_slots(model, 1), seeds=[0, 1], sampling=GREEDY
    )
    with pytest.raises(ConfigError, match="no action head"):
        rollout.act()
    acting = make_model(action_head=True)
    rollout = Rollout(
        acting, random_codes(acting, 1), random_slots(acting, 1), seeds=[0, 1], sampling=GREEDY
    )
    with pytest.raises(ConfigError, match="temperature is -1"):
        rollout.act(temperature=-1.0)
