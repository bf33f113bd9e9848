"""player.py, game.py, packing.py: what is done in which order, without a network."""

import io
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from pipelines.play.raw import open_log
from worldloom.common import FormatError
from worldloom.pipelines.play.packing import pack, pack_image
from worldloom.pipelines.play.player import Player
from worldloom.pipelines.play.protocol import Compare, Input, Pace, Rewind, Run, Step


class Collected:
    """An outlet that keeps everything."""

    def __init__(self):
        self.texts, self.frames, self.arrived = [], [], threading.Condition()

    def tell(self, message):
        with self.arrived:
            self.texts.append(message)
            self.arrived.notify()

    def show(self, frames, *, afresh):
        with self.arrived:
            self.frames += frames
            self.arrived.notify()

    def wait(self, holds):
        with self.arrived:
            assert self.arrived.wait_for(holds, 20)

    def reach(self, position):
        self.wait(lambda: self.frames and self.frames[-1].header["position"] >= position)


@pytest.fixture
def player(steer_world, tmp_path):
    session, log = open_log(steer_world, tmp_path)
    player = Player(session, name="toy", pace=0.0, companions={}, recordings=log.folder)
    yield player
    assert player.stop(timeout_s=10)


def started(player):
    outlet = Collected()
    player.start()
    player.attach(outlet, resumed=False)
    outlet.reach(0)
    return outlet


def test_of_rewinds_that_wait_only_the_last_is_done(player):
    outlet = Collected()
    player.attach(outlet, resumed=False)
    for message in (Step(), Step(), Step(), Rewind(1), Rewind(2), Rewind(0), Step()):
        assert player.offer(message)
    player.start()
    outlet.wait(lambda: len(outlet.frames) == 6)
    assert [frame.header["position"] for frame in outlet.frames] == [0, 1, 2, 3, 0, 1]


def test_who_comes_anew_and_breaks_off_before_the_welcome_still_begins_anew(player):
    outlet = started(player)
    for _ in range(3):
        player.offer(Step())
    outlet.reach(3)
    with player._wake:  # while the player is busy, a page comes, and is loaded again
        for resumed in (False, True):
            outlet = Collected()
            player.attach(outlet, resumed=resumed)
    outlet.reach(0)
    welcome, state = outlet.texts[:2]
    assert (welcome["type"], welcome["resumed"]) == ("welcome", False)
    assert state["position"] == 0
    player.attach(outlet, resumed=True)
    outlet.wait(lambda: outlet.texts[-2].get("resumed") is True)


def test_the_line_is_short_and_an_input_never_waits_in_it(player):
    outlet = Collected()
    player.attach(outlet, resumed=False)
    taken = sum(player.offer(Step()) for _ in range(1000))
    assert taken == 31  # and the greeting
    assert player.offer(Input(("LEFT",), 5))
    player.start()
    outlet.reach(31)
    assert player.offer(Step())
    outlet.reach(32)
    assert outlet.frames[-1].header["n"] == 5
    assert {frame.header["n"] for frame in outlet.frames[:-1]} == {0}


def test_a_control_that_there_is_none_of_is_refused_and_nothing_is_held(player):
    outlet = started(player)
    with pytest.raises(FormatError, match="no control 'UP'; it has FIRE, LEFT, RIGHT"):
        player.offer(Input(("LEFT", "UP"), 1))
    player.offer(Step())
    outlet.reach(1)
    assert outlet.frames[-1].header["held"] == []


def test_a_pace_is_kept(player):
    outlet = started(player)
    player.offer(Run(on=True))
    outlet.reach(30)
    player.offer(Pace(20.0))
    first = len(outlet.frames) + 2
    outlet.wait(lambda: len(outlet.frames) > first + 20)
    due = [frame.due for frame in outlet.frames[first : first + 20]]
    assert 0.035 < np.median(np.diff(due)) < 0.09


class Stumbling:
    """Runs beside the world, and takes its time once."""

    name = "game"

    def __init__(self):
        self._steps = 0

    def reset(self, start):
        return np.zeros((1, 16, 16, 3), np.uint8)

    def step(self, slots_rA):
        self._steps += 1
        time.sleep(1.0 if self._steps == 3 else 0.0)
        return np.zeros((1, 16, 16, 3), np.uint8)

    def close(self):
        pass


def test_a_step_that_took_long_is_not_made_up_for_by_a_rush(steer_world, tmp_path):
    session, log = open_log(steer_world, tmp_path)
    companions = {"game": Stumbling}
    player = Player(session, name="toy", pace=10.0, companions=companions, recordings=log.folder)
    outlet = started(player)
    player.offer(Compare("game"))
    player.offer(Run(on=True))
    outlet.reach(7)
    assert player.stop(timeout_s=10)
    due = {frame.header["position"]: frame.due for frame in outlet.frames}
    assert due[3] - due[2] > 0.9
    assert due[7] - due[4] > 0.1  # three periods; with a rush they are over at once


def test_a_player_that_stands_still_takes_no_time(player):
    started(player)
    time.sleep(0.2)
    before = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - before < 0.25


def test_the_frames_of_a_step_are_spread_over_its_time_and_the_last_is_marked(player):
    started(player)
    shown = player._game._session.shown
    frames_THWC = np.stack([np.full((16, 16, 3), 40 * k, np.uint8) for k in range(4)])
    shown = replace(shown, frames_THWC=frames_THWC, companion_THWC=255 - frames_THWC)
    packed = pack(shown, answers={"n": 7}, image="png", now=100.0, spacing_s=0.05)
    assert [frame.due for frame in packed] == pytest.approx([100.0, 100.05, 100.1, 100.15])
    assert [frame.header["last"] for frame in packed] == [False, False, False, True]
    assert {frame.header["n"] for frame in packed} == {7}
    for k, frame in enumerate(packed):
        levels = [np.asarray(Image.open(io.BytesIO(image))).max() for image in frame.images]
        assert levels == [40 * k, 255 - 40 * k]


def test_a_jpeg_keeps_a_single_coloured_pixel_where_it_is():
    frame_HWC = np.full((32, 32, 3), 30, np.uint8)
    frame_HWC[9, 17] = (230, 20, 20)
    seen_HWC = np.asarray(Image.open(io.BytesIO(pack_image(frame_HWC, "jpeg"))).convert("RGB"))
    redness = seen_HWC[..., 0].astype(int) - seen_HWC[..., 2]
    assert np.unravel_index(redness.argmax(), redness.shape) == (9, 17)
    assert redness[9, 17] > 150
