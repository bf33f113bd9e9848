"""Promises of testing.py: what we ship passes; a planted fault is named, and it alone."""

import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from tokenizer.toys import CONFIG, make_tokenizer, random_frames
from worldloom.common import CodeSpec, ShapeError, TokenizerSpec, bind_shape, fingerprint
from worldloom.tokenizer import QuantizerConfig
from worldloom.tokenizer.patch import (
    PatchConfig,
    PatchDecoderSession,
    PatchEncoderSession,
    PatchTokenizer,
)
from worldloom.tokenizer.promises import PROMISES
from worldloom.tokenizer.testing import ConformanceError, check_tokenizer, main

PATCH = PatchConfig(height=16, width=24, patch=4)
QUANTIZERS = {
    "vq": QuantizerConfig(vocab_size=32, code_dim=4),
    "vq-cosine": QuantizerConfig(vocab_size=32, code_dim=4, cosine=True),
    "fsq": QuantizerConfig(kind="fsq", fsq_levels=(4, 3, 3)),
    "lfq": QuantizerConfig(kind="lfq", vocab_size=32),
    "lfq-spherical": QuantizerConfig(kind="lfq", vocab_size=32, spherical=True),
    "residual": QuantizerConfig(kind="residual", vocab_size=16, code_dim=4, num_levels=3),
}
SHAPES = {"image": 1, "video-1": 1, "video-2": 2, "video-4": 4}


@pytest.mark.slow
@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_architecture_quantizer_and_stride_that_we_ship_conforms(shape, quantizer):
    config = replace(
        CONFIG,
        architecture=shape.partition("-")[0],
        temporal_stride=SHAPES[shape],
        quantizer=QUANTIZERS[quantizer],
    )
    report = check_tokenizer(make_tokenizer(config))
    assert report.kept == tuple(promise.name for promise in PROMISES)


@pytest.mark.parametrize(
    "config",
    [PatchConfig(), PATCH, PatchConfig(height=32, width=8, patch=8, levels=(2, 256, 2))],
    ids=["default", "wide", "tall"],
)
def test_the_patch_baseline_conforms(config):
    report = check_tokenizer(PatchTokenizer(config))
    assert report.kept == tuple(promise.name for promise in PROMISES)


class Pairs:
    """A plain class with r = 2: the mean grey of every 8x8 cell of two frames, in 32 levels."""

    def __init__(self):
        codes = CodeSpec(
            vocab_size=32, grid_height=2, grid_width=3, code_dim=1, frames_per_latent=2
        )
        self.spec = TokenizerSpec(
            name="pairs", codes=codes, height=16, width=24, resize="exact", fps=0, frame_skip=0,
            compute_dtype="float32", fingerprint=fingerprint({"name": "pairs"}, []),
        )  # fmt: skip
        self.codebook = torch.linspace(0, 255, 32)[:, None]

    def fingerprint(self):
        return self.spec.fingerprint

    def open_encoder(self):
        return PairsEncoder()

    def open_decoder(self):
        return PairsDecoder(self.codebook)

    def encode(self, frames_BTHWC):
        if 0 in frames_BTHWC.shape:
            raise ValueError("there are no frames to encode")
        session = self.open_encoder()
        return torch.cat([session.push(frames_BTHWC), session.flush()], dim=1)

    def decode(self, codes_Bthw, *, num_frames):
        frames_BTHWC = self.open_decoder().push(codes_Bthw)
        if not 1 <= num_frames <= frames_BTHWC.shape[1]:
            raise ValueError(f"{num_frames} frames are not there to give")
        return frames_BTHWC[:, :num_frames]


class PairsEncoder:
    def __init__(self):
        self.started, self.held = False, None

    def push(self, frames_BTHWC):
        bind_shape("frames", frames_BTHWC, "B T H W C", H=16, W=24, C=3)
        if frames_BTHWC.dtype != torch.uint8:
            raise ValueError("frames must be uint8")
        frames = frames_BTHWC if self.held is None else torch.cat([self.held, frames_BTHWC], dim=1)
        codes = []
        while frames.shape[1] >= 1 + self.started:
            codes.append(self.code(frames[:, : 1 + self.started]))
            frames, self.started = frames[:, 1 + self.started :], True
        self.held = frames
        return torch.cat([torch.zeros(len(frames), 0, 2, 3, dtype=torch.int64), *codes], dim=1)

    def flush(self):
        if self.held.shape[1] == 0:
            return torch.zeros(len(self.held), 0, 2, 3, dtype=torch.int64)
        return self.code(self.held.expand(-1, 2, -1, -1, -1))

    def code(self, frames):
        cells = frames.long().reshape(len(frames), -1, 2, 8, 3, 8, 3)
        return cells.sum((1, 3, 5, 6))[:, None] * 32 // (frames.shape[1] * 64 * 3 * 256)


