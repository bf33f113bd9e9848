"""Units of work -> their reports, by actors of a Ray cluster, any of which may die.

    answers(job, [0, 1, 2], workers=0, address="auto")  ->  a UnitReport each, as they are finished

An actor is a process with one core, or one GPU, and one unit in work. With a killed actor or node
only that unit is lost, and it is handed out again: at least once, which comes to exactly once,
since a unit done twice writes the same bytes and one whose marker is there counts as done. Ray
restarts nothing itself: who lost what is known here. No data goes through Ray but numbers of units
and reports; episodes, tokenizer and shards lie on a disk that all nodes see at the same path.

Ray is an extra: pip install 'worldloom[ray]'.
"""

import os
import platform
import sys
import time
from collections import Counter, deque
from collections.abc import Generator, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from worldloom.common import (
    ConfigError,
    Interrupt,
    WorldloomError,
    say,
    shard_name,
)

from .ranks import Share, num_cores
from .ray_connection import connected, import_ray, in_a_line

if TYPE_CHECKING:
    from .units import TokenizeJob, UnitReport, UnitWorker

_MOST_TRIES = 3
_MOST_FAILED_STARTS = 3
_TICK_S = 0.5
"""How late a signal is obeyed at most."""
_SILENCE_S = 60.0
"""How long nothing may be at work before that is said."""


def answers(
    job: "TokenizeJob", pending: Sequence[int], /, *, workers: int, address: str
) -> "Generator[UnitReport, None, None]":
    """Yield the report of every pending unit, in the order they are finished.

    Close it, or leave it to the end: either way no actor is left, and no Ray that was started here.

    Args:
        job: what every actor needs to know.
        pending: numbers of units, of which none is finished.
        workers: actors at most; 0 for as many as the cluster has cores, or GPUs for a job on cuda.
        address: of a cluster ("auto", "HOST:PORT", "ray://HOST:PORT"); "" starts one here. Where
            Ray is connected already, that connection is used, and left as it is.

    Raises:
        ConfigError: if Ray is not installed or does not answer, or a node cannot do the work.
        WorldloomError: what a unit raised; or that one lost its process three times.
    """
    ray = import_ray()
    num_cpus = workers or num_cores(Share())
    with Interrupt() as interrupt, connected(ray, address, num_cpus=num_cpus):
        pool = _Pool(ray, job, pending, workers)
        with closing(pool.answers(interrupt)) as reports:
            yield from reports


class UnitActor:
    """What one process of the cluster holds; errors of ours are answers, so that none is wrapped.

    A node may have another disk or another worldloom, which is told apart from damaged data.
    """

    def __init__(self, job: "TokenizeJob", folder: str, version: str, /) -> None:
        self._job, self._folder, self._version = job, folder, version
        self._worker: UnitWorker | None = None

    def open(self) -> tuple[str, Any]:
        """Load what answering takes; return "answer" and the node's name, or "error" and it."""
        try:
            self._check_node()
            # A tokenizer of the person's own, module:Class, lies where the command was started.
            if self._folder not in sys.path:
                sys.path.append(self._folder)
            # Here and not above: a node that cannot do the work says so before it waits for torch.
            from .units import open_unit_worker

            self._worker = open_unit_worker(self._job)
        except WorldloomError as error:
            return "error", error
        return "answer", platform.node()

    def answer(self, index: int, /) -> tuple[str, Any]:
        """Do one unit; return "answer" and its report, or "error" and it."""
        assert self._worker is not None
        try:
            return "answer", self._worker.answer(index)
        except WorldloomError as error:
            return "error", error

    def _check_node(self) -> None:
        """Refuse to work where the result would be another, or none."""
        here, node = version("worldloom"), platform.node()
        if here != self._version:
            raise ConfigError(
                f"Ray's node {node} has worldloom {here}, this is {self._version}: their shards "
                "may differ. Install the same one on every node"
            )
        job = self._job
        named = Path(job.tokenizer.rpartition("=")[2])
        for path in (job.episodes, job.output, *([named] if named.is_absolute() else [])):
            if not path.exists():
                raise ConfigError(
                    f"{path}: not there on Ray's node {node}; episodes, tokenizer and output must "
                    "lie on a disk that every node sees at the same path"
                )


