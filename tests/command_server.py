"""Command lines in processes of their own, without waiting for torch each time.

    python tests/command_server.py   imports everything once, then forks for every command

The fault tests kill commands by the dozen. What runs in a fork is the command line's own `main`;
the server itself computes nothing, so no thread or lock of a library is caught in a fork.
"""

import gc
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code (negative: the signal that killed it) and its output."""

    code: int
    out: str
    err: str
    cpu_s: float
    """Seconds that a core was busy with it; others that are busy do not lengthen them."""


def quiet_environment() -> dict[str, str]:
    """The environment of a command that may use one core, and the games of tests/worlds.py."""
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }


class Running:
    """A command that was started."""

    def __init__(self, server: "CommandServer", pid: int, stem: str) -> None:
        self._server, self.pid, self._stem = server, pid, stem

    def send(self, number: int) -> None:
        os.killpg(self.pid, number)

    def is_running(self) -> bool:
        """Whether it has not ended; one that has is a zombie until `wait`."""
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"

    def wait(self) -> Ended:
        ended = self._server.ask({"wait": self.pid})
        out, err = (Path(f"{self._stem}.{name}").read_text() for name in ("out", "err"))
        return Ended(ended["code"], out, err, ended["cpu_s"])


class CommandServer:
    """Starts commands; use as a context manager."""

    def __enter__(self) -> "CommandServer":
        self._folder = tempfile.TemporaryDirectory(prefix="worldloom-commands-")
        self._count = 0
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            env=quiet_environment(),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.communicate()
        self._folder.cleanup()

    def ask(self, job: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        assert self._process.poll() is None, "the server has ended; its stderr says why"
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(
        self, *words: object, failpoint: str = "", largest_file_bytes: int | None = None
    ) -> Running:
        self._count += 1
        stem = f"{self._folder.name}/{self._count}"
        job = {
            "words": [str(word) for word in words],
            "env": {"WORLDLOOM_FAILPOINT": failpoint},
            "largest_file_bytes": largest_file_bytes,
            "stem": stem,
        }
        for name in ("out", "err"):  # here, since the command may be killed before it opens them
            Path(f"{stem}.{name}").touch()
        return Running(self, self.ask(job)["pid"], stem)

    def run(self, *words: object, **kwargs: Any) -> Ended:
        return self.start(*words, **kwargs).wait()


def _serve() -> None:
    """Answer jobs, one a line, until stdin ends."""
    import accelerate  # noqa: F401
    import torchvision.io  # noqa: F401
    import worldloom.dynamics
    import worldloom.pipelines.report
    import worldloom.pipelines.settings
    import worldloom.pipelines.world
    import worldloom.tokenizer
    from worldloom.pipelines.commands import COMMANDS

    # The front doors are lazy: touch what would load the rest.
    _ = worldloom.tokenizer.train_conv_tokenizer, worldloom.dynamics.train_dynamics_model
    for command in COMMANDS.values():
        command.load()
    gc.collect()
    gc.freeze()  # or every fork would copy all that is there when it collects garbage
    for line in sys.stdin:
        job = json.loads(line)
        if "wait" in job:
            _, status, used = os.wait4(job["wait"], 0)
            cpu_s = used.ru_utime + used.ru_stime
            answer = {"code": os.waitstatus_to_exitcode(status), "cpu_s": cpu_s}
        else:
            pid = os.fork()
            if pid == 0:
                _obey(job)
            os.setpgid(pid, pid)  # before anybody can send the group a signal
            answer = {"pid": pid}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def _obey(job: dict[str, Any]) -> None:
    """Be the command."""
    from worldloom.pipelines.cli import main

    code: Any = 1
    try:
        os.setpgid(0, 0)  # the server does so too: whoever comes first
        os.environ |= job["env"]
        for stream, name in ((0, os.devnull), (1, job["stem"] + ".out"), (2, job["stem"] + ".err")):
            mode = os.O_RDONLY if stream == 0 else os.O_WRONLY | os.O_CREAT
            os.dup2(os.open(name, mode, 0o600), stream)
        if job["largest_file_bytes"] is not None:
            # The signal is what Python ignores by itself at its start; a write then fails.
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (job["largest_file_bytes"],) * 2)
        code = main(job["words"])
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 0 if code is None else 1)


if __name__ == "__main__":
    _serve()
