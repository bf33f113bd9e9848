"""Promises of a play session: going back is exact, whatever was done in between."""

import io
import struct
import zlib
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pipelines.play.playing import (
    CONTEXT,
    GUIDED,
    KINDS,
    WARM,
    load_world,
    some_keys,
    some_start,
    write_world,
)
from worldloom.common import ConfigError, FormatError, MismatchError, WorldloomError
from worldloom.dynamics import NULL, SamplingConfig
from worldloom.pipelines.play.session import PlaySession
from worldloom.pipelines.world import World

COLD = SamplingConfig(temperature=0.6, top_k=7)
RASTER = replace(WARM, decoder="raster")


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    """One loaded world of every kind."""
    folder = tmp_path_factory.mktemp("worlds")
    return {kind: load_world(write_world(folder / kind, kind)) for kind in KINDS}


@pytest.fixture
def world(worlds):
    return worlds["plain"]


def begun(world, *, sampling=WARM, seed=3, memory_bytes=256 << 20):
    """A session of this world that has begun."""
    session = PlaySession(
        world,
        [some_start(world), some_start(world, seed=1, frames=CONTEXT + 2)],
        sampling=sampling,
        seed=seed,
        log=None,
        memory_bytes=memory_bytes,
    )
    session.reset()
    return session


def press(session, keys):
    """Codes and frames of pressing these, step after step."""
    shown = [session.step(slots_rA) for slots_rA in keys]
    return [one.codes_hw.tolist() for one in shown], [one.frames_THWC for one in shown]


def room_for(world, states):
    """Memory for so many states."""
    session = begun(world)
    return states * session._history.size_bytes + 1000


@pytest.mark.parametrize("sampling", [WARM, GUIDED], ids=["plain", "guided"])
def test_the_states_of_a_long_session_stay_within_their_memory(world, sampling):
    room = room_for(world, 4)
    session = begun(world, sampling=sampling, memory_bytes=room)
    for _ in range(4):
        press(session, some_keys(world, 60))
        assert session._history.size_bytes <= room
        held = [session._history.nearest(position)[1] for position in session._history.states]
        assert sum(state.world.size_bytes for state in held) <= room
        cache = held[0].world.rollout.cache
        assert held[0].world.size_bytes > cache.keys.nbytes + cache.values.nbytes
    assert len(session._history.states) > 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_session_gives_what_the_world_gives_code_for_code(worlds, kind):
    world = worlds[kind]
    keys = some_keys(world, 12)
    codes, frames = press(begun(world, seed=7), keys)
    point = some_start(world)
    world.sampling = WARM
    world.reset(point.start.codes_thw, point.start.slots_TA, seed=7)
    for slots_rA, mine, seen in zip(keys, codes, frames, strict=True):
        frames_THWC, codes_hw = world.step(slots_rA)
        assert codes_hw.tolist() == mine
        assert np.array_equal(frames_THWC, seen)
    assert len(frames[0]) == KINDS[kind].frames_per_latent


@pytest.mark.parametrize("states", [1, 3, 1000], ids=["no-room", "thinned", "all"])
@pytest.mark.parametrize("sampling", [WARM, GUIDED], ids=["plain", "guided"])
@pytest.mark.parametrize("kind", KINDS)
def test_after_going_back_the_same_keys_lead_to_the_same_codes_and_pixels(
    worlds, kind, sampling, states
):
    world = worlds[kind]
    session = begun(world, sampling=sampling, memory_bytes=room_for(world, states))
    keys = some_keys(world, 30)  # the window of 5 slides long before
    codes, frames = press(session, keys)
    for position in (29, 13, 16, 0, 4):
        shown = session.rewind(position)
        assert (shown.position, shown.codes_hw.tolist()) == (
            position,
            codes[position - 1] if position else some_start(world).start.codes_thw[-1].tolist(),
        )
        codes_again, frames_again = press(session, keys[position:])
        assert codes_again == codes[position:]
        assert all(map(np.array_equal, frames_again, frames[position:]))


def test_the_settings_of_then_come_back_with_the_position(world):
    session = begun(world)
    keys = some_keys(world, 32)
    codes = []
    for start, sampling in ((0, WARM), (8, GUIDED), (14, COLD), (20, RASTER), (26, GUIDED)):
        session.sampling = sampling
        codes += press(session, keys[start : start + 6 if start else 8])[0]
    session.sampling = replace(COLD, temperature=0.0)  # after all of it, and never used
    for position, sampling in ((27, GUIDED), (25, RASTER), (9, GUIDED), (8, GUIDED), (3, WARM)):
        session.rewind(position)
        assert session.sampling == sampling
        assert press(session, keys[position:])[0] == codes[position:]
    assert session.sampling == GUIDED


