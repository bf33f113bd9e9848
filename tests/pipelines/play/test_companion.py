"""Promises of what runs beside a world: the real game is the real game, step for step."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, replace

import numpy as np
import pytest
import worlds
from chain_worlds import save_tokenizer
from pipelines.play.playing import WARM, write_world
from worldloom.common import ActionSpec, ConfigError, Episodes, MismatchError, WorldloomError
from worldloom.dynamics import NULL, DynamicsConfig, DynamicsModel, DynamicsSpec
from worldloom.pipelines.environments import GameConfig, open_game
from worldloom.pipelines.play.companion import Truth, open_companions
from worldloom.pipelines.play.session import PlaySession
from worldloom.pipelines.play.start_points import moments, picture_start
from worldloom.pipelines.play.worlds import WorldFiles
from worldloom.pipelines.record import RecordConfig, record
from worldloom.pipelines.world import World
from worldloom.tokenizer import ConvTokenizer

LENGTH = 40
GAME = "worlds:LastAction-v0"


@dataclass(frozen=True)
class Played:
    """A world of a recorded game."""

    files: WorldFiles
    world: World

    def starts(self, count=4):
        return moments(self.files.starts, self.world, count=count)

    def open(self, name):
        return open_companions(self.files, self.world)[name]()

    def beginning(self):
        """A start at the beginning of its episode."""
        return min(self.starts(), key=lambda start: start.moment.start_frame)

    def later(self):
        """A start that is not the beginning of its episode."""
        return max(self.starts(), key=lambda start: start.moment.start_frame)


def game_world(folder, *, stride=1, env=GAME, **settings):
    """Record a game, and give its actions to a model of random weights."""
    settings = {"height": 16, "width": 16, "num_episodes": 2, **settings}
    episodes = record(RecordConfig(env=env, output=folder / "episodes", **settings))
    if stride == 1:
        tokenizer = ConvTokenizer.from_pretrained(save_tokenizer(folder / "tokenizer"))
    else:
        write_world(folder / "strided", "video")
        tokenizer = ConvTokenizer.from_pretrained(folder / "strided" / "tokenizer" / "model")
    actions = Episodes(episodes).spec.actions
    model = DynamicsModel(
        DynamicsConfig(num_layers=1, dim=16, num_heads=1, context_frames=3, num_meta_tokens=1),
        DynamicsSpec(tokenizer=tokenizer.spec, actions=actions, fps=20.0, frame_skip=1),
        tokenizer.codebook.numpy(),
        seed=1,
    ).eval()
    files = WorldFiles("toy", folder / "model", "toy", episodes, episodes)
    return Played(files, World(model, tokenizer, sampling=WARM))


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    """A world of the game that shows its last action, its step and its seed."""
    folder = tmp_path_factory.mktemp("played")
    kwargs = f"length={LENGTH}"
    return game_world(folder, env_kwargs=kwargs)


@pytest.fixture(scope="module")
def game(played):
    """The game beside it, opened once: it starts a process."""
    companion = played.open("game")
    yield companion
    companion.close()


def alone(start, played, slots_TA, *, frame_skip=1):
    """Frames of the same game, opened here: after the recorded actions, then after these."""
    with Episodes(played.files.episodes).open(start.moment.episode) as episode:
        codes = played.world.tokenizer.spec.codes
        frame = start.moment.start_frame + codes.pixel_frames(start.moment.prompt_frames) - 1
        recorded, seed = episode.actions[:frame], episode.metadata["seed"]
    game = open_game(GameConfig(env=GAME, env_kwargs={"length": LENGTH}, frame_skip=frame_skip))
    moment = game.reset(seed=seed)
    for raw in recorded:
        moment = game.step(raw)
    frames = [moment.frame_HWC]
    frames += [game.step(raw).frame_HWC for raw in played.world.model.spec.actions.decode(slots_TA)]
    game.close()
    return np.stack(frames)


def test_the_game_begins_where_the_world_does_and_does_what_the_player_does(played, game):
    rng = np.random.default_rng(0)
    for start in played.starts():
        slots_TA = rng.integers(0, 4, (5, 1))
        frames = [game.reset(start), *(game.step(slots_A[None]) for slots_A in slots_TA)]
        assert np.array_equal(np.concatenate(frames), alone(start, played, slots_TA))
    assert len({start.moment.start_frame for start in played.starts()}) > 1


def test_under_the_true_actions_the_game_is_the_truth_to_the_last_frame(played, game):
    truth = played.open("truth")
    for start in played.starts():
        assert np.array_equal(game.reset(start), truth.reset(start))
        followed = start.read_truth(played.world).true_slots_TA
        assert len(followed) > 0
        for slots_A in followed:
            assert np.array_equal(game.step(slots_A[None]), truth.step(slots_A[None]))
        for _ in range(2):
            assert game.step(np.array([[0]])) is None
            assert truth.step(np.array([[0]])) is None
    truth.close()


def test_going_back_beside_the_truth_reads_nothing_again(played, monkeypatch):
    truth, start = played.open("truth"), played.later()
    first = truth.reset(start)
    monkeypatch.setattr(type(start), "read_truth", None)
    truth.step(np.array([[0]]))
    assert np.array_equal(truth.reset(start), first)
    truth.close()


def test_the_truth_does_not_care_what_is_pressed(played):
    truth, start = played.open("truth"), played.later()
    shown = []
    for pressed in (0, 3):
        truth.reset(start)
        shown.append(truth.step(np.array([[pressed]])))
    assert np.array_equal(*shown)


def test_the_game_waits_where_no_action_is_given(played, game):
    before = game.reset(played.later())
    assert np.array_equal(game.step(np.array([[NULL]])), before)
    after = game.step(np.array([[2]]))
    assert worlds.shown_step(after[0]) == worlds.shown_step(before[0]) + 1


def test_where_a_latent_frame_covers_several_all_their_actions_are_done(tmp_path):
    played = game_world(tmp_path, stride=2, env_kwargs=f"length={LENGTH}")
    start, game = played.starts(1)[0], played.open("game")
    first = game.reset(start)
    at = worlds.shown_step(first[0])
    shown = game.step(np.array([[1], [3]]))
    assert [worlds.shown_action(frame) for frame in shown] == [1, 3]
    assert [worlds.shown_step(frame) for frame in shown] == [at + 1, at + 2]
    waited = game.step(np.array([[NULL], [2]]))
    assert np.array_equal(waited[0], shown[1])
    assert worlds.shown_action(waited[1]) == 2
    left = LENGTH - at - 3
    assert left % 2 == 1  # it ends in the middle of a latent frame
    for _ in range(left // 2):
        assert len(game.step(np.array([[0], [0]]))) == 2
    last = game.step(np.array([[1], [2]]))
    assert [worlds.shown_action(frame) for frame in last] == [1, 1]
    assert game.step(np.array([[0], [0]])) is None
    game.close()


def test_a_blank_end_of_the_game_is_not_shown(tmp_path):
    played = game_world(tmp_path, env_kwargs=f"length={LENGTH}, blank_end=true")
    game, start = played.open("game"), played.starts(1)[0]
    at = worlds.shown_step(game.reset(start)[0])
    for _ in range(at, LENGTH - 1):
        assert game.step(np.array([[1]])).any()
    assert game.step(np.array([[1]])) is None
    game.close()


def test_beside_a_session_the_game_follows_every_step_and_every_rewind(played):
    session = PlaySession(played.world, played.starts(2), sampling=WARM, seed=0, log=None)
    session.reset(start=1)
    rng = np.random.default_rng(5)
    slots_TA = rng.integers(0, 4, (6, 1))
    session.step(slots_TA[:1])
    session.step(slots_TA[1:2])
    session.compare(played.open("game"))  # in the middle: it catches up
    shown = [session.shown.companion_THWC]
    shown += [session.step(slots_A[None]).companion_THWC for slots_A in slots_TA[2:]]
    expected = alone(played.starts(2)[1], played, slots_TA)
    assert np.array_equal(np.concatenate(shown), expected[2:])
    assert np.array_equal(session.rewind(3).companion_THWC[-1], expected[3])
    branch = session.step(np.array([[(slots_TA[3, 0] + 1) % 4]])).companion_THWC
    assert worlds.shown_action(branch[0]) == (slots_TA[3, 0] + 1) % 4
    session.close()


def test_neither_begins_in_a_picture(played, game):
    from io import BytesIO

    from PIL import Image

    file = BytesIO()
    Image.new("RGB", (16, 16)).save(file, "PNG")
    start = picture_start(file.getvalue(), played.world)
    with pytest.raises(ConfigError, match="no game can be brought into it"):
        game.reset(start)
    with pytest.raises(ConfigError, match="nobody knows what followed"):
        Truth(played.world).reset(start)


def edited(played, tmp_path, **changes):
    """The same world with another episodes.json; `source` is merged."""
    copy = tmp_path / "episodes"
    copy.mkdir()
    for path in played.files.episodes.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    about = json.loads((copy / "episodes.json").read_text())
    about["source"] |= changes.pop("source", {})
    (copy / "episodes.json").write_text(json.dumps(about | changes))
    return replace(played, files=replace(played.files, episodes=copy))


def test_a_game_that_shows_another_frame_at_the_start_is_refused_naming_the_versions(
    played, tmp_path
):
    other = edited(played, tmp_path, frame_skip=2, source={"packages": {"toy": "0.1"}})
    game = other.open("game")
    with pytest.raises(MismatchError, match=r"recorded in episode-\d+, the game shows another "
                       r"frame.*recorded with toy 0\.1, and here is gymnasium"):  # fmt: skip
        game.reset(played.beginning())
    assert game.step(np.array([[0]])) is None
    game.close()


def test_a_game_that_is_over_before_the_start_is_refused(played, tmp_path):
    game = edited(played, tmp_path, source={"env_kwargs": {"length": 2}}).open("game")
    with pytest.raises(MismatchError, match="the game is over"):
        game.reset(played.later())
    game.close()


def test_recordings_that_are_not_those_of_the_start_are_refused(played, game, tmp_path):
    start = played.later()
    other = replace(start.start, slots_TA=(start.start.slots_TA + 1) % 4)
    with pytest.raises(MismatchError, match="is not the recording in which"):
        game.reset(replace(start, start=other))
    with pytest.raises(MismatchError, match="has no episode elsewhere"):
        game.reset(replace(start, moment=replace(start.moment, episode="elsewhere")))


def test_a_game_that_is_not_installed_is_not_offered_and_it_is_said_why(played, tmp_path, capsys):
    other = edited(played, tmp_path, source={"env": "NoSuchGame-v0"})
    assert list(open_companions(other.files, other.world)) == ["truth"]
    assert "NoSuchGame-v0: no environment of this id is known" in capsys.readouterr().err


def test_a_file_does_not_choose_what_is_imported(played, tmp_path, monkeypatch, capsys):
    (tmp_path / "sly_game.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    other = edited(played, tmp_path, source={"env": "sly_game:Sly-v0"})
    assert list(open_companions(other.files, other.world)) == ["truth"]
    assert "a file does not get to import the module sly_game" in capsys.readouterr().err
    assert "sly_game" not in sys.modules


@pytest.mark.parametrize("changes", [{"kind": "vpt"}, {"env": 3}, {"resize": "twice"}])
def test_recordings_of_no_game_or_with_a_damaged_description_offer_the_truth_alone(
    played, tmp_path, changes
):
    other = edited(played, tmp_path, source=changes)
    assert list(open_companions(other.files, other.world)) == ["truth"]


def test_a_game_with_other_actions_than_the_models_is_not_offered(played, tmp_path):
    actions = ActionSpec.discrete(["a", "b", "c", "d"]).to_dict()
    other = edited(played, tmp_path, actions=actions)
    assert "game" not in open_companions(other.files, played.world)


def test_without_recordings_nothing_is_offered(played):
    files = replace(played.files, starts=None, episodes=None)
    assert open_companions(files, played.world) == {}


def test_a_game_that_dies_is_said_to_have_died_and_leaves_no_process(played):
    others = set(multiprocessing.active_children())
    game, start = played.open("game"), played.later()
    game.reset(start)
    (child,) = set(multiprocessing.active_children()) - others
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    with pytest.raises(WorldloomError, match="process ended by itself; switch it off and on again"):
        game.step(np.array([[0]]))
    game.close()
    game.close()
    assert not child.is_alive()
    with pytest.raises(ConfigError, match="was closed"):
        game.reset(start)


def test_a_game_that_fails_says_what_it_was_doing(played, tmp_path):
    kwargs = {"length": LENGTH, "fail_at": 8}
    game = edited(played, tmp_path, source={"env_kwargs": kwargs}).open("game")
    for _ in range(worlds.shown_step(game.reset(played.beginning())[0]), 8):
        game.step(np.array([[0]]))
    with pytest.raises(WorldloomError, match=r"step with action 0 failed.*the floor gave way"):
        game.step(np.array([[0]]))
    game.close()


@pytest.mark.slow
def test_vizdoom_beside_a_world_is_the_recorded_game_frame_for_frame(tmp_path):
    pytest.importorskip("vizdoom", reason="not tested: pip install vizdoom")
    played = game_world(
        tmp_path, env="VizdoomBasic-v1", resize="stretch", frame_skip=4, max_frames=30
    )
    game, truth = played.open("game"), played.open("truth")
    for start in played.starts(3):
        assert np.array_equal(game.reset(start), truth.reset(start))
        for slots_A in start.read_truth(played.world).true_slots_TA:
            assert np.array_equal(game.step(slots_A[None]), truth.step(slots_A[None]))
    # And it listens: the other way is another picture.
    shown = []
    names = played.world.model.spec.actions.names
    for way in ("MOVE_LEFT", "MOVE_RIGHT"):
        game.reset(played.starts(1)[0])
        shown.append([game.step(np.array([[names.index(way)]])) for _ in range(4)])
    assert not np.array_equal(shown[0][-1], shown[1][-1])
    game.close()


def test_the_games_process_starts_without_torch():
    code = "import sys, worldloom.pipelines.play.real_game as g; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