class _Pool:
    """Actors with one unit each, and what is left to do."""

    def __init__(self, ray: Any, job: "TokenizeJob", pending: Sequence[int], workers: int) -> None:
        self._ray = ray
        self._job = job
        self._waiting = deque(pending)
        self._workers = workers
        self._calls: dict[Any, tuple[Any, int | None]] = {}
        """By Ray's reference to the call: the actor, and the unit, or None while it opens."""
        self._losses: Counter[int] = Counter()
        self._failed_starts = 0
        self._resource = "CPU"
        if job.device.startswith("cuda"):
            # Ray shows an actor no GPU but its own, which is the first one then.
            self._resource, self._job = "GPU", replace(job, device="cuda")
        num_gpus = int(self._resource == "GPU")
        self._actor = ray.remote(num_cpus=1 - num_gpus, num_gpus=num_gpus, max_restarts=0)(
            UnitActor
        )

    def answers(self, interrupt: Interrupt) -> "Generator[UnitReport, None, None]":
        """Yield the report of every unit; end with every actor gone."""
        ray = self._ray
        heard, said = time.monotonic(), False
        try:
            while self._waiting or self._in_work():
                self._hire()
                done, _ = ray.wait(list(self._calls), num_returns=1, timeout=_TICK_S)
                _obey(interrupt)
                if done or self._in_work():
                    heard = time.monotonic()
                elif not said and time.monotonic() > heard + _SILENCE_S:
                    said = True
                    say(
                        f"no worker of Ray's has begun for {_SILENCE_S:g} s; the cluster has "
                        f"{self._capacity()} {self._resource}, of which each takes one: waiting"
                    )
                for call in done:
                    report = self._hear(call)
                    if report is not None:
                        yield report
            _obey(interrupt)
        finally:
            for actor, _ in self._calls.values():
                with suppress(Exception):  # the connection is gone, and the actor with it
                    ray.kill(actor)
            self._calls.clear()

    def _hire(self) -> None:
        """Start actors for the units that wait, as many as the cluster has room for."""
        wanted = len(self._waiting) + self._in_work()
        if len(self._calls) < wanted:  # asked every time: nodes come and go
            wanted = min(wanted, self._workers or max(1, self._capacity()))
        if self._failed_starts >= _MOST_FAILED_STARTS and self._calls:
            return  # those that did start do the rest
        while len(self._calls) < wanted:
            actor = self._actor.remote(self._job, os.getcwd(), version("worldloom"))
            self._calls[actor.open.remote()] = actor, None

    def _in_work(self) -> int:
        """Return how many units are in work."""
        return sum(unit is not None for _, unit in self._calls.values())

    def _capacity(self) -> int:
        """Return how many actors fit into the cluster as it is now."""
        return int(self._ray.cluster_resources().get(self._resource, 0))

    def _hear(self, call: Any) -> "UnitReport | None":
        """Take what an actor says, give it the next unit or send it away; return its report."""
        ray = self._ray
        actor, unit = self._calls.pop(call)
        try:
            kind, said = ray.get(call)
        except ray.exceptions.RayTaskError:
            raise  # a bug of ours, or of the tokenizer: its traceback is what a person needs
        except ray.exceptions.RayError as error:
            with suppress(Exception):
                ray.kill(actor)  # it may live, unheard, and write the unit that another will
            silent = isinstance(error, ray.exceptions.ActorUnavailableError)
            return self._lost(unit, "its node is silent" if silent else in_a_line(error))
        if kind == "error":
            if unit is None and self._in_work():  # one bad node that joins must not end it all
                return self._lost(None, str(said))
            raise said
        if unit is None:
            self._failed_starts = 0
        if self._waiting:
            following = self._waiting.popleft()
            self._calls[actor.answer.remote(following)] = actor, following
        else:
            ray.kill(actor)
        return said if unit is not None else None

    def _lost(self, unit: int | None, reason: str) -> "UnitReport | None":
        """Hand a unit out again; return its report if it had been finished all the same."""
        if unit is None:
            self._failed_starts += 1
            if self._failed_starts < _MOST_FAILED_STARTS:
                return None
            what = f"Ray's workers failed {self._failed_starts} times to begin ({reason})"
            if not self._calls:
                raise WorldloomError(
                    f"{what}; see that every node has worldloom, and memory enough"
                )
            if self._in_work():
                say(f"{what}; those that did begin go on without them")
            return None
        report = _finished(self._job, unit)
        if report is not None:
            return report
        self._losses[unit] += 1
        if self._losses[unit] == _MOST_TRIES:
            raise WorldloomError(
                f"{shard_name(unit)}: its process died {_MOST_TRIES} times ({reason}); what is "
                "finished is kept. Give a worker more memory, or make units smaller in a new "
                "--output with --shard-episodes or --batch-episodes"
            )
        say(f"{shard_name(unit)}: its process died ({reason}); handed out again")
        self._waiting.appendleft(unit)
        return None


def _obey(interrupt: Interrupt) -> None:
    """End if somebody asked for it."""
    if interrupt.wanted:
        say("stopped; what is finished is kept: run the same command again to continue")
        interrupt.leave()


def _finished(job: "TokenizeJob", unit: int) -> "UnitReport | None":
    """Return the report of a unit whose marker is there: its process died after that."""
    from .tokenize_merge import finished_unit
    from .units import UnitReport

    record = finished_unit(job.output, unit)
    if record is None:
        return None
    return UnitReport(
        index=unit,
        num_episodes=len(record.episodes),
        num_frames=sum(row.num_frames for row in record.episodes),
        size_bytes=record.size_bytes,
        seconds=0.0,
        skipped=record.skipped,
    )
