"""Promises of play in a terminal, kept through a real pseudo-terminal."""

import codecs
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pipelines.play.playing import WARM, load_world, some_start, write_world
from worldloom.common import ConfigError
from worldloom.pipelines.play import key_presses
from worldloom.pipelines.play.controls import Controls
from worldloom.pipelines.play.half_blocks import HalfBlocks, fit_cells
from worldloom.pipelines.play.key_presses import REPEAT_S, TAP_S, Held, KeyReader, key_labels
from worldloom.pipelines.play.keyboard import KEYS, RESERVED_KEYS
from worldloom.pipelines.play.session import PlaySession
from worldloom.pipelines.play.terminal import play_in_terminal


class Screen:
    """The part of a terminal that is used here: what stands where, in which colours."""

    def __init__(self, columns, lines):
        self.columns, self.lines = columns, lines
        self.modes = set()
        self.clear()
        self.row = self.column = 0
        self.pen = ("default", "default")
        self._rest = ""

    def clear(self):
        self.cells = {}

    def feed(self, text):
        text = self._rest + text
        tail = re.search(r"\x1b(\[[0-9;?]*)?$", text)
        self._rest = tail[0] if tail else ""
        text = text[: len(text) - len(self._rest)]
        for order, sign in re.findall(r"\x1b\[([0-9;?]*[A-Za-z])|(.)", text, re.DOTALL):
            if order:
                self.obey(order[:-1], order[-1])
            else:
                assert sign.isprintable(), repr(sign)
                assert self.row < self.lines
                if self.column < self.columns:
                    self.cells[self.row, self.column] = (sign, *self.pen)
                    self.column += 1

    def obey(self, numbers, what):
        if what == "H":
            self.row, self.column = (int(n) - 1 for n in numbers.split(";"))
        elif what == "m":
            parts = [int(n) for n in numbers.split(";")]
            if parts == [0]:
                self.pen = ("default", "default")
                return
            assert parts[0:2] == [38, 2]
            assert parts[5:7] == [48, 2]
            self.pen = (tuple(parts[2:5]), tuple(parts[7:10]))
        elif what == "J":
            assert numbers == "2"
            self.clear()
        elif what == "K":
            assert numbers == "2"
            self.cells = {at: cell for at, cell in self.cells.items() if at[0] != self.row}
        else:
            assert what in "hl"
            mode = int(numbers.removeprefix("?"))
            (self.modes.add if what == "h" else self.modes.discard)(mode)
            if mode == 1049:
                self.clear()

    def line(self, row):
        signs = [self.cells.get((row, column), " ")[0] for column in range(self.columns)]
        return "".join(signs).rstrip()

    def picture(self):
        """Return the pixels that the half blocks show."""
        blocks = {at: cell for at, cell in self.cells.items() if cell[0] == "▀"}
        rows = range(min(r for r, _ in blocks), max(r for r, _ in blocks) + 1)
        columns = range(min(c for _, c in blocks), max(c for _, c in blocks) + 1)
        picture = np.zeros((2 * len(rows), len(columns), 3), np.uint8)
        for (row, column), (_, above, below) in blocks.items():
            picture[2 * (row - rows[0]), column - columns[0]] = above
            picture[2 * (row - rows[0]) + 1, column - columns[0]] = below
        return picture


@dataclass
class Terminal:
    """A pseudo-terminal: what a person types and sees."""

    columns: int = 80
    lines: int = 24

    def __enter__(self):
        self.master, self.slave = pty.openpty()
        self.screen = Screen(self.columns, self.lines)
        self.decoder = codecs.getincrementaldecoder("utf-8")()
        self.resize(self.columns, self.lines)
        self.before = termios.tcgetattr(self.slave)
        return self

    def __exit__(self, *exception):
        os.close(self.master)
        os.close(self.slave)

    def resize(self, columns, lines):
        self.screen.columns, self.screen.lines = columns, lines
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def type(self, text):
        os.write(self.master, text.encode())

    def wait(self, happens, *, timeout_s=60.0):
        """Draw what comes, until something is to be seen."""
        deadline = time.monotonic() + timeout_s
        while not happens():
            assert time.monotonic() < deadline, [self.screen.line(r) for r in range(self.lines)]
            if select.select([self.master], [], [], 0.02)[0]:
                self.screen.feed(self.decoder.decode(os.read(self.master, 65536)))

    def has_left(self):
        """Whether the last of its orders has come: that the screen of its own is left."""
        return 25 in self.screen.modes and 1049 not in self.screen.modes

    def restored(self):
        """Whether it is as it was."""
        return termios.tcgetattr(self.slave) == self.before and not (
            self.screen.modes - {7, 25}
        ) and {7, 25} <= self.screen.modes  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return load_world(write_world(tmp_path_factory.mktemp("world"), "plain"))