def test_changing_the_settings_in_the_past_is_a_branch_of_its_own(world):
    session = begun(world)
    keys = some_keys(world, 20)
    codes = press(session, keys)[0]
    session.rewind(10)
    session.sampling = GUIDED
    others = press(session, keys[10:])[0]
    assert others != codes[10:]
    assert session.sampling == GUIDED
    session.rewind(10)
    assert press(session, keys[10:])[0] == others  # the branch is the past now


def test_other_keys_are_a_branch_and_what_was_rewound_is_gone(world):
    session = begun(world)
    keys = some_keys(world, 24)
    codes = press(session, keys)[0]
    assert (session.rewind(10).length, session.length) == (24, 24)  # going back cuts nothing
    others = [(slots_rA + 2) % 3 for slots_rA in keys[10:16]]
    branch = press(session, others)[0]
    assert branch != codes[10:16]
    assert (session.position, session.length) == (16, 16)
    with pytest.raises(ConfigError, match="no position 17; there are 0 to 16"):
        session.rewind(17)
    session.rewind(5)
    assert press(session, keys[5:10] + others)[0] == codes[5:10] + branch
    session.rewind(9)
    assert press(session, keys[9:])[0] == codes[9:]  # and back to the first way


def test_a_step_from_the_past_is_the_end_until_more_is_done(world):
    session = begun(world)
    keys = some_keys(world, 12)
    press(session, keys)
    session.rewind(4)
    assert session.step(keys[4]).length == session.length == session.position == 5
    with pytest.raises(ConfigError, match="no position 6; there are 0 to 5"):
        session.rewind(6)


def test_going_forth_again_shows_what_was_there(world):
    session = begun(world)
    codes, frames = press(session, some_keys(world, 30))
    session.rewind(3)
    for position in (4, 11, 30, 30, 12, 8, 8):
        shown = session.rewind(position)
        assert (shown.position, shown.length) == (position, 30)
        assert shown.codes_hw.tolist() == codes[position - 1]
        assert np.array_equal(shown.frames_THWC, frames[position - 1])
        assert np.array_equal(session.shown.frames_THWC, frames[position - 1])


def learned(session):
    """What the decoder has learned of how to be fast: it may change the last bits of a forward."""
    return session.world._rollout._decoder._settled


def test_settings_that_were_only_tried_leave_no_trace(world):
    keys = some_keys(world, 20)
    calm = begun(world)
    wanted = [(press(calm, [slots_rA])[0], learned(calm)) for slots_rA in keys]
    session = begun(world)
    for slots_rA, (codes, has_learned) in zip(keys, wanted, strict=True):
        session.sampling = RASTER
        session.sampling = WARM
        assert press(session, [slots_rA])[0] == codes
        assert learned(session) == has_learned


def test_going_back_brings_back_what_the_decoder_had_learned(world):
    session, keys = begun(world), some_keys(world, 20)
    wanted = [(press(session, [slots_rA])[0], learned(session)) for slots_rA in keys]
    session.sampling = RASTER
    press(session, keys[:3])
    for position in (17, 9, 8, 3):
        session.rewind(position)
        for slots_rA, (codes, has_learned) in list(zip(keys, wanted, strict=True))[position:]:
            assert press(session, [slots_rA])[0] == codes
            assert learned(session) == has_learned
        session.step(keys[0])
        session.sampling = RASTER
        press(session, keys[:2])


def test_the_model_plays_the_same_again_after_going_back(worlds):
    for world in worlds.values():
        session = begun(world)
        codes = [session.step(session.act()).codes_hw.tolist() for _ in range(12)]
        session.rewind(4)
        assert [session.step(session.act()).codes_hw.tolist() for _ in range(8)] == codes[4:]
        assert session.can_act


def test_the_seed_and_the_start_decide_and_stay_until_others_are_given(world):
    session = begun(world, seed=3)
    keys = some_keys(world, 10)
    first = press(session, keys)[0]
    assert session.reset().position == 0
    assert press(session, keys)[0] == first
    session.reset(seed=4)
    second = press(session, keys)[0]
    assert second != first
    session.reset()
    assert (session.seed, press(session, keys)[0]) == (4, second)
    session.reset(start=1, seed=3)
    assert press(session, keys)[0] != first
    session.reset()
    assert session.point is session.starts[1]
    session.reset(start=0)
    assert press(session, keys)[0] == first


