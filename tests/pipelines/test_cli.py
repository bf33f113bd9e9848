"""cli.py: what is printed where, how a command ends, and that the help stays light."""

import os
import re
import resource
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
from worldloom.common import ConfigError, FormatError, WorldloomError
from worldloom.pipelines import commands
from worldloom.pipelines.cli import main
from worldloom.pipelines.commands import COMMANDS, Command
from worldloom.pipelines.settings import parse

HEAVY = ("torch", "torchvision", "av", "matplotlib", "gymnasium")


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeConfig:
    """Try the command line itself."""

    word: str = "done"
    """What to answer."""


@pytest.fixture
def command(monkeypatch):
    """Make `worldloom probe` run a function of the test's."""

    def install(function, *, continues: bool = False) -> None:
        module = ModuleType("worldloom.pipelines.probe")
        module.ProbeConfig, module.probe = ProbeConfig, function
        monkeypatch.setitem(sys.modules, module.__name__, module)
        probe = Command("probe", "try", "probe", "ProbeConfig", continues)
        monkeypatch.setitem(commands.COMMANDS, "probe", probe)

    return install


def raising(error: BaseException):
    def run(config: ProbeConfig) -> None:
        raise error

    return run


def python(*words: str, **kwargs) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, timeout=60, check=False, **kwargs
    )


def test_the_result_goes_to_stdout_alone_and_the_command_ends_with_0(command, capsys):
    command(lambda config: Path("runs") / config.word)
    assert main(["probe", "--word", "here"]) == 0
    assert capsys.readouterr() == ("runs/here\n", "")


def test_a_result_may_say_how_the_command_ends(command):
    class Verdict:
        exit_code = 1

    command(lambda config: Verdict())
    assert main(["probe"]) == 1


@pytest.mark.parametrize(
    ("error", "code"), [(ConfigError("a: b"), 2), (FormatError("c"), 3), (WorldloomError("d"), 1)]
)
def test_an_error_of_ours_is_one_line_on_stderr_and_its_exit_code(command, capsys, error, code):
    command(raising(error))
    assert main(["probe"]) == code
    assert capsys.readouterr() == ("", f"error: {error}\n")


def test_any_other_error_stays_a_traceback(command):
    command(raising(ZeroDivisionError("ours to mend")))
    with pytest.raises(ZeroDivisionError):
        main(["probe"])


@pytest.mark.parametrize(("continues", "promise"), [(True, "continues"), (False, "start over")])
def test_ctrl_c_ends_with_130_and_says_what_running_it_again_does(
    command, capsys, continues, promise
):
    command(raising(KeyboardInterrupt()), continues=continues)
    assert main(["probe"]) == 130
    assert promise in capsys.readouterr().err


def test_sigterm_unwinds_and_ends_with_143(command):
    unwound = []

    def run(config: ProbeConfig) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        finally:
            unwound.append(True)

    command(run)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        main(["probe"])
    assert ended.value.code == 143
    assert unwound
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("words", ["--help", "info --help"])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_leaves_early_is_no_error(words, unbuffered):
    # The reader is gone before the writer starts, so the writer always meets a broken pipe.
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "worldloom.pipelines", *words.split()],
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
            stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60, check=False,
        )  # fmt: skip
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_pipe_to_a_worker_that_breaks_is_not_taken_for_a_reader_that_left(command):
    command(raising(BrokenPipeError()))
    with pytest.raises(BrokenPipeError):
        main(["probe"])


def test_an_unknown_command_is_refused_with_the_nearest(capsys):
    assert main(["tokenzie"]) == 2
    assert "did you mean 'tokenize'" in capsys.readouterr().err
    assert main(["train_dynamics"]) == 2
    assert "did you mean 'train-dynamics'" in capsys.readouterr().err


def test_the_version_is_that_of_the_distribution(capsys):
    assert main(["--version"]) == 0
    assert re.fullmatch(r"worldloom \d+\.\d+\.\d+\n", capsys.readouterr().out)


def test_the_help_lists_the_commands_in_the_order_of_the_data_and_fits_80_columns(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    listed = [name for name in re.findall(r"^  (\S+)  ", shown, re.MULTILINE) if name in COMMANDS]
    assert listed == [
        "record", "ingest", "train-tokenizer", "tokenize", "shards", "train-dynamics", "generate",
        "evaluate", "play", "replay", "demo", "info", "doctor",
    ]  # fmt: skip
    assert "worldloom demo --output runs/demo" in shown
    assert max(map(len, shown.splitlines())) <= 80


@pytest.mark.parametrize("words", [[], *([name] for name in COMMANDS)])
def test_help_answers_within_a_second_without_importing_anything_heavy(words):
    code = (
        "import sys; from worldloom.pipelines.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as ended: assert not ended.code\n"
        f"print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = python("-c", code, *words, "--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "[]\n"
    # Seconds of the processor, which a busy machine does not stretch as it does those of the clock.
    assert after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime < 1


def test_the_help_of_a_command_imports_no_other_commands_module():
    code = (
        "import sys; from worldloom.pipelines.cli import main\n"
        "try: main(['info', '--help'])\n"
        "except SystemExit: pass\n"
        "print(*sys.modules, file=sys.stderr)"
    )
    loaded = python("-c", code).stderr.split()
    others = {f"worldloom.pipelines.{c.module}" for c in COMMANDS.values() if c.name != "info"}
    assert "worldloom.pipelines.info" in loaded
    assert others.isdisjoint(loaded)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_calls_no_value_by_what_it_is_without_one(name, capsys):
    with pytest.raises(SystemExit):
        main([name, "--help"])
    assert "{None" not in capsys.readouterr().out


@pytest.mark.parametrize("name", COMMANDS)
def test_the_example_in_every_commands_help_is_a_command_line_that_parses(name):
    cls, _ = COMMANDS[name].load()
    paragraphs = [part.strip() for part in re.split(r"\n\s*\n", cls.__doc__)]
    examples = [part for part in paragraphs if part.startswith(f"worldloom {name}")]
    assert examples
    for example in examples:
        parse(cls, shlex.split(example.replace("\\\n", " "))[2:], command=name)


def test_importing_the_module_runner_in_a_spawned_worker_runs_nothing():
    done = python("-c", "import worldloom.pipelines.__main__")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
