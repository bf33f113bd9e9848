"""What every tokenizer promises, and how each promise is put to the test.

    a tokenizer, a few frames  ->  Subject  ->  each of PROMISES  ->  None, or Broken: what was seen

`testing` runs them all and tells. Those with `needs` say nothing while another one is broken.
"""

import inspect
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from worldloom.common import FormatError, ShapeError, TokenizerSpec

from .protocol import VideoTokenizer
from .registry import members

OTHER_B_SHARE = 0.01
"""Codes, and pixels by more than one grey level, that may differ with another B."""

_MAX_LATENT_FRAMES = 1024  # to show every code to the decoder; a larger vocabulary is sampled
_REFUSALS = (ShapeError, FormatError, ValueError)


class Broken(Exception):  # noqa: N818 - an answer, not an error
    """What was seen instead of what was promised."""


class Subject:
    """The tokenizer under test, with frames for it and what it makes of them."""

    def __init__(self, tokenizer: VideoTokenizer, frames: Tensor | None, seed: int, /) -> None:
        self.tokenizer = tokenizer
        self.seed = seed
        self._given = frames

    @cached_property
    def spec(self) -> TokenizerSpec:
        """What it says of itself, when first asked."""
        return self.tokenizer.spec

    @property
    def r(self) -> int:
        """Frames per latent frame after the first."""
        return self.spec.codes.frames_per_latent

    @cached_property
    def frames(self) -> Tensor:
        """Two videos of T = 4 r: 4 full latent frames and, if r > 1, one that is not."""
        if self._given is not None:
            return self._given[:2, : 4 * self.r].cpu()
        return random_frames(2, 4 * self.r, self.spec.height, self.spec.width, seed=self.seed)

    @property
    def full(self) -> Tensor:
        """The first 1 + 3 r of the frames: 4 full latent frames."""
        return self.frames[:, : 1 + 3 * self.r]

    @cached_property
    def codes(self) -> Tensor:
        """Codes of the full latent frames, as int64: a wrong dtype is one promise, not all."""
        return self.encode(self.full).to(torch.int64)

    @cached_property
    def decoded(self) -> Tensor:
        """What the codes decode to."""
        return self.decode(self.codes)

    def encode(self, frames_BTHWC: Tensor, /) -> Tensor:
        """Return codes of whole videos, on the CPU."""
        return self.tokenizer.encode(frames_BTHWC).cpu()

    def decode(self, codes: Tensor, num_frames: int | None = None, /) -> Tensor:
        """Return all that the codes cover, or so many frames, on the CPU."""
        covered = self.spec.codes.pixel_frames(codes.shape[1])
        return self.tokenizer.decode(codes, num_frames=num_frames or covered).cpu()

    def encode_pieces(self, pieces: Iterable[Tensor], /) -> tuple[list[Tensor], Tensor]:
        """Return what each push gave, and the flush."""
        session = self.tokenizer.open_encoder()
        pushed = [session.push(piece).cpu() for piece in pieces]
        return pushed, session.flush().cpu()

    def other_codes(self, codes: Tensor, /) -> Tensor:
        """Return codes that all differ from these."""
        return (codes + 1) % self.spec.codes.vocab_size

    def sizes(self, total: int, /) -> list[list[int]]:
        """Return ways to cut `total` frames: one by one, at once, at random, also to nothing."""
        generator = torch.Generator().manual_seed(self.seed)
        cuts = [
            sorted(torch.randint(0, total + 1, (4,), generator=generator).tolist())
            for _ in range(3)
        ]
        drawn = [
            [stop - start for start, stop in zip([0, *cut], [*cut, total], strict=True)]
            for cut in cuts
        ]
        return [[1] * total, [total], *drawn]


