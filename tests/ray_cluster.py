"""A Ray cluster on this machine, and a tokenizer by which a test sees and steers its workers."""

import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout, suppress
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from worldloom.tokenizer import load_tokenizer

_NODE = {"num_cpus": 1, "object_store_memory": 80 << 20}
_SOON = {  # of a dead node is heard within 3 s and not within 15
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 3,
}


@contextmanager
def ray_cluster() -> Iterator[Any]:
    """Yield a cluster of two nodes with a core each, to which this process is connected."""
    import ray
    from ray.cluster_utils import Cluster

    cluster, handler = None, signal.getsignal(signal.SIGTERM)
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]
    with (
        tempfile.TemporaryDirectory(prefix="wl-cluster-", ignore_cleanup_errors=True) as folder,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        # A cluster's address is written there, and nobody else makes that folder.
        patch.setenv("RAY_TMPDIR", folder)
        Path(folder, "ray").mkdir()
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
        try:
            cluster = Cluster(
                initialize_head=True,
                head_node_args={
                    **_NODE,
                    "include_dashboard": False,
                    "temp_dir": f"{folder}/ray",
                    "_system_config": _SOON,
                },
            )
            cluster.add_node(**_NODE)
            ray.init(cluster.address, log_to_driver=False, logging_level="ERROR")
            signal.signal(signal.SIGTERM, handler)  # Ray puts one of its own there
            # It tells of every worker that is killed, on stdout and whenever it comes to it.
            ray._private.worker._worker_logs_enabled = False
            yield cluster
        finally:
            with redirect_stdout(StringIO()):
                ray.shutdown()
                if cluster is not None:
                    cluster.shutdown()
            signal.signal(signal.SIGTERM, handler)


def add_node(cluster: Any, *, environment: Mapping[str, str] | None = None, **settings: int) -> Any:
    """Have a third node join; its workers find what is added to their environment."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (environment or {}).items():
            patch.setenv(name, value)
        return cluster.add_node(**_NODE | settings)


def parent_of(pid: int) -> int:
    """Return the process that started a process; of a Ray worker, that is its node's raylet."""
    return int(_stat(pid)[1])


def is_running(pid: int) -> bool:
    """Whether a process has not ended."""
    try:
        return _stat(pid)[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # it may end while it is read
        return False


def descendants(pid: int) -> list[int]:
    """Return the processes that a process started, and those that these did."""
    found, parents = [pid], {}
    for child in [int(name) for name in os.listdir("/proc") if name.isdecimal()]:
        with suppress(FileNotFoundError, ProcessLookupError):  # it may end while it is read
            state, parent = _stat(child)[:2]
            if state != "Z":
                parents[child] = int(parent)
    for ancestor in found:  # grows as it goes
        found += [child for child, parent in parents.items() if parent == ancestor]
    return found[1:]


def _stat(pid: int) -> list[str]:
    """What Linux says of a process: its state, its parent, ..."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def wait_until(true: Callable[[], Any], *, timeout_s: float = 180.0) -> Any:
    """Return what `true` returns, once it is."""
    deadline = time.monotonic() + timeout_s
    while not (value := true()):
        assert time.monotonic() < deadline, "what was waited for did not happen"
        time.sleep(0.02)
    return value


class Watch:
    """What a test knows of its workers, and tells them; the folder that `Watched` is loaded from.

    The first `free` encodings go through; then everyone waits until `go`, or dies.
    """

    def __init__(self, folder: Path, model: Path, *, free: int = 0, then: str = "wait") -> None:
        self.folder = folder
        (folder / "calls").mkdir(parents=True)
        (folder / "waiting").mkdir()
        (folder / "devices").mkdir()
        (folder / "model").symlink_to(model)
        (folder / "free").write_text(str(free))
        (folder / then).touch()

    @property
    def tokenizer(self) -> str:
        return f"ray_cluster:Watched={self.folder}"

    @property
    def num_calls(self) -> int:
        return len(os.listdir(self.folder / "calls"))

    @property
    def waiting(self) -> list[int]:
        """Numbers of the processes that wait."""
        return [int(name) for name in os.listdir(self.folder / "waiting")]

    @property
    def devices(self) -> list[tuple[str, str]]:
        """Of every process: the device it was told to compute on, and the GPUs it sees."""
        every = [path.read_text().partition(" ") for path in (self.folder / "devices").iterdir()]
        return [(device, gpus) for device, _, gpus in every]

    def go(self) -> None:
        (self.folder / "wait").unlink()


class Watched:
    """A tokenizer that says which process is at work, and goes on only when it may."""

    def __init__(self, folder: Path, tokenizer: Any) -> None:
        self._folder, self._tokenizer = folder, tokenizer

    @classmethod
    def from_pretrained(cls, folder: Path, /, *, device: str) -> "Watched":
        (folder / "devices" / str(os.getpid())).write_text(
            f"{device} {os.environ.get('CUDA_VISIBLE_DEVICES', '')}"
        )
        return cls(folder, load_tokenizer(folder / "model"))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def open_encoder(self) -> Any:
        calls = self._folder / "calls"
        (calls / f"{os.getpid()}-{time.monotonic_ns()}").touch()
        if len(os.listdir(calls)) > int((self._folder / "free").read_text()):
            if (self._folder / "die").exists():
                os.kill(os.getpid(), signal.SIGKILL)
            mine = self._folder / "waiting" / str(os.getpid())
            mine.touch()
            while (self._folder / "wait").exists():
                time.sleep(0.02)
            with suppress(FileNotFoundError):
                mine.unlink()
        return self._tokenizer.open_encoder()
