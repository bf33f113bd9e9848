"""Work spread over processes that may die: tasks -> answers, in the order they are finished.

    Crew(open_worker, job, size=2)  ->  .greetings, then .answers(tasks)

Each process opens one worker, in a temporary folder of its own (games write into the folder they
stand in), and answers one task after the other over its own pipe, so that a killed process takes
only its own task with it and is noticed at once. Nothing outlives the crew: not a process, not a
process that one of them started, not a folder; not even after kill -9 of the one who hired it.
"""

import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Protocol, Self

from worldloom.common import WorldloomError

_STOP_TIMEOUT_S = 5.0


class Worker(Protocol):
    """What one process of a crew holds: it is opened once and answers tasks."""

    @property
    def greeting(self) -> Any:
        """What it says once it is open."""
        ...

    def answer(self, task: Any, /) -> Any:
        """Do one task."""
        ...

    def close(self) -> None:
        """Let go of everything."""
        ...


class Crew:
    """Processes with one worker each; a context manager that ends with every process gone."""

    def __init__(self, open_worker: Callable[[Any], Worker], job: Any, /, *, size: int) -> None:
        self._open_worker = open_worker
        self._jobs = [job] * size
        self._size = size
        self._processes: list[SpawnProcess] = []
        self._pipes: list[Connection] = []
        self._doing: dict[int, Any] = {}
        self.greetings: list[Any] = []
        """What every worker said once it was open."""

    @classmethod
    def with_jobs(cls, open_worker: Callable[[Any], Worker], jobs: Sequence[Any], /) -> Self:
        """Return a crew of one process a job, as where each takes a GPU of its own."""
        crew = cls(open_worker, None, size=len(jobs))
        crew._jobs = list(jobs)
        return crew

    def __enter__(self) -> Self:
        self._folder = Path(tempfile.mkdtemp(prefix="worldloom-"))
        context = multiprocessing.get_context("spawn")
        try:
            for number, job in enumerate(self._jobs):
                ours, theirs = context.Pipe()
                folder = self._folder / str(number)
                folder.mkdir()
                process = context.Process(
                    target=_serve, args=(theirs, folder, self._open_worker, job)
                )
                process.start()
                theirs.close()
                self._processes.append(process)
                self._pipes.append(ours)
            self.greetings = [self._receive(number) for number in range(self._size)]
        except BaseException:
            self._stop(at_once=True)
            raise
        return self

    def answers(self, tasks: Iterable[Any], /) -> Iterator[Any]:
        """Yield the answer of every task, in the order they are finished.

        Raises:
            WorldloomError: what a worker raised, or that its process died.
        """
        waiting = iter(tasks)
        for number in range(self._size):
            self._hand_out(number, waiting)
        while self._doing:
            busy = [self._pipes[number] for number in self._doing]
            for pipe in wait(busy):
                number = self._pipes.index(pipe)  # type: ignore[arg-type]
                answer = self._receive(number)
                self._hand_out(number, waiting)
                yield answer

    def _hand_out(self, number: int, waiting: Iterator[Any]) -> None:
        """Give a worker the next task, if there is one."""
        self._doing.pop(number, None)
        for task in waiting:
            self._doing[number] = task
            try:
                self._pipes[number].send(task)
            except BrokenPipeError:
                self._receive(number)  # which says how the process ended
            return

    def _receive(self, number: int) -> Any:
        """Return what a worker said; raise what it raised, or how its process ended."""
        try:
            said, value = self._pipes[number].recv()
        except (EOFError, ConnectionResetError) as error:
            process = self._processes[number]
            process.join(_STOP_TIMEOUT_S)
            code = process.exitcode or 0
            how = (
                f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
            )
            task = f"on task {self._doing[number]}" if number in self._doing else "while it started"
            raise WorldloomError(
                f"process {process.pid} {how} {task}; what was finished before is kept: "
                "run the same command again to continue"
            ) from error
        if said == "error":
            raise value
        return value

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop(at_once=error is not None)

    def _stop(self, *, at_once: bool) -> None:
        """End every process, with what it started, and wait until it is gone."""
        for pipe in self._pipes:
            pipe.close()  # an idle worker reads the end of its tasks and closes its game itself
        if at_once:
            for process in self._processes:
                process.terminate()
        deadline = time.monotonic() + _STOP_TIMEOUT_S
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))
            with suppress(OSError):  # nobody is left in its group, or it has not made one yet
                os.killpg(process.pid or 0, signal.SIGKILL)
            process.kill()
            process.join()
        shutil.rmtree(self._folder, ignore_errors=True)


def _serve(pipe: Connection, folder: Path, open_worker: Callable[[Any], Worker], job: Any) -> None:
    """Be one process of a crew."""
    # A group of its own: Ctrl-C reaches the one who hired us, who ends us in good order; and what
    # a game starts (VizDoom's engine is a process) can be ended with us.
    os.setpgrp()
    signal.signal(signal.SIGTERM, _leave)
    threading.Thread(target=_watch_parent, args=(folder,), daemon=True).start()
    os.dup2(2, 1)  # stdout is for results; games greet there
    os.chdir(folder)
    try:
        worker = open_worker(job)
        pipe.send(("answer", worker.greeting))
        try:
            while True:
                pipe.send(("answer", worker.answer(pipe.recv())))
        finally:
            worker.close()
    except WorldloomError as error:
        with suppress(OSError):  # another worker failed first, and nobody listens any more
            pipe.send(("error", error))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # there are no more tasks
    finally:
        # Whoever ends us now need not wait, and Python's way out would complain of our handler.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _leave(signum: int, frame: FrameType | None) -> None:
    """Turn SIGTERM into an ordinary end, so that files and games are closed."""
    raise SystemExit(128 + signum)


def _watch_parent(folder: Path) -> None:
    """End this process, and what it started, when the one who hired it is gone."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    shutil.rmtree(folder.parent, ignore_errors=True)
    os.killpg(os.getpgrp(), signal.SIGKILL)