def random_frames(
    num_videos: int, num_frames: int, height: int, width: int, /, *, seed: int
) -> Tensor:
    """Return frames_BTHWC, uint8: blocks of 4 x 4 pixels of random colours, and a little noise."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = -(-height // 4), -(-width // 4)
    shape = (num_videos, num_frames, rows, columns, 3)
    blocks = torch.randint(16, 240, shape, generator=generator)
    blocks = blocks.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)[:, :, :height, :width]
    noise = torch.randint(-16, 16, blocks.shape, generator=generator)
    return (blocks + noise).to(torch.uint8)


@dataclass(frozen=True, slots=True)
class Promise:
    """One thing that every tokenizer does."""

    name: str
    """One or two words."""
    promise: str
    """A sentence, without its full stop."""
    check: Callable[[Subject], None]
    """Raises Broken with what was seen."""
    needs: tuple[str, ...] = ()
    """Promises without which this one says nothing."""


def _require_same(found: Tensor, wanted: Tensor, what: str) -> None:
    """Refuse a tensor that differs in a shape or a value."""
    if found.shape != wanted.shape:
        raise Broken(f"{what}: shape {tuple(found.shape)} rather than {tuple(wanted.shape)}")
    differ = int((found != wanted).sum())
    if differ:
        raise Broken(f"{what}: {differ} of {wanted.numel()} values differ")


def _members(subject: Subject) -> None:
    missing = [name for name in members() if not hasattr(subject.tokenizer, name)]
    if missing:
        raise Broken(f"it lacks {', '.join(missing)}")


def _spec(subject: Subject) -> None:
    spec = subject.tokenizer.spec
    if not isinstance(spec, TokenizerSpec):
        raise Broken(f"spec is a {type(spec).__name__}")
    TokenizerSpec.from_dict(spec.to_dict(), where="spec")
    if subject.tokenizer.spec != spec:
        raise Broken("spec is another each time it is asked for")
    if subject.tokenizer.fingerprint() != spec.fingerprint:
        raise Broken(
            f"fingerprint() is {subject.tokenizer.fingerprint()!r:.70}, spec.fingerprint "
            f"{spec.fingerprint}"
        )


def _codebook(subject: Subject) -> None:
    codebook, codes = subject.tokenizer.codebook, subject.spec.codes
    levels = (codes.num_levels,) if codes.num_levels > 1 else ()
    wanted = (*levels, codes.vocab_size, codes.code_dim)
    if not isinstance(codebook, Tensor):
        raise Broken(f"codebook is a {type(codebook).__name__}")
    if tuple(codebook.shape) != wanted:
        raise Broken(f"shape {tuple(codebook.shape)}, the spec says {wanted}")
    if codebook.dtype != torch.float32:
        raise Broken(f"dtype {codebook.dtype}")
    if not torch.isfinite(codebook).all():
        raise Broken("not every number in it is finite")


def _grid(subject: Subject) -> None:
    spec = subject.spec.codes
    for k in range(4):
        found = tuple(subject.encode(subject.frames[:, : 1 + k * subject.r]).shape)
        wanted = (2, *spec.codes_shape(k + 1))
        if found != wanted:
            raise Broken(
                f"2 videos of {1 + k * subject.r} frames became codes of shape {found}, the spec "
                f"says {wanted}"
            )


def _dtype(subject: Subject) -> None:
    pushed, flushed = subject.encode_pieces([subject.full])
    gave = {"encode": subject.encode(subject.full), "push": pushed[0], "flush": flushed}
    for what, codes in gave.items():
        if codes.dtype != torch.int64:
            raise Broken(f"{what} gives {codes.dtype}")


def _range(subject: Subject) -> None:
    low, high = int(subject.codes.min()), int(subject.codes.max())
    if not 0 <= low <= high < subject.spec.codes.vocab_size:
        raise Broken(f"codes in [{low}, {high}], where V is {subject.spec.codes.vocab_size}")


def _informative(subject: Subject) -> None:
    low, high = int(subject.codes.min()), int(subject.codes.max())
    if low == high and subject.spec.codes.vocab_size > 1:
        raise Broken(
            f"every cell of every frame got the code {low}, so nothing else can be judged; train "
            "it, or check it with frames=... of your own"
        )


def _frames(subject: Subject) -> None:
    spec = subject.spec
    wanted = (2, spec.codes.pixel_frames(4), spec.height, spec.width, 3)
    pushed = subject.tokenizer.open_decoder().push(subject.codes)
    for what, frames in (("decode", subject.decoded), ("push", pushed)):
        if tuple(frames.shape) != wanted:
            raise Broken(f"{what} gives shape {tuple(frames.shape)}, the spec says {wanted}")
        if frames.dtype != torch.uint8:
            raise Broken(f"{what} gives {frames.dtype}")


def _unchanged(subject: Subject) -> None:
    tokenizer: Any = subject.tokenizer
    training = getattr(tokenizer, "training", None)
    if not isinstance(training, bool):  # no torch module, so there is but one mode
        _require_unchanged(subject, "")
        return
    try:
        for mode in (False, True):
            tokenizer.train(mode)
            _require_unchanged(subject, " in training mode" if mode else "")
    finally:
        tokenizer.train(training)


def _require_unchanged(subject: Subject, when: str) -> None:
    """Use the tokenizer, and refuse one that is another afterwards."""
    before = _state(subject.tokenizer)
    subject.decode(subject.encode(subject.full).to(torch.int64))
    subject.encode_pieces([subject.frames])
    after = _state(subject.tokenizer)
    changed = [
        name
        for name in sorted(before.keys() | after.keys())
        if not _equal(before.get(name), after.get(name))
    ]
    if changed:
        raise Broken(f"{', '.join(changed[:4])} changed by encoding and decoding{when}")


def _state(tokenizer: Any) -> dict[str, Any]:
    """Return copies of everything that use must not change."""
    state = {"codebook": tokenizer.codebook.clone(), "fingerprint": tokenizer.fingerprint()}
    if callable(getattr(tokenizer, "state_dict", None)):
        state |= {
            name: value.clone() if isinstance(value, Tensor) else value
            for name, value in tokenizer.state_dict().items()
        }
    return state


def _equal(one: Any, other: Any) -> bool:
    """Whether two states are the same to the bit."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    return bool(one == other)