@pytest.fixture(scope="module")
def video_world(tmp_path_factory):
    return load_world(write_world(tmp_path_factory.mktemp("video"), "video"))


class Watched(PlaySession):
    """A session that remembers what was asked of it."""

    def __init__(self, world, **settings):
        starts = [some_start(world), some_start(world, seed=1)]
        super().__init__(world, starts, **{"sampling": WARM, "seed": 7, "log": None} | settings)
        self.steps, self.resets = [], []
        self.broken = None

    def reset(self, **settings):
        self.resets.append(settings)
        self.steps.clear()
        return super().reset(**settings)

    def step(self, slots_rA):
        if self.broken is not None:
            raise self.broken
        shown = super().step(slots_rA)
        self.steps.append((np.array(slots_rA), shown))
        return shown


@contextmanager
def playing(world, *, columns=80, lines=24, fps=50.0, paused=True, **settings):
    """Play in a terminal, in a thread; at the end it must be as it was."""
    session, ends = Watched(world, **settings), []
    controls = Controls.of(world.model.spec.actions)
    with (
        Terminal(columns, lines) as terminal,
        open(terminal.slave, closefd=False) as stdin,
        open(terminal.slave, "w", closefd=False) as stdout,
    ):

        def play():
            try:
                play_in_terminal(session, controls, fps=fps, stdin=stdin, stdout=stdout)
                ends.append(None)
            except BaseException as error:
                ends.append(error)

        thread = threading.Thread(target=play, daemon=True)
        if paused:
            terminal.type("p")
        thread.start()
        terminal.ends, terminal.session = ends, session
        terminal.wait(lambda: any(cell[0] == "▀" for cell in terminal.screen.cells.values()))
        if paused:
            terminal.wait(lambda: "paused" in terminal.screen.line(lines - 2))
        yield terminal
        if not ends:
            terminal.type("q")
        terminal.wait(lambda: ends and terminal.has_left())
        thread.join()
        assert terminal.restored()


def steps_of(terminal, count):
    terminal.wait(lambda: len(terminal.session.steps) >= count)
    return terminal.session.steps


def codes_alone(session, world):
    """The codes of a world that does the same steps, without session or terminal."""
    point = some_start(world)
    world.sampling = WARM
    world.reset(point.start.codes_thw, point.start.slots_TA, seed=7)
    return [world.step(slots_rA)[1].tolist() for slots_rA, _ in session.steps]


def test_pressed_keys_move_the_world_code_for_code(world):
    with playing(world) as terminal:
        for number, key in enumerate(["\x1b[D", "d", "", "\x1b[C", "a", "\x1bOD"]):
            at = terminal.session.position
            terminal.type(f"{key}.")
            steps_of(terminal, at + 1)
            wanted = [1, 2, 0, 2, 1, 1][number]
            assert terminal.session.steps[-1][0].tolist() == [[wanted]]
        session = terminal.session
    assert codes_alone(session, world) == [shown.codes_hw.tolist() for _, shown in session.steps]