def test_shown_says_what_was_done_and_what_it_took(worlds):
    session = begun(worlds["video"])
    reset = session.shown
    assert (reset.position, reset.length, reset.action, reset.forwards) == (0, 0, "", 0)
    assert reset.context_frames == 2
    slots_rA = np.array([[1, 3], [NULL, NULL]])
    shown = session.step(slots_rA)
    assert shown.action == "up+left, null"
    assert shown.forwards >= 1
    assert shown.model_ms > 0
    assert shown.context_frames == 3
    assert press(session, some_keys(worlds["video"], 6))[0]
    assert session.shown.context_frames == CONTEXT


@pytest.mark.parametrize(
    ("kind", "slots", "problem"),
    [
        ("plain", [[3]], "must be in"),
        ("plain", [[-2]], "must be in"),
        ("plain", [[0, 0]], "shape"),
        ("plain", [[0], [0]], "shape"),
        ("plain", [[0.5]], "integers"),
        ("plain", [["LEFT"]], "integers"),
        ("video", [[2, 1], [0, 0]], "rising"),
        ("frame", [[NULL, 0]], "a part of an action"),
    ],
)
def test_an_action_that_is_none_is_refused_and_nothing_happens(worlds, kind, slots, problem):
    world = worlds[kind]
    session, keys = begun(world), some_keys(world, 8)
    codes = press(session, keys)[0]
    session.reset()
    press(session, keys[:4])
    with pytest.raises(FormatError, match=problem):
        session.step(np.array(slots))
    assert session.position == 4
    assert press(session, keys[4:])[0] == codes[4:]


@pytest.mark.parametrize(
    "ask",
    [
        lambda session: session.reset(start=2),
        lambda session: session.reset(start=-1),
        lambda session: session.reset(seed=-1),
        lambda session: session.reset(seed=1 << 63),
        lambda session: session.reset(start=0, picture=b"x"),
        lambda session: session.reset(picture=b"x"),
        lambda session: session.rewind(-1),
        lambda session: session.rewind(9),
        lambda session: setattr(session, "sampling", replace(WARM, decoder="maskgit")),
        lambda session: session.act(temperature=-1.0),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence_and_play_goes_on(world, ask):
    session, keys = begun(world), some_keys(world, 8)
    codes = press(session, keys)[0]
    session.rewind(4)
    with pytest.raises(WorldloomError, match=r"\w+.*: .*; |must be|no action"):
        ask(session)
    assert press(session, keys[4:])[0] == codes[4:]


def test_before_the_first_reset_there_is_nothing_to_do(world):
    session = PlaySession(world, [], sampling=WARM, seed=0, log=None)
    for ask in (lambda: session.position, lambda: session.rewind(0), session.act):
        with pytest.raises(ValueError, match="before its first reset"):
            ask()
    with pytest.raises(ConfigError, match="there is no start 0; there are 0"):
        session.reset()
    session.reset(picture=picture((16, 16)))
    assert session.step(some_keys(world, 1)[0]).position == 1


# Pictures, of strangers.


def picture(size, *, form="PNG", mode="RGB", **options):
    """The bytes of a picture, half of it light."""
    image = Image.new(mode, size)
    image.paste(
        255 if mode in ("L", "1", "P") else (255,) * len(mode), (0, 0, size[0] // 2, size[1])
    )
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
@pytest.mark.parametrize("size", [(16, 16), (33, 70), (400, 1)])
def test_a_picture_of_any_size_and_kind_is_a_start(world, form, size):
    session = begun(world)
    shown = session.reset(picture=picture(size, form=form))
    assert shown.frames_THWC.shape == (1, 16, 16, 3)
    assert (shown.position, session.point.label) == (0, "a picture")
    keys = some_keys(world, 10)
    codes = press(session, keys)[0]
    session.rewind(3)
    assert press(session, keys[3:])[0] == codes[3:]
    session.reset()  # from the same picture again
    assert press(session, keys)[0] == codes


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "LA", "CMYK"])
def test_a_picture_of_any_colours_is_a_start(world, mode):
    form = "JPEG" if mode == "CMYK" else "PNG"
    assert begun(world).reset(picture=picture((20, 20), mode=mode, form=form)).position == 0


def test_a_photograph_stands_as_its_camera_was_held(world):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    turned = begun(world).reset(picture=picture((16, 16), exif=exif))
    plain = begun(world).reset(picture=picture((16, 16)))
    assert not np.array_equal(turned.codes_hw, plain.codes_hw)


def png_claiming(width, height):
    """A PNG of a few bytes whose header claims any size."""

    def part(name, content):
        crc = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + crc

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = part(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", head) + body + part(b"IEND", b"")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "not readable as PNG, JPEG"),
        (b"GIF89a", "not readable"),
        (b"\x89PNG\r\n\x1a\n" + b"x" * 100, "not readable"),
        (b"%PDF-1.4 ...", "not readable"),
        (bytes((8 << 20) + 1), "must be at most 8388608"),
        (png_claiming(1 << 13, 1 << 13), "8192x8192 pixels"),
        (png_claiming(1 << 14, 1 << 14), "268435456|16384x16384 pixels"),
        (png_claiming((1 << 31) - 1, (1 << 31) - 1), "pixels"),
        (png_claiming(0, 5), "not readable"),
        (picture((64, 64))[:-40], "not readable"),
    ],
)  # fmt: skip
def test_what_is_no_picture_or_claims_too_much_is_refused_before_it_is_unpacked(
    world, content, problem
):
    session, keys = begun(world), some_keys(world, 3)
    with pytest.raises(FormatError, match=problem):
        session.reset(picture=content)
    assert session.point is session.starts[0]
    press(session, keys)