def _repeatable(subject: Subject) -> None:
    _require_same(subject.encode(subject.full), subject.codes, "the same frames encoded again")
    _require_same(subject.decode(subject.codes), subject.decoded, "the same codes decoded again")


def _stable(subject: Subject) -> None:
    codes, decoded = subject.codes, subject.decoded
    pieces = _every_code(subject)[:4]
    book, shown = subject.tokenizer.codebook.clone(), [subject.decode(piece) for piece in pieces]
    subject.encode(255 - subject.frames)
    subject.encode(subject.frames.flip(1)[:1])
    subject.decode(subject.other_codes(codes)[:1])
    _require_same(subject.encode(subject.full), codes, "codes of frames encoded before")
    _require_same(subject.decode(codes), decoded, "frames of codes decoded before")
    _require_same(subject.tokenizer.codebook, book, "the codebook")
    for piece, before in zip(pieces, shown, strict=True):
        _require_same(subject.decode(piece), before, "frames of every code")


def _future(subject: Subject) -> None:
    codes = subject.encode(subject.frames)  # of all frames: a leak is no matter of their number
    for k in range(4):
        first = 1 + k * subject.r
        for changed in (255 - subject.frames, torch.full_like(subject.frames, 255)):
            mixed = torch.cat([subject.frames[:, :first], changed[:, first:]], dim=1)
            _require_same(
                subject.encode(mixed)[:, : k + 1],
                codes[:, : k + 1],
                f"codes of frames 0 to {first - 1} after all later ones were changed",
            )


def _prefix(subject: Subject) -> None:
    for k in range(3):
        found = subject.encode(subject.frames[:, : 1 + k * subject.r])
        _require_same(found, subject.codes[:, : k + 1], f"codes of the first {1 + k * subject.r}")


def _one_frame(subject: Subject) -> None:
    frame = subject.frames[:, :1]
    codes = subject.encode(frame)
    _require_same(codes, subject.codes[:, :1], "codes of a first frame alone")
    pushed, flushed = subject.encode_pieces([frame])
    _require_same(torch.cat([*pushed, flushed], dim=1), codes, "codes of one pushed frame")
    shape = tuple(subject.decode(codes, 1).shape)
    if shape != tuple(frame.shape):
        raise Broken(f"its codes decode to shape {shape} rather than {tuple(frame.shape)}")


def _batch(subject: Subject) -> None:
    for row in range(2):
        others = 255 - subject.full
        others[row] = subject.full[row]
        found = subject.encode(others)[row]
        _require_same(found, subject.codes[row], "codes of a video beside another one")
        codes = subject.other_codes(subject.codes)
        codes[row] = subject.codes[row]
        _require_same(
            subject.decode(codes)[row], subject.decoded[row], "frames of a video beside another one"
        )