class PairsDecoder:
    def __init__(self, codebook):
        self.codebook, self.started = codebook, False

    def push(self, codes_Bthw):
        bind_shape("codes", codes_Bthw, "B t h w", h=2, w=3)
        if codes_Bthw.dtype != torch.int64:
            raise ValueError("codes must be int64")
        if codes_Bthw.numel() and not 0 <= codes_Bthw.min() <= codes_Bthw.max() < 32:
            raise ValueError("codes must be in [0, 32)")
        grey = self.codebook[codes_Bthw].to(torch.uint8).expand(-1, -1, -1, -1, 3)
        pixels = grey.repeat_interleave(8, 2).repeat_interleave(8, 3).repeat_interleave(2, 1)
        first = 0 if self.started or not codes_Bthw.shape[1] else 1
        self.started = self.started or codes_Bthw.shape[1] > 0
        return pixels[:, first:]


def test_a_plain_class_with_a_temporal_stride_conforms_without_save_or_weights():
    assert check_tokenizer(Pairs()).broken == ()


class Fault(PatchTokenizer):
    """The smallest tokenizer; each subclass breaks one thing."""

    def __init__(self, config=PATCH, *, device="cpu"):
        super().__init__(config, device=device)


class Lacking:
    spec = PatchTokenizer(PATCH).spec


class FingerprintOfAnother(Fault):
    def fingerprint(self):
        return "0" * 64


class DoubleCodebook(Fault):
    def __init__(self, config=PATCH, *, device="cpu"):
        super().__init__(config, device=device)
        self.codebook = self.codebook.double()


class ColumnMissing(Fault):
    def encode(self, frames_BTHWC):
        return super().encode(frames_BTHWC)[..., :-1]


class LatentFrameTooMany(Fault):
    def encode(self, frames_BTHWC):
        codes_Bthw = super().encode(frames_BTHWC)
        return torch.cat([codes_Bthw, codes_Bthw[:, -1:]], dim=1)


class NarrowCodes(Fault):
    def encode(self, frames_BTHWC):
        return super().encode(frames_BTHWC).to(torch.int32)


class CodesFromOne(Fault):
    def encode(self, frames_BTHWC):
        return super().encode(frames_BTHWC) + self.spec.codes.vocab_size


class AlwaysSeven(Fault):
    def encode(self, frames_BTHWC):
        return super().encode(frames_BTHWC) * 0 + 7


class FloatFrames(Fault):
    def decode(self, codes_Bthw, *, num_frames):
        return super().decode(codes_Bthw, num_frames=num_frames).float()


class LastCodeUnknown(Fault):
    def decode(self, codes_Bthw, *, num_frames):
        if (codes_Bthw == self.spec.codes.vocab_size - 1).any():
            raise KeyError("251")
        return super().decode(codes_Bthw, num_frames=num_frames)


class CodebookMoves(Fault):
    def encode(self, frames_BTHWC):
        self.codebook = 0.999 * self.codebook + 0.001 * self.codebook.mean()
        return super().encode(frames_BTHWC)


class CodebookLearnsInTrainingMode(torch.nn.Module):
    """Encoding moves the average, as a quantizer called with the training forward does."""

    def __init__(self):
        super().__init__()
        self.inner = PatchTokenizer(PATCH)
        self.register_buffer("average", torch.zeros(1))
        self.spec, self.codebook = self.inner.spec, self.inner.codebook
        self.fingerprint, self.decode = self.inner.fingerprint, self.inner.decode
        self.open_encoder, self.open_decoder = self.inner.open_encoder, self.inner.open_decoder

    def encode(self, frames_BTHWC):
        if self.training:
            self.average += 1
        return self.inner.encode(frames_BTHWC)


class Throws(Fault):
    """Dice: other codes every time."""

    count = 0

    def encode(self, frames_BTHWC):
        self.count += 1
        return (super().encode(frames_BTHWC) + self.count) % self.spec.codes.vocab_size


