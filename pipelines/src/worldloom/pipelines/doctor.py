"""This machine -> what it has, what it lacks, and the command that mends each lack.

    installed packages, devices, codecs, disk  ->  examine  ->  Diagnosis, as text or JSON

What is required is read from the requirements of our own distributions, so it stands nowhere twice.
"""

import os
import platform
import re
import shutil
import time
import warnings
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from worldloom.common import to_json

from .info_text import format_bytes

_OURS = ("worldloom-common", "worldloom-tokenizer", "worldloom-dynamics", "worldloom")
_MODULES = {"pillow": "PIL"}
"""Where a distribution's module is not its name with underscores."""
_EXTRAS = {
    "vizdoom": ("VizDoom, what the demo plays", 'pip install "vizdoom>=1.3"'),
    "ale-py": ("Atari games for `record`", 'pip install "ale-py>=0.11"'),
    "minigrid": ("grid worlds for `record`", 'pip install "minigrid>=3"'),
    "starlette": ("`play` in a browser", 'pip install "starlette>=0.40"'),
    "uvicorn": ("`play` in a browser", 'pip install "uvicorn>=0.30"'),
    "websockets": ("`play` in a browser", 'pip install "websockets>=13"'),
    "ray": ("`tokenize --engine ray`", 'pip install "ray>=2.40"'),
    "h5py": ("Minari data for `ingest`", 'pip install "h5py>=3.10"'),
    "pyarrow": ("LeRobot data for `ingest`", 'pip install "pyarrow>=15"'),
    "tensorboard": ("curves of `train-dynamics`", 'pip install "tensorboard>=2.16"'),
}
_DEMO_BYTES = 2_000_000_000
"""Room that a demo and a checkpoint or two take, with some to spare."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DoctorConfig:
    """Say what this machine has, what it lacks, and the command that mends it.

        worldloom doctor

    Reads the installation, writes nothing. Ends with 1 if something required is missing.
    """

    json: bool = False
    """Print JSON with stable keys instead of text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was looked at."""

    group: str
    name: str
    found: str
    """What is there; empty if it is missing."""
    required: bool
    mend: str = ""
    """The command, or the step, that brings what is missing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """All findings; prints as text or JSON, and knows how the command should end."""

    findings: tuple[Finding, ...]
    as_json: bool

    @property
    def exit_code(self) -> int:
        """1 if something required is missing, else 0."""
        return int(any(row.required and not row.found for row in self.findings))

    def __str__(self) -> str:
        """Return the findings as aligned text, or as JSON."""
        if self.as_json:
            rows = [asdict(row) for row in self.findings]
            return to_json({"ok": self.exit_code == 0, "findings": rows}).rstrip()
        width = max(len(row.name) for row in self.findings)
        lines: list[str] = []
        group = ""
        for row in self.findings:
            if row.group != group:
                group = row.group
                lines += [*([""] if lines else []), group]
            missing = "MISSING" if row.required else "missing, optional"
            lines.append(f"  {row.name:<{width}}  {row.found or missing}")
            if row.mend:
                lines.append(f"  {'':<{width}}  -> {row.mend}")
        verdict = (
            "something required is missing" if self.exit_code else "all that is required is here"
        )
        return "\n".join([*lines, "", verdict])


def doctor(config: DoctorConfig) -> Diagnosis:
    """Examine this machine; the result's exit code is 1 if something required is missing."""
    findings = [_python(), *_packages(), *_devices(), *_codecs(), *_extras(), _disk(Path.cwd())]
    return Diagnosis(findings=tuple(findings), as_json=config.json)


def _python() -> Finding:
    found = f"{platform.python_version()} ({platform.platform()})"
    return Finding(group="versions", name="python", found=found, required=True)


def _packages() -> list[Finding]:
    """Look for every package that our distributions require, imported to see that it works."""
    wanted: dict[str, str] = {}
    findings = []
    for ours in _OURS:
        try:
            needs = requires(ours) or []
            found = version(ours)
        except PackageNotFoundError:
            needs, found = [], ""
        mend = "" if found else "make setup, in a checkout of worldloom"
        findings.append(Finding(group="versions", name=ours, found=found, required=True, mend=mend))
        for need in needs:
            name, floor = _requirement(need)
            if "extra ==" not in need and name not in _OURS:
                wanted[name] = max(wanted.get(name, ""), floor, key=_numbers)
    return findings + [_package(name, wanted[name]) for name in sorted(wanted)]