def test_while_it_runs_a_key_that_repeats_is_held_and_let_go_after_it_stops(world, monkeypatch):
    # A machine that stalls for a moment types nothing, and is not to let go by that.
    for name in ("TAP_S", "REPEAT_S"):
        monkeypatch.setattr(key_presses, name, 1.5)
    with playing(world, paused=False, fps=30.0) as terminal:
        count = len(terminal.session.steps)

        def far_enough():
            terminal.type("a")
            time.sleep(0.02)
            return len(terminal.session.steps) >= count + 30

        terminal.wait(far_enough)
        terminal.wait(lambda: "STAY" in terminal.screen.line(22))
        session = terminal.session
    done = [int(slots_rA[0, 0]) for slots_rA, _ in session.steps]
    first, last = done.index(1), len(done) - done[::-1].index(1)
    assert set(done[first:last]) == {1}
    assert last - first >= 20
    assert done[-1] == 0
    assert codes_alone(session, world) == [shown.codes_hw.tolist() for _, shown in session.steps]


@pytest.mark.parametrize(("columns", "lines"), [(80, 24), (200, 60), (20, 8), (12, 5), (9, 2)])
def test_the_frame_stands_there_pixel_by_pixel_or_smaller_where_there_is_no_room(
    world, columns, lines
):
    with playing(world, columns=columns, lines=lines, paused=False) as terminal:
        for _ in range(2):
            terminal.type("p")
            time.sleep(0.05)
            terminal.type("d.")
            terminal.wait(lambda: terminal.session.steps)
        shown = terminal.session.steps[-1][1]
        rows = lines - min(2, (lines - 1) // 2)
        wanted = fit_cells(shown.frames_THWC[-1], columns=columns, rows=rows)
        count = len(terminal.session.steps)
        terminal.type(".")
        steps_of(terminal, count + 1)

        def there():
            last = terminal.session.steps[-1][1].frames_THWC[-1]
            picture = terminal.screen.picture()
            wanted = fit_cells(last, columns=columns, rows=rows)
            return picture.shape == wanted.shape and np.array_equal(picture, wanted)

        terminal.wait(there)
    assert wanted.shape[1] <= columns
    assert wanted.shape[0] <= 2 * rows


def test_a_window_that_changes_its_size_is_filled_anew(world):
    with playing(world, columns=80, lines=24) as terminal:
        assert terminal.screen.picture().shape == (32, 32, 3)
        terminal.resize(90, 24)  # the same picture, elsewhere
        terminal.wait(lambda: (0, 24) not in terminal.screen.cells)
        terminal.wait(lambda: {(0, 29), (15, 60)} <= set(terminal.screen.cells))
        assert terminal.screen.picture().shape == (32, 32, 3)
        # The rest of the drawing belongs to the window as it was.
        terminal.wait(lambda: terminal.screen.line(23).endswith("next start tab"))
        terminal.resize(40, 11)
        terminal.wait(
            lambda: terminal.screen.cells and terminal.screen.picture().shape == (16, 16, 3)
        )
        wanted = fit_cells(terminal.session.shown.frames_THWC[-1], columns=40, rows=9)
        terminal.wait(lambda: np.array_equal(terminal.screen.picture(), wanted))
        terminal.wait(lambda: "paused" in terminal.screen.line(9))


def test_lines_of_text_say_what_is_done_and_which_keys_there_are(world):
    with playing(world, columns=120) as terminal:
        terminal.type("d.")
        done = r"paused · frame 1 · RIGHT · \d+ ms"
        terminal.wait(lambda: re.fullmatch(done, terminal.screen.line(22)))
        terminal.wait(lambda: "quit Q" in terminal.screen.line(23))
        help_line = terminal.screen.line(23)
        for said in ("Left ←/A", "Right →/D", "pause P/space", "step .", "back ,", "quit Q"):
            assert said in help_line


def test_pause_back_reset_and_the_next_start_do_what_they_say(world):
    with playing(world) as terminal:
        session = terminal.session
        terminal.type("d." * 5)
        first = [shown.codes_hw.tolist() for _, shown in steps_of(terminal, 5)]
        terminal.type(",,")
        terminal.wait(lambda: session.position == 3)
        terminal.type("d.d.")
        again = steps_of(terminal, 7)[5:]
        assert [shown.codes_hw.tolist() for _, shown in again] == first[3:]
        terminal.type("r")
        terminal.wait(lambda: session.position == 0)
        terminal.type("\t")
        terminal.wait(lambda: session.point is session.starts[1])
        terminal.type(",")  # before the beginning there is nothing
        terminal.type("p")
        steps_of(terminal, 2)
        terminal.type(" ")  # no control of this world needs it, so it pauses, too
        terminal.wait(lambda: "paused" in terminal.screen.line(22))


def test_frames_of_one_step_are_all_shown_at_the_worlds_pace(video_world):
    with playing(video_world, fps=5.0, paused=False) as terminal:
        began = time.monotonic()
        count = len(terminal.session.steps)
        steps = steps_of(terminal, count + 8)
        took = time.monotonic() - began
        assert len(steps[-1][1].frames_THWC) == 2
    # Eight steps of two frames at 5 a second.
    assert 2.2 < took < 15


def test_what_the_session_refuses_is_said_and_play_goes_on(world):
    with playing(world) as terminal:
        terminal.session.broken = ConfigError("the world has a crack")
        terminal.type(".")
        terminal.wait(lambda: "the world has a crack" in terminal.screen.line(22))
        terminal.session.broken = None
        terminal.type("d.")
        steps_of(terminal, 1)
        terminal.wait(lambda: "frame 1" in terminal.screen.line(22))


def test_after_an_error_of_ours_the_terminal_is_as_it_was(world):
    with playing(world) as terminal:
        terminal.session.broken = ZeroDivisionError("a bug")
        terminal.type(".")
        terminal.wait(lambda: terminal.ends)
        assert isinstance(terminal.ends[0], ZeroDivisionError)


def test_without_a_terminal_nothing_is_drawn_and_it_is_said_why(world, tmp_path):
    controls = Controls.of(world.model.spec.actions)
    path = tmp_path / "typed"
    path.write_text("q")
    with (
        path.open() as stdin,
        (tmp_path / "seen").open("w") as stdout,
        pytest.raises(ConfigError, match="the input is no terminal"),
    ):
        play_in_terminal(Watched(world), controls, fps=1.0, stdin=stdin, stdout=stdout)
    assert (tmp_path / "seen").read_text() == ""


SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from pipelines.play.playing import WARM, load_world, some_start
from worldloom.pipelines.play.controls import Controls
from worldloom.pipelines.play.session import PlaySession
from worldloom.pipelines.play.terminal import play_in_terminal
from worldloom.pipelines.cli import main

world = load_world(Path({folder!r}))
session = PlaySession(world, [some_start(world)], sampling=WARM, seed=7, log=None)
controls = Controls.of(world.model.spec.actions)
play_in_terminal(session, controls, fps=20.0, stdin=sys.stdin, stdout=sys.stdout)
"""


@pytest.mark.slow
def test_ctrl_c_interrupts_and_leaves_the_terminal_as_it_was_and_ctrl_z_does_nothing(tmp_path):
    folder = write_world(tmp_path / "world", "plain")
    tests = str(next(p for p in __import__("pathlib").Path(__file__).parents if p.name == "tests"))
    with Terminal() as terminal:
        process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT.format(tests=tests, folder=str(folder))],
            stdin=terminal.slave,
            stdout=terminal.slave,
            stderr=subprocess.PIPE,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )

        def is_at(frame):  # or beyond: what came together is drawn together
            found = re.search(r"frame (\d+) ·", terminal.screen.line(22))
            return found is not None and int(found[1]) >= frame

        terminal.wait(lambda: is_at(3), timeout_s=120)
        terminal.type("\x1a\x1c")  # Ctrl-Z, Ctrl-\\
        seen = int(re.search(r"frame (\d+)", terminal.screen.line(22))[1])
        terminal.wait(lambda: is_at(seen + 5))
        terminal.type("\x03")
        terminal.wait(lambda: process.poll() is not None and terminal.has_left())
        said = process.communicate()[1].decode()
        assert process.returncode in (-signal.SIGINT, 130, 1)
        assert "KeyboardInterrupt" in said
        assert terminal.restored()


def test_every_key_that_a_control_may_have_can_be_typed():
    typed = "abcdefghijklmnopqrstuvwxyz0123456789-=[];', ./\t\r\x7f"
    keys = KeyReader().read(typed.encode() + b"\x1b[A\x1b[B\x1b[C\x1b[D", now=0.0)
    assert set(keys) == set(KEYS) | (RESERVED_KEYS - {"Escape"})
    assert KeyReader().read(b"W", now=0.0) == ["KeyW"]


@given(st.data())
def test_keys_are_read_the_same_however_the_bytes_are_cut(data):
    pieces = st.sampled_from(
        [b"a", b"\x1b[A", b"\x1bOB", b"\x1b[1;2C", b"\x1b[3~", b" ", b"\xc3\xa9", b"5", b"\x1bx"]
    )
    content = b"".join(data.draw(st.lists(pieces, max_size=8)))
    whole = KeyReader().read(content, now=0.0)
    reader, parts, at = KeyReader(), [], 0
    while at < len(content):
        size = data.draw(st.integers(1, 4))
        parts += reader.read(content[at : at + size], now=0.0)
        at += size
    assert parts == whole


@given(st.lists(st.binary(max_size=12), max_size=6))
def test_whatever_bytes_come_only_keys_come_out(contents):
    reader = KeyReader()
    for number, content in enumerate(contents):
        for key in reader.read(content, now=float(number)):
            assert key in KEYS or key in RESERVED_KEYS


def test_an_escape_alone_does_not_swallow_the_key_after_it():
    reader = KeyReader()
    assert reader.read(b"\x1b", now=0.0) == []
    assert reader.read(b"d", now=1.0) == ["KeyD"]


def test_a_tap_holds_for_a_while_and_a_repetition_goes_on_holding():
    held = Held()
    held.press("left", now=0.0)
    assert held.take(now=0.0) == ("left",)
    assert held.take(now=TAP_S - 0.01) == ("left",)
    held.press("left", now=TAP_S - 0.01)
    assert held.take(now=TAP_S - 0.01) == ("left",)
    assert held.take(now=TAP_S + REPEAT_S - 0.05) == ("left",)
    assert held.take(now=TAP_S + REPEAT_S) == ()


def test_a_press_counts_for_one_step_however_slow_the_world_is():
    held = Held()
    held.press("left", now=0.0)
    assert held.take(now=100.0) == ("left",)
    assert held.take(now=100.1) == ()


def test_of_several_that_are_held_the_newest_comes_last():
    held = Held()
    for name in ("left", "fire", "left"):
        held.press(name, now=0.0)
    assert held.take(now=0.1) == ("left", "fire")
    held.press("up", now=0.2)
    assert held.take(now=0.3) == ("left", "fire", "up")
    held.press("left", now=5.0)
    assert held.take(now=5.0) == ("left",)


def test_a_drawing_says_only_what_changed():
    rng = np.random.default_rng(0)
    frame = rng.integers(0, 256, (32, 40, 3), np.uint8)
    blocks, screen = HalfBlocks(), Screen(60, 30)
    whole = blocks.draw(frame, top=2, left=3)
    screen.feed(whole)
    assert np.array_equal(screen.picture(), frame)
    assert (1, 2) in screen.cells
    assert blocks.draw(frame, top=2, left=3) == ""
    frame = frame.copy()
    frame[5, 7] ^= 255
    little = blocks.draw(frame, top=2, left=3)
    screen.feed(little)
    assert np.array_equal(screen.picture(), frame)
    assert len(little) < len(whole) / 100


@given(
    height=st.integers(1, 90),
    width=st.integers(1, 90),
    columns=st.integers(1, 120),
    rows=st.integers(1, 40),
)
def test_a_picture_fits_keeps_its_shape_and_its_mean(height, width, columns, rows):
    frame = np.full((height, width, 3), (10, 200, 90), np.uint8)
    picture = fit_cells(frame, columns=columns, rows=rows)
    assert picture.shape[0] % 2 == 0
    assert picture.shape[0] <= 2 * rows
    assert picture.shape[1] <= columns
    assert (picture[0, 0] == (10, 200, 90)).all()


def test_keys_are_written_as_they_stand_on_the_keyboard():
    assert key_labels(("ArrowLeft", "KeyA")) == "←/A"
    assert key_labels(("Space", "Digit1", "BracketLeft")) == "space/1/["