class NumbersByFirstUse(Fault):
    """Every video that is new shifts what the codes mean."""

    def __init__(self, config=PATCH, *, device="cpu"):
        super().__init__(config, device=device)
        self.seen = set()

    def encode(self, frames_BTHWC):
        self.seen.add(frames_BTHWC.contiguous().numpy().tobytes())
        return (super().encode(frames_BTHWC) + len(self.seen)) % self.spec.codes.vocab_size


class LooksAhead(Fault):
    def encode(self, frames_BTHWC):
        blurred = frames_BTHWC[:, :1] // 2 + frames_BTHWC[:, -1:] // 2
        return super().encode(torch.cat([blurred, frames_BTHWC[:, 1:]], dim=1))


class CountsFrames(Fault):
    def encode(self, frames_BTHWC):
        codes_Bthw = super().encode(frames_BTHWC)
        return (codes_Bthw + codes_Bthw.shape[1]) % self.spec.codes.vocab_size


class NormalizesOverTheBatch(Fault):
    def open_encoder(self):
        return NormalizingSession(self)


class NormalizingSession(PatchEncoderSession):
    def push(self, frames_BTHWC):
        if frames_BTHWC.dtype == torch.uint8 and len(frames_BTHWC):
            mean = frames_BTHWC.float().mean(0, keepdim=True)
            frames_BTHWC = (0.5 * frames_BTHWC + 0.5 * mean).to(torch.uint8)
        return super().push(frames_BTHWC)


class OnlyPairsOfVideos(Fault):
    def encode(self, frames_BTHWC):
        shift = int(len(frames_BTHWC) != 2)
        return (super().encode(frames_BTHWC) + shift) % self.spec.codes.vocab_size


class NothingToFlushAfterOneFrame(Fault):
    def open_encoder(self):
        return HastySession(self)


class HastySession(PatchEncoderSession):
    def __init__(self, tokenizer):
        super().__init__(tokenizer)
        self.count = 0

    def push(self, frames_BTHWC):
        codes_Bthw = super().push(frames_BTHWC)
        self.count += codes_Bthw.shape[1]
        return codes_Bthw

    def flush(self):
        if self.count == 1:
            raise IndexError("pop from an empty list")
        return super().flush()


class EveryPushBegins(Pairs):
    """The first frame of every push counts as the first of the video."""

    def open_encoder(self):
        return BeginningSession()


class BeginningSession(PairsEncoder):
    def push(self, frames_BTHWC):
        codes_Bthw = super().push(frames_BTHWC)
        self.started = False
        return codes_Bthw


class WaitsForFlush(Fault):
    """Right codes, but only at the very end, so that memory grows with the video."""

    def open_encoder(self):
        return WaitingSession(self)

    def encode(self, frames_BTHWC):
        return PatchTokenizer(PATCH).encode(frames_BTHWC)


class WaitingSession(PatchEncoderSession):
    def __init__(self, tokenizer):
        super().__init__(tokenizer)
        self.kept = []

    def push(self, frames_BTHWC):
        codes_Bthw = super().push(frames_BTHWC)
        self.kept.append(codes_Bthw)
        return codes_Bthw[:, :0]

    def flush(self):
        return torch.cat(self.kept, dim=1)


class ForgetsTheLastFrames(Pairs):
    def open_encoder(self):
        return ForgetfulSession()


class ForgetfulSession(PairsEncoder):
    def flush(self):
        return torch.zeros(len(self.held), 0, 2, 3, dtype=torch.int64)


class FillsWithBlack(Pairs):
    def open_encoder(self):
        return BlackSession()


class BlackSession(PairsEncoder):
    def flush(self):
        if self.held.shape[1]:
            self.held = torch.cat([self.held, 0 * self.held], dim=1)
            return self.code(self.held)
        return super().flush()


class DecodesBackwards(Fault):
    def decode(self, codes_Bthw, *, num_frames):
        super().decode(codes_Bthw, num_frames=num_frames)
        frames_BTHWC = self.open_decoder().push(codes_Bthw)
        frames_BTHWC[:, 0] = frames_BTHWC[:, -1]
        return frames_BTHWC[:, :num_frames]


class NeverTrims(Fault):
    def decode(self, codes_Bthw, *, num_frames):
        super().decode(codes_Bthw, num_frames=num_frames)
        return super().decode(codes_Bthw, num_frames=codes_Bthw.shape[1])