def test_a_tokenizer_that_takes_one_size_refuses_a_picture_of_another(worlds, tmp_path, request):
    from chain_worlds import save_tokenizer
    from worldloom.dynamics import DynamicsModel, DynamicsSpec
    from worldloom.pipelines.world import World
    from worldloom.tokenizer import ConvTokenizer

    tokenizer = ConvTokenizer.from_pretrained(save_tokenizer(tmp_path / "t", resize="exact"))
    mine = worlds["plain"].model
    spec = DynamicsSpec(tokenizer=tokenizer.spec, actions=mine.spec.actions, fps=8.0, frame_skip=1)
    model = DynamicsModel(mine.config, spec, tokenizer.codebook.numpy(), seed=0).eval()
    session = PlaySession(
        World(model, tokenizer, sampling=WARM), [], sampling=WARM, seed=0, log=None
    )
    with pytest.raises(MismatchError, match="30x20"):
        session.reset(picture=picture((20, 30)))
    assert session.reset(picture=picture((16, 16))).position == 0


@settings(max_examples=300, deadline=None, derandomize=True)
@given(data=st.data())
def test_no_bytes_bring_a_session_down(worlds, data):
    good = picture((16, 16), form=data.draw(st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "BMP"])))
    content = bytearray(good)
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(content)))
    session = PlaySession(worlds["plain"], [], sampling=WARM, seed=0, log=None)
    try:
        session.reset(picture=bytes(content[:cut] if data.draw(st.booleans()) else content))
    except WorldloomError:
        return
    assert session.position == 0


# What runs beside.


class Counting:
    """A companion whose frames say how many steps it has done since its start."""

    name = "truth"

    def __init__(self, *, end=100, breaks_at=None, refuses=False):
        self.end, self.breaks_at, self.refuses = end, breaks_at, refuses
        self.done = None
        self.closed = 0

    def seen(self, count):
        return np.full((count, 2, 2, 3), self.done, np.uint8)

    def reset(self, start):
        if self.refuses:
            raise ConfigError("truth: nobody knows what followed a picture; choose another start")
        self.done = 0
        return self.seen(3)

    def step(self, slots_rA):
        if self.done == self.breaks_at:
            raise ConfigError("game: its window was closed; compare with it again")
        if self.done >= self.end:
            return None
        self.done += 1
        return self.seen(len(slots_rA))

    def close(self):
        self.closed += 1


def beside(shown):
    return None if shown.companion_THWC is None else int(shown.companion_THWC[0, 0, 0, 0])


def test_a_companion_is_wherever_the_session_is(worlds):
    world = worlds["video"]
    session, companion, keys = begun(world), Counting(), some_keys(world, 30)
    assert beside(session.shown) is None
    press(session, keys[:10])
    session.compare(companion)
    assert beside(session.shown) == 10
    assert beside(session.step(keys[10])) == 11
    assert session.shown.companion_THWC.shape == (2, 2, 2, 3)
    assert beside(session.rewind(4)) == 4
    assert beside(session.step(keys[11])) == 5
    assert (beside(session.rewind(0)), len(session.shown.companion_THWC)) == (0, 1)
    assert beside(session.reset(start=1)) == 0
    assert beside(session.step(keys[0])) == 1
    session.compare(None)
    assert (companion.closed, beside(session.shown), beside(session.step(keys[1]))) == (
        1,
        None,
        None,
    )