def _batch_size(subject: Subject) -> None:
    for count in (1, 3):
        frames = torch.cat([subject.full, 255 - subject.full])[:count]
        codes = torch.cat([subject.codes, subject.codes])[:count]
        rows = min(count, 2)
        differ = subject.encode(frames)[:rows] != subject.codes[:rows]
        apart = subject.decode(codes)[:rows].int() - subject.decoded[:rows].int()
        for what, wrong in (("codes", differ), ("pixels, by more than 1,", apart.abs() > 1)):
            allowed = max(1, int(OTHER_B_SHARE * wrong.numel()))
            if int(wrong.sum()) > allowed:
                raise Broken(
                    f"with B = {count} rather than 2, {int(wrong.sum())} of {wrong.numel()} "
                    f"{what} differ; {allowed} may"
                )


def _encode_split(subject: Subject) -> None:
    for sizes in subject.sizes(subject.full.shape[1]):
        pushed, flushed = subject.encode_pieces(torch.split(subject.full, sizes, dim=1))
        codes = torch.cat([*pushed, flushed], dim=1)
        _require_same(codes, subject.codes, f"codes of frames pushed {sizes} at a time")
        come, due = 0, 0
        for size, piece in zip(sizes, pushed, strict=True):
            come, due = come + piece.shape[1], due + size
            certain = 1 + (due - 1) // subject.r if due else 0
            if come != certain:
                raise Broken(
                    f"after {due} frames pushed {sizes} at a time, {come} latent frames had come; "
                    f"{certain} were certain"
                )


def _flush(subject: Subject) -> None:
    for extra in range(subject.r):
        frames = subject.frames[:, : 1 + 3 * subject.r - extra]
        filled = torch.cat([frames, frames[:, -1:].expand(-1, extra, -1, -1, -1)], dim=1)
        wanted = subject.encode(filled)
        _require_same(subject.encode(frames), wanted, f"codes of {frames.shape[1]} frames")
        for sizes in subject.sizes(frames.shape[1])[:3]:
            pushed, flushed = subject.encode_pieces(torch.split(frames, sizes, dim=1))
            if flushed.shape[1] != (extra > 0):
                raise Broken(
                    f"after {frames.shape[1]} frames, flush gave {flushed.shape[1]} latent frames "
                    f"rather than {int(extra > 0)}"
                )
            codes = torch.cat([*pushed, flushed], dim=1)
            _require_same(codes, wanted, f"codes of {frames.shape[1]} frames pushed and flushed")


def _decode_causal(subject: Subject) -> None:
    codes = subject.codes
    for k in range(1, 4):
        mixed = torch.cat([codes[:, :k], subject.other_codes(codes[:, k:])], dim=1)
        known = subject.spec.codes.pixel_frames(k)
        _require_same(
            subject.decode(mixed)[:, :known],
            subject.decoded[:, :known],
            f"frames 0 to {known - 1} after the codes of all later ones were changed",
        )
        _require_same(
            subject.decode(codes[:, :k]), subject.decoded[:, :known], f"the first {k} alone"
        )


def _trim(subject: Subject) -> None:
    for num_frames in range(1, subject.decoded.shape[1] + 1):
        found = subject.decode(subject.codes, num_frames)
        _require_same(found, subject.decoded[:, :num_frames], f"num_frames={num_frames}")


def _decode_split(subject: Subject) -> None:
    for sizes in subject.sizes(4):
        session = subject.tokenizer.open_decoder()
        pieces = torch.split(subject.codes, sizes, dim=1)
        pushed = [session.push(piece).cpu() for piece in pieces]
        what = f"frames of codes pushed {sizes} at a time"
        _require_same(torch.cat(pushed, dim=1), subject.decoded, what)
        come = [frames.shape[1] for frames in pushed]
        ends = [sum(sizes[: index + 1]) for index in range(len(sizes))]
        totals = [subject.spec.codes.pixel_frames(end) if end else 0 for end in ends]
        due = [total - before for total, before in zip(totals, [0, *totals], strict=False)]
        if come != due:
            raise Broken(f"codes pushed {sizes} at a time came as {come} frames, due were {due}")