class EveryCodeBegins(Pairs):
    """The first latent frame of every push is decoded to one frame."""

    def open_decoder(self):
        return BeginningDecoder(self.codebook)


class BeginningDecoder(PairsDecoder):
    def push(self, codes_Bthw):
        self.started = False
        return super().push(codes_Bthw)


class CutsFramesToSize(Fault):
    def encode(self, frames_BTHWC):
        return super().encode(frames_BTHWC[:, :, :16, :24, :3])


class ClampsCodes(Fault):
    def decode(self, codes_Bthw, *, num_frames):
        return super().decode(codes_Bthw.clamp(0, 251), num_frames=num_frames)


class ClampsPushedCodes(Fault):
    def open_decoder(self):
        return ClampingSession(self)

    def decode(self, codes_Bthw, *, num_frames):
        return PatchTokenizer(PATCH).decode(codes_Bthw, num_frames=num_frames)


class ClampingSession(PatchDecoderSession):
    def push(self, codes_Bthw):
        return super().push(codes_Bthw.clamp(0, 251))


class RefusesWithACode(Fault):
    def decode(self, codes_Bthw, *, num_frames):
        try:
            return super().decode(codes_Bthw, num_frames=num_frames)
        except Exception:
            raise ValueError("E17") from None


class LoadsAnother(Fault):
    @classmethod
    def from_pretrained(cls, folder, /, *, device="cpu"):
        return PatchTokenizer(replace(PATCH, levels=(6, 6, 7)))


