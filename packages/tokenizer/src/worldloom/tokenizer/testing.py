"""Does a tokenizer keep its promises? A conformance suite, for anybody's.

    tokenizer  ->  check_tokenizer  ->  a Report of what holds; or a ConformanceError, with a
                                        sentence for every broken promise and what was seen

    python -m worldloom.tokenizer.testing patch
    python -m worldloom.tokenizer.testing my_package.codec:Codec=FOLDER

prints one line a promise and exits with 0, or with 3 if one is broken. Where a promise cannot hold
because another is broken, only that other one is named: what depends on it is not judged.

All comparisons are exact but one. With another number of videos side by side (B) a library may
take another kernel, whose last bit differs, and a latent that lies between two codes may get the
other's; so with another B, one code in a hundred may differ. With the same B none may.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from worldloom.common import ShapeError, TokenizerSpec, WorldloomError, bind_shape

from .promises import PROMISES, Broken, Promise, Subject
from .protocol import VideoTokenizer
from .registry import load_tokenizer


class ConformanceError(WorldloomError):
    """A tokenizer breaks promises; the message names each, and `report` has them all."""

    exit_code = 3

    def __init__(self, report: "Report") -> None:
        super().__init__(report.describe_broken())
        self.report = report


@dataclass(frozen=True, slots=True)
class Finding:
    """What came of one promise."""

    name: str
    """One or two words, such as "future leak"."""
    promise: str
    """The promise, as a sentence."""
    seen: str = ""
    """What was seen instead; empty if the promise holds."""
    waits_for: str = ""
    """Why it was not judged: the name of a broken promise that it depends on."""

    @property
    def verdict(self) -> str:
        """One of "ok", "broken" and "not judged"."""
        return "not judged" if self.waits_for else "broken" if self.seen else "ok"

    def __str__(self) -> str:
        """Return one line."""
        because = f" (waits for {self.waits_for})" if self.waits_for else ""
        seen = f" Seen: {self.seen}" if self.seen else ""
        return f"{self.verdict:<10}  {self.name}: {self.promise}.{seen}{because}"


@dataclass(frozen=True, slots=True)
class Report:
    """What came of every promise, in order."""

    tokenizer: str
    """Its class and kind."""
    findings: tuple[Finding, ...]

    @property
    def broken(self) -> tuple[str, ...]:
        """Names of the promises that do not hold."""
        return tuple(finding.name for finding in self.findings if finding.verdict == "broken")

    @property
    def kept(self) -> tuple[str, ...]:
        """Names of the promises that hold."""
        return tuple(finding.name for finding in self.findings if finding.verdict == "ok")

    def describe_broken(self) -> str:
        """Return a sentence for every broken promise, and the names of those that wait for it."""
        lines = [f"{self.tokenizer}: breaks {len(self.broken)} of {len(self.findings)} promises"]
        lines += [
            f"  {finding.name}: {finding.promise}. Seen: {finding.seen}"
            for finding in self.findings
            if finding.verdict == "broken"
        ]
        waiting = [finding.name for finding in self.findings if finding.waits_for]
        if waiting:
            lines.append(f"  not judged while that is so: {', '.join(waiting)}")
        return "\n".join(lines)

    def __str__(self) -> str:
        """Return one line a promise."""
        return "\n".join(map(str, self.findings))


def check_tokenizer(
    tokenizer: VideoTokenizer, /, *, frames: Tensor | None = None, seed: int = 0
) -> Report:
    """Check every promise of `VideoTokenizer` on a few short videos; return what was checked.

    It encodes and decodes a few dozen times 2 videos of 4 r frames, and leaves the tokenizer as it
    was.

    Args:
        tokenizer: anybody's. Left in training mode, it must still not change by being used.
        frames: frames_BTHWC of yours, uint8 of the spec's size, B at least 2 and T at least 4 r;
            the first of each are taken. By default random blocks of colour.
        seed: of the random frames and splits.

    Raises:
        ConformanceError: naming every promise that is broken.
        ShapeError: if `frames` are not as described.
    """
    spec = getattr(tokenizer, "spec", None)
    if frames is not None and isinstance(spec, TokenizerSpec):
        _require_enough(frames, spec)
    subject = Subject(tokenizer, frames, seed)
    findings: dict[str, Finding] = {}
    with torch.no_grad():
        for promise in PROMISES:
            findings[promise.name] = _judge(promise, subject, findings)
    name = getattr(spec, "name", "?")
    report = Report(f"{type(tokenizer).__name__} ({name})", tuple(findings.values()))
    if report.broken:
        raise ConformanceError(report)
    return report


def main(argv: Sequence[str] | None = None) -> int:
    """Check the tokenizer that a person names; print a line a promise; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m worldloom.tokenizer.testing",
        description="Check every promise of a tokenizer, one line each.",
    )
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="a model directory, an installed name, module:Class or module:Class=FOLDER",
    )
    parser.add_argument("--device", default="cpu", help="where it computes (cpu)")
    parser.add_argument("--seed", type=int, default=0, help="of the random frames (0)")
    asked = parser.parse_args(argv)
    try:
        report = check_tokenizer(load_tokenizer(asked.source, device=asked.device), seed=asked.seed)
    except ConformanceError as error:
        sys.stdout.write(f"{error.report}\n")
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    except WorldloomError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    sys.stdout.write(f"{report}\n")
    return 0


def _judge(promise: Promise, subject: Subject, findings: dict[str, Finding]) -> Finding:
    """Return what comes of one promise, given what came of those before."""
    for needed in promise.needs:
        if findings[needed].verdict != "ok":
            root = findings[needed].waits_for or needed
            return Finding(promise.name, promise.promise, waits_for=root)
    try:
        promise.check(subject)
    except Broken as broken:
        return Finding(promise.name, promise.promise, seen=str(broken))
    except Exception as error:  # anybody's code may raise anything, and that is an answer
        seen = f"{type(error).__name__}: {str(error) or 'without a message'}"
        return Finding(promise.name, promise.promise, seen=" ".join(seen.split())[:400])
    return Finding(promise.name, promise.promise)


def _require_enough(frames_BTHWC: Tensor, spec: TokenizerSpec) -> None:
    """Refuse frames of the caller's that are too few, or not the tokenizer's."""
    size = bind_shape("frames", frames_BTHWC, "B T H W C", H=spec.height, W=spec.width, C=3)
    least = 4 * spec.codes.frames_per_latent
    if size["B"] < 2 or size["T"] < least or frames_BTHWC.dtype != torch.uint8:
        raise ShapeError(
            f"frames: {size['B']} videos of {size['T']} frames, {frames_BTHWC.dtype}; to check a "
            f"tokenizer takes at least 2 videos of {least} frames, torch.uint8"
        )


if __name__ == "__main__":
    sys.exit(main())