def test_a_companion_changes_nothing_of_the_world(world):
    keys = some_keys(world, 12)
    alone = press(begun(world), keys)[0]
    session = begun(world)
    session.compare(Counting(end=5))
    assert press(session, keys)[0] == alone
    assert beside(session.shown) is None  # it has ended
    assert beside(session.rewind(5)) == 5


def test_a_companion_that_fails_is_let_go_and_the_session_is_as_it_was(world):
    keys = some_keys(world, 12)
    alone = press(begun(world), keys)[0]
    session, companion = begun(world), Counting(breaks_at=6)
    session.compare(companion)
    press(session, keys[:6])
    with pytest.raises(ConfigError, match="its window was closed"):
        session.step(keys[6])
    assert (session.position, companion.closed) == (6, 1)
    assert press(session, keys[6:])[0] == alone[6:]
    refusing = Counting(refuses=True)
    with pytest.raises(ConfigError, match="nobody knows"):
        session.compare(refusing)
    assert (refusing.closed, session.shown.companion_THWC) == (1, None)
    late = Counting()
    session.compare(late)
    late.refuses = True
    with pytest.raises(ConfigError, match="nobody knows"):
        session.reset(start=1)
    assert (session.position, session.point) == (12, session.starts[0])
    assert session.reset(start=1).position == 0


def test_a_step_that_fails_half_way_is_as_if_it_had_not_been(world, monkeypatch):
    keys = some_keys(world, 12)
    codes, frames = press(begun(world), keys)
    session = begun(world)
    press(session, keys[:5])

    def fails(*_):
        raise MemoryError("while decoding")

    for heal in (lambda: None, lambda: session.rewind(5), lambda: session.rewind(3)):
        with monkeypatch.context() as patched:
            patched.setattr(type(world._decoder), "push", fails)
            with pytest.raises(MemoryError):
                session.step(keys[5])
        heal()
        position = session.position
        codes_again, frames_again = press(session, keys[position:])
        assert codes_again == codes[position:]
        assert all(map(np.array_equal, frames_again, frames[position:]))
        session.rewind(5)


@pytest.mark.parametrize("fails_at", ["open_decoder", "snapshot"])
def test_a_reset_that_fails_half_way_is_as_if_it_had_not_been(world, monkeypatch, fails_at):
    keys = some_keys(world, 12)
    codes = press(begun(world), keys)[0]
    session = begun(world)
    press(session, keys[:5])

    def fails(*_):
        raise MemoryError

    for heal in (lambda: None, lambda: session.rewind(5), lambda: session.rewind(3)):
        with monkeypatch.context() as patched:
            of = type(world.tokenizer) if fails_at == "open_decoder" else type(world)
            patched.setattr(of, fails_at, fails)
            with pytest.raises(MemoryError):
                session.reset(start=1, seed=8)
        heal()
        assert (session.point, session.seed) == (session.starts[0], 3)
        position = session.position
        assert press(session, keys[position:])[0] == codes[position:]
        session.rewind(5)
    assert session.reset(start=1).position == 0


def test_when_the_world_fails_what_moved_beside_it_is_let_go(world, monkeypatch):
    keys = some_keys(world, 3)

    def fails(*_, **__):
        raise MemoryError

    for fail in (lambda session: session.step(keys[1]), lambda session: session.reset(start=1)):
        session, companion = begun(world), Counting()
        session.compare(companion)
        press(session, keys[:1])
        for ask in (lambda one: one.reset(start=99), lambda one: one.rewind(99)):
            with pytest.raises(ConfigError):
                ask(session)
        assert session.compared
        with monkeypatch.context() as patched:
            patched.setattr(type(world), "step", fails)
            patched.setattr(type(world), "reset", fails)
            with pytest.raises(MemoryError):
                fail(session)
        assert (session.compared, companion.closed) == (False, 1)


def test_settings_that_are_not_for_this_model_are_refused_before_anything_begins(world):
    with pytest.raises(ConfigError, match="decoder is maskgit"):
        World(world.model, world.tokenizer, sampling=replace(WARM, decoder="maskgit"))
    session = PlaySession(world, [some_start(world)], sampling=WARM, seed=0, log=None)
    with pytest.raises(ConfigError, match="decoder is maskgit"):
        session.sampling = replace(WARM, decoder="maskgit")
    assert session.sampling == WARM


def test_closing_a_session_closes_what_runs_beside(world):
    session, first, second = begun(world), Counting(), Counting()
    session.compare(first)
    session.compare(second)
    assert (first.closed, second.closed) == (1, 0)
    session.close()
    assert second.closed == 1