FAULTS = {
    Lacking: ("members", "lacks codebook, decode, encode"),
    FingerprintOfAnother: ("spec", "fingerprint() is '0000"),
    DoubleCodebook: ("codebook", "dtype torch.float64"),
    ColumnMissing: ("grid", "shape (2, 1, 4, 5), the spec says (2, 1, 4, 6)"),
    LatentFrameTooMany: ("grid", "shape (2, 2, 4, 6), the spec says (2, 1, 4, 6)"),
    NarrowCodes: ("code dtype", "encode gives torch.int32"),
    CodesFromOne: ("code range", "where V is 252"),
    AlwaysSeven: ("informative", "got the code 7"),
    FloatFrames: ("frames", "decode gives torch.float32"),
    LastCodeUnknown: ("vocabulary", "KeyError: '251'"),
    CodebookMoves: ("unchanged", "codebook changed by encoding and decoding"),
    CodebookLearnsInTrainingMode: ("unchanged", "average changed by .* in training mode"),
    Throws: ("repeatable", "the same frames encoded again"),
    NumbersByFirstUse: ("stable index", "codes of frames encoded before"),
    LooksAhead: ("future leak", "codes of frames 0 to 0 after all later ones were changed"),
    CountsFrames: ("prefix", "codes of the first 1"),
    NormalizesOverTheBatch: ("batch", "codes of a video beside another one"),
    OnlyPairsOfVideos: ("batch size", "with B = 1 rather than 2"),
    NothingToFlushAfterOneFrame: ("one frame", "IndexError: pop from an empty list"),
    EveryPushBegins: ("encoder session", "codes of frames pushed [1, 1"),
    WaitsForFlush: ("encoder session", "after 1 frames .* 0 latent frames had come; 1 were"),
    ForgetsTheLastFrames: ("flush", "codes of 6 frames: shape (2, 3, 2, 3) rather than (2, 4,"),
    FillsWithBlack: ("flush", "codes of 6 frames: .* values differ"),
    DecodesBackwards: ("decode causal", "frames 0 to 0 after the codes of all later"),
    NeverTrims: ("num_frames", "num_frames=1: shape (2, 4, 16, 24, 3) rather than (2, 1,"),
    EveryCodeBegins: ("decoder session", "frames of codes pushed [1, 1, 1, 1] at a time"),
    CutsFramesToSize: ("bad frames", "frames a pixel too high accepted; frames a pixel too wide"),
    ClampsCodes: ("bad codes", "a code of 252, V, accepted; a code of -1 accepted"),
    ClampsPushedCodes: ("bad codes", "Seen: a push of a code of 252, V, accepted"),
    RefusesWithACode: ("bad codes", "a code of -1 refused with 'E17', which is no sentence"),
    LoadsAnother: ("saved", "another spec"),
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_planted_fault_is_named_as_the_promise_it_breaks_and_no_other_is(fault):
    name, seen = FAULTS[fault]
    promised = {promise.name: promise.promise for promise in PROMISES}
    with pytest.raises(ConformanceError) as caught:
        check_tokenizer(fault())
    assert caught.value.report.broken == (name,)
    message = str(caught.value)
    assert f"\n  {name}: {promised[name]}. Seen: " in message
    assert re.search(".*".join(map(re.escape, seen.split(" .* "))), message), message


def test_every_promise_has_a_planted_fault_that_breaks_it():
    assert {name for name, _ in FAULTS.values()} == {promise.name for promise in PROMISES}


def test_what_depends_on_a_broken_promise_is_not_judged_and_the_rest_is():
    with pytest.raises(ConformanceError) as caught:
        check_tokenizer(LooksAhead())
    report = caught.value.report
    verdicts = {finding.name: finding.verdict for finding in report.findings}
    assert [name for name, verdict in verdicts.items() if verdict == "not judged"] == [
        "prefix", "one frame", "encoder session", "flush",
    ]  # fmt: skip
    assert str(caught.value).endswith(
        "not judged while that is so: prefix, one frame, encoder session, flush"
    )
    assert set(report.kept) | {"future leak"} | {
        name for name, verdict in verdicts.items() if verdict == "not judged"
    } == set(verdicts)


def test_two_faults_at_once_are_both_named():
    class Both(ClampsCodes, CutsFramesToSize, NormalizesOverTheBatch):
        pass

    with pytest.raises(ConformanceError) as caught:
        check_tokenizer(Both())
    assert caught.value.report.broken == ("batch", "bad frames", "bad codes")


def test_a_tokenizer_left_in_training_mode_stays_so_and_is_not_trained():
    tokenizer = make_tokenizer().train()
    before = {name: value.clone() for name, value in tokenizer.state_dict().items()}
    check_tokenizer(tokenizer)
    assert tokenizer.training
    assert all(torch.equal(before[name], v) for name, v in tokenizer.state_dict().items())


def test_another_seed_draws_other_frames_and_frames_of_ones_own_are_taken():
    class Keeps(Pairs):
        def encode(self, frames_BTHWC):
            seen.append(frames_BTHWC)
            return super().encode(frames_BTHWC)

    firsts = []
    mine = random_frames(3, 9, 16, 24, seed=3)
    for settings in ({}, {}, {"seed": 1}, {"frames": mine}):
        seen: list[torch.Tensor] = []
        check_tokenizer(Keeps(), **settings)
        firsts.append(seen[0])
    assert torch.equal(firsts[0], firsts[1])
    assert not torch.equal(firsts[0], firsts[2])
    assert torch.equal(firsts[3], mine[:2, :1])


@pytest.mark.parametrize(
    "frames",
    [
        random_frames(1, 8, 16, 24),
        random_frames(2, 7, 16, 24),
        random_frames(2, 8, 24, 16),
        random_frames(2, 8, 16, 24).float(),
    ],
    ids=["one video", "too short", "another size", "another dtype"],
)
def test_too_few_frames_of_ones_own_are_the_callers_mistake(frames):
    with pytest.raises(ShapeError, match="frames: "):
        check_tokenizer(Pairs(), frames=frames)


def test_the_command_prints_a_line_a_promise_and_ends_with_0(capsys):
    assert main(["patch"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["ok"] * len(PROMISES)
    assert all(f" {p.name}: {p.promise}." in line for p, line in zip(PROMISES, lines, strict=True))


def test_the_command_names_what_is_broken_and_ends_with_3(capsys):
    assert main([f"{__name__}:LooksAhead"]) == 3
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == len(PROMISES)
    (broken,) = [line for line in said.out.splitlines() if line.startswith("broken")]
    assert "future leak: no code depends on a later frame. Seen: codes of frames 0 to 0" in broken
    assert "\nnot judged  prefix: " in said.out
    assert said.out.count("(waits for future leak)") == 4
    assert said.err.startswith("error: LooksAhead (patch): breaks 1 of 25 promises\n")


@pytest.mark.slow
def test_the_command_runs_as_a_module_and_refuses_what_is_no_tokenizer_in_one_line():
    words = [sys.executable, "-m", "worldloom.tokenizer.testing", "nowhere"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.startswith("error: nowhere: no such folder, and no tokenizer of that name")
    assert len(done.stderr.splitlines()) == 1