def _every_code(subject: Subject) -> list[Tensor]:
    """Return pieces of codes_Bthw, B = 1, in which every code comes (at most 1,024 frames)."""
    spec = subject.spec.codes
    t = min(-(-spec.vocab_size // spec.cells), _MAX_LATENT_FRAMES)
    count = t * spec.cells
    if count < spec.vocab_size:
        codes = torch.linspace(0, spec.vocab_size - 1, count, dtype=torch.float64).long()
    else:
        codes = torch.arange(count) % spec.vocab_size
    codes_thw = codes.reshape(t, spec.grid_height, spec.grid_width)
    if spec.num_levels > 1:
        # A different code at every level, and every code at each.
        levels = [(codes_thw + level) % spec.vocab_size for level in range(spec.num_levels)]
        codes_thw = torch.stack(levels, dim=-1)
    return list(torch.split(codes_thw[None], 16, dim=1))


def _vocabulary_decodes(subject: Subject) -> None:
    for codes in _every_code(subject):
        frames = subject.decode(codes)
        wanted = subject.spec.codes.pixel_frames(codes.shape[1])
        if frames.shape[1] != wanted:
            raise Broken(f"{codes.shape[1]} latent frames became {frames.shape[1]} frames")


def _bad_frames(subject: Subject) -> None:
    good = subject.frames[:, :1]
    empty = good[:, :0]
    cases: dict[str, Callable[[], object]] = {
        "frames a pixel too high": lambda: subject.encode(_longer(good, 2)),
        "frames a pixel too wide": lambda: subject.encode(_longer(good, 3)),
        "frames of 4 channels": lambda: subject.encode(_longer(good, 4)),
        "frames without the batch axis": lambda: subject.encode(good[0]),
        "float32 frames": lambda: subject.encode(good.float()),
        "zero frames": lambda: subject.encode(empty),
        "zero videos": lambda: subject.encode(good[:0]),
        "a push of frames a pixel too wide": lambda: subject.encode_pieces([_longer(good, 3)]),
        "a push of float32 frames": lambda: subject.encode_pieces([good.float()]),
    }
    _require_refused(cases)


def _bad_codes(subject: Subject) -> None:
    good, vocab_size = subject.codes, subject.spec.codes.vocab_size
    high, low = good.clone(), good.clone()
    high.flatten()[-1], low.flatten()[0] = vocab_size, -1
    covered = subject.decoded.shape[1]

    def push(codes: Tensor) -> Tensor:
        return subject.tokenizer.open_decoder().push(codes)

    cases: dict[str, Callable[[], object]] = {
        f"a code of {vocab_size}, V,": lambda: subject.decode(high),
        "a code of -1": lambda: subject.decode(low),
        "codes a column too wide": lambda: subject.decode(_longer(good, 3)),
        "codes a row too high": lambda: subject.decode(_longer(good, 2)),
        "codes without the batch axis": lambda: subject.decode(good[0], 1),
        "float32 codes": lambda: subject.decode(good.float()),
        "zero codes": lambda: subject.decode(good[:, :0], 1),
        "num_frames=0": lambda: subject.tokenizer.decode(good, num_frames=0),
        f"num_frames={covered + 1} of {covered}": lambda: subject.decode(good, covered + 1),
        f"a push of a code of {vocab_size}, V,": lambda: push(high),
        "a push of codes a column too wide": lambda: push(_longer(good, 3)),
        "a push of float32 codes": lambda: push(good.float()),
    }
    _require_refused(cases)


def _longer(tensor: Tensor, axis: int) -> Tensor:
    """Return a tensor whose axis is one longer."""
    return torch.cat([tensor, tensor.narrow(axis, 0, 1)], dim=axis)


def _require_refused(cases: dict[str, Callable[[], object]]) -> None:
    """Refuse what accepts bad input, or refuses it other than with a sentence."""
    seen = []
    for what, attempt in cases.items():
        try:
            attempt()
        except _REFUSALS as refusal:
            if len(str(refusal).split()) < 3:
                seen.append(f"{what} refused with {str(refusal)!r}, which is no sentence")
        except Exception as error:  # anybody's code may raise anything, and that is an answer
            seen.append(f"{what} ended in {type(error).__name__}: {error}")
        else:
            seen.append(f"{what} accepted")
    if seen:
        raise Broken("; ".join(" ".join(text.split())[:120] for text in seen))


def _saved(subject: Subject) -> None:
    tokenizer: Any = subject.tokenizer
    if not hasattr(tokenizer, "save") or not hasattr(tokenizer, "from_pretrained"):
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        try:
            inspect.signature(tokenizer.save).bind(folder, card="")
        except TypeError as error:
            raise Broken(f"it has a save, but not save(folder, card=...): {error}") from error
        tokenizer.save(folder, card="")
        device = str(tokenizer.codebook.device)
        loaded = type(tokenizer).from_pretrained(folder, device=device)
        if loaded.spec != tokenizer.spec:
            raise Broken("what was loaded has another spec")
        _require_same(loaded.codebook.cpu(), tokenizer.codebook.cpu(), "the loaded codebook")
        _require_same(loaded.encode(subject.full).cpu(), subject.codes, "codes of what was loaded")


_STABLE = ("stable index",)
PROMISES = (
    Promise("members", "it has every member of VideoTokenizer", _members),
    Promise(
        "spec",
        "spec is a TokenizerSpec, always the same, and fingerprint() is the one in it",
        _spec,
        ("members",),
    ),
    Promise(
        "codebook",
        "codebook is codebook_VZ, or codebook_QVZ with Q levels, finite float32",
        _codebook,
        ("spec",),
    ),
    Promise(
        "grid",
        "1 + k r frames become k + 1 latent frames of codes on the spec's grid",
        _grid,
        ("spec",),
    ),
    Promise("code dtype", "codes are int64", _dtype, ("grid",)),
    Promise("code range", "codes are in [0, V)", _range, ("grid",)),
    Promise("informative", "different frames get different codes", _informative, ("code range",)),
    Promise(
        "frames",
        "codes decode to uint8 frames of the spec's size, 1 + k r for k + 1 latent frames",
        _frames,
        ("code range",),
    ),
    Promise("vocabulary", "every code of the vocabulary decodes", _vocabulary_decodes, ("frames",)),
    Promise(
        "unchanged",
        "encoding and decoding change neither codebook, fingerprint nor weights, even in training "
        "mode",
        _unchanged,
        ("codebook", "frames"),
    ),
    Promise(
        "repeatable",
        "the same frames get the same codes again, and the same codes the same frames",
        _repeatable,
        ("unchanged",),
    ),
    Promise(
        "stable index",
        "a code means the same before and after the tokenizer was used for something else",
        _stable,
        ("repeatable", "informative", "vocabulary"),
    ),
    Promise("future leak", "no code depends on a later frame", _future, _STABLE),
    Promise(
        "prefix",
        "the codes of the first 1 + k r frames are the first k + 1 of all, exactly",
        _prefix,
        ("future leak",),
    ),
    Promise("one frame", "a frame alone is a video of one frame", _one_frame, ("prefix",)),
    Promise(
        "batch",
        "the other videos of a batch change no bit of a video's codes and frames",
        _batch,
        _STABLE,
    ),
    Promise(
        "batch size",
        f"with another B at most {OTHER_B_SHARE:.0%} of the codes differ (another kernel may round "
        "otherwise)",
        _batch_size,
        ("batch",),
    ),
    Promise(
        "encoder session",
        "any split of pushes gives encode's codes, each as soon as its frames are there",
        _encode_split,
        ("prefix",),
    ),
    Promise(
        "flush",
        "a last latent frame that is not full is filled with copies of the last frame",
        _flush,
        ("encoder session",),
    ),
    Promise("decode causal", "no frame depends on a later code", _decode_causal, _STABLE),
    Promise("num_frames", "decode gives the first num_frames of all the frames", _trim, _STABLE),
    Promise(
        "decoder session",
        "any split of pushes gives decode's frames, 1 for the first latent frame and r for others",
        _decode_split,
        ("decode causal",),
    ),
    Promise(
        "bad frames",
        "frames of another size or dtype, and none at all, are refused in a sentence",
        _bad_frames,
        ("spec",),
    ),
    Promise(
        "bad codes",
        "codes outside [0, V), of another grid or dtype, and more frames than they cover are "
        "refused in a sentence",
        _bad_codes,
        ("frames",),
    ),
    Promise(
        "saved",
        "what save writes, from_pretrained loads as the same tokenizer (where it has them)",
        _saved,
        _STABLE,
    ),
)
