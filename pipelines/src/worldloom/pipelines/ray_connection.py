"""An address -> a connection to a Ray cluster, one of our own where there is none; gone afterwards.

    with connected(ray, "auto", num_cpus=0): ...        joins a cluster, and leaves it as it is
    with connected(ray, "", num_cpus=2): ...            starts Ray here, and ends it

Ray prints on stdout, takes SIGTERM for itself, reports on its users and leaves its logs behind.
Here stdout is for results, signals stay ours, and nothing is reported or left.
"""

import importlib
import io
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

from worldloom.common import ConfigError

_KNOCK_S = 10.0
_OBJECT_STORE_BYTES = 80 << 20
"""Ray takes no less than 75 MiB; reports are a few hundred bytes."""
_COLOUR = re.compile(r"\x1b\[[\d;]*m")
_LONGEST_FOLDER = 40
"""Ray puts sockets below its folder, whose paths may have 107 bytes and take up to 66."""


def import_ray() -> Any:
    """Return the module, or say how to get it."""
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise ConfigError(
            f"--engine ray: Ray is not installed here ({error}); pip install 'worldloom[ray]', "
            "or leave --engine out"
        ) from error


@contextmanager
def connected(ray: Any, address: str, /, *, num_cpus: int) -> Iterator[None]:
    """Be connected to a cluster in the block; end what was begun for it, and nothing else.

    Args:
        ray: the module.
        address: of the cluster; "" starts one. A connection that is there already is used.
        num_cpus: how many cores a cluster that is started here offers.

    Raises:
        ConfigError: if nobody answers at the address, or Ray does not start.
    """
    if ray.is_initialized():
        with redirect_stdout(_WithoutRay()):
            yield
        return
    settings: dict[str, Any] = {"address": address}
    folder = None
    try:
        if address:
            _knock(address)
        else:
            folder = _short_folder()
            settings = {
                "address": "local",
                "num_cpus": num_cpus,
                "include_dashboard": False,
                "object_store_memory": _OBJECT_STORE_BYTES,
                "_temp_dir": folder,
            }
            os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # Ray reports on people by default
        with redirect_stdout(_WithoutRay()):
            _connect(ray, settings)
            yield
    finally:
        with redirect_stdout(io.StringIO()):  # Ray's last words are for its logs
            ray.shutdown()
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _connect(ray: Any, settings: dict[str, Any]) -> None:
    """Connect, with our handlers of signals left in place."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(**settings, log_to_driver=False, logging_level="ERROR")
    except SystemExit as stopped:  # how Ray answers SIGTERM while it starts
        raise SystemExit(128 + signal.SIGTERM) from stopped
    except (OSError, RuntimeError, ValueError) as error:
        where = settings["address"]
        raise ConfigError(
            f"--ray-address {where}: Ray does not connect ({in_a_line(error)}); "
            "`ray status` tells if there is a cluster. --engine ray alone starts one here"
            if where != "local"
            else f"--engine ray: Ray does not start here ({in_a_line(error)}); leave --engine "
            "out to use processes"
        ) from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def _knock(address: str) -> None:
    """Refuse an address where nobody listens: Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdecimal():
        return  # "auto", or something that Ray will say what it thinks of
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_KNOCK_S).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"--ray-address {address}: nobody answers there ({error}); a cluster says its "
            "address when it is started, with `ray start --head`"
        ) from error


def _short_folder() -> str:
    """Make a folder for Ray's sockets and logs, which goes again with it."""
    prefix, parent = f"worldloom-ray-{os.getpid()}-", tempfile.gettempdir()
    too_long = len(f"{parent}/{prefix}") + 8 > _LONGEST_FOLDER
    return tempfile.mkdtemp(prefix=prefix, dir="/tmp" if too_long else parent)


def in_a_line(error: BaseException) -> str:
    """Return what an error of Ray's says, which goes on for paragraphs."""
    plain = _COLOUR.sub("", str(error))
    lines = [line.strip().rstrip(".") for line in plain.splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    # Where an actor failed to begin, a traceback follows, whose last line is the cause.
    return lines[-1 if "creation task" in lines[0] else 0]


class _WithoutRay(io.TextIOBase):
    """Standard output but for what Ray's threads print there; results go to stdout."""

    def __init__(self) -> None:
        self._stdout = sys.stdout

    def write(self, text: str, /) -> int:
        """Pass on what is not of a thread of Ray's."""
        if threading.current_thread().name.startswith("ray_"):
            return len(text)
        return self._stdout.write(text)

    def flush(self) -> None:
        """Flush what was passed on."""
        self._stdout.flush()