def _requirement(text: str) -> tuple[str, str]:
    """Return the name and the least version of "torch>=2.10"."""
    found = re.match(r"([\w.-]+)(?:\[[^]]*\])?\s*(?:>=\s*([\w.]+))?", text)
    assert found is not None  # metadata of our own, written by a build tool
    return found[1].lower(), found[2] or "0"


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text.partition("+")[0]))


def _package(name: str, floor: str) -> Finding:
    """Look for a package that is required."""
    found, problem = _look(name, floor)
    mend = f'pip install "{name}>={floor}"   ({problem})' if problem else ""
    return Finding(group="versions", name=name, found=found, required=True, mend=mend)


def _look(name: str, floor: str) -> tuple[str, str]:
    """Return the version of a package that is there and can be imported, or "" and the problem."""
    try:
        found = version(name)
    except PackageNotFoundError:
        return "", "not installed"
    if _numbers(found) < _numbers(floor):
        return "", f"{found} is too old"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # advice to the authors of other packages
            import_module(_MODULES.get(name, name.replace("-", "_")))
    except Exception as error:  # whatever a broken installation raises is the finding
        return "", f"{found} is installed, but its import fails: {error!s:.120}"
    return found, ""


def _devices() -> list[Finding]:
    """Describe the processor, memory and accelerators, and measure bfloat16."""
    try:
        import torch
    except ImportError:
        return []  # the versions above say that torch is missing, and how to mend it

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = {"cpu": f"{usable} cores usable, torch uses {torch.get_num_threads()} threads"}
    if "SC_PHYS_PAGES" in os.sysconf_names:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        found["memory"] = format_bytes(memory)
    cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    found["cuda"] = ", ".join(f"{c.name} {format_bytes(c.total_memory)}" for c in cards) or "none"
    found["mps"] = "yes" if torch.backends.mps.is_available() else "none"
    found["bfloat16"] = _bfloat16("cuda" if cards else "cpu")
    return [
        Finding(group="devices", name=name, found=text, required=False)
        for name, text in found.items()
    ]


def _bfloat16(device: str) -> str:
    """Say how a matrix product in bfloat16 compares with float32 here, from half a second."""
    import torch

    rates = {}
    for dtype in (torch.float32, torch.bfloat16):
        matrix = torch.ones(512, 512, dtype=dtype, device=device)
        matrix @ matrix  # the first product pays for setting up
        products, started = 0, time.perf_counter()
        while time.perf_counter() - started < 0.25:
            (matrix @ matrix)[0, 0].item()  # reading a number waits for the device
            products += 1
        rates[dtype] = products / (time.perf_counter() - started)
    ratio = rates[torch.bfloat16] / rates[torch.float32]
    return f"matrix products at {ratio:.2f} times the speed of float32 on {device}"


def _codecs() -> list[Finding]:
    """Look for the encoders and decoders that PyAV brings."""
    try:
        from av.codec import Codec
        from av.codec.codec import UnknownCodecError
    except ImportError:
        return []  # as with torch
    findings = []
    for name, codec, required in (
        ("h264 encoder", "libx264", True),
        ("h264 decoder", "h264", True),
        ("av1 decoder", "libdav1d", False),
    ):
        try:
            found = Codec(codec, "w" if name.endswith("encoder") else "r").long_name
        except UnknownCodecError:
            found = ""
        mend = "" if found else "pip install --force-reinstall --only-binary av av"
        findings.append(
            Finding(group="codecs", name=name, found=found, required=required, mend=mend)
        )
    return findings


def _extras() -> list[Finding]:
    """Look for what some commands can use."""
    findings = []
    for name, (use, command) in _EXTRAS.items():
        found, problem = _look(name, "0")
        mend = f"{command}   ({problem}; {use})" if problem else ""
        findings.append(Finding(group="extras", name=name, found=found, required=False, mend=mend))
    return findings


def _disk(folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free
    mend = "" if free > _DEMO_BYTES else f"make room: a demo takes {format_bytes(_DEMO_BYTES)}"
    found = f"{format_bytes(free)} free here"
    return Finding(group="disk", name="free", found=found, required=False, mend=mend)
