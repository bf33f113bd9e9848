"""Promises of evaluate without a model: any tokenizer is judged, and its numbers are true."""

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from worldloom.common import (
    ActionSpec,
    CodeSpec,
    ConfigError,
    Episodes,
    EpisodesSpec,
    EpisodeWriter,
    MismatchError,
    TokenizerSpec,
    fingerprint,
)
from worldloom.dynamics import SamplingConfig
from worldloom.pipelines import evaluate_tokenizer as measures
from worldloom.pipelines.cli import main
from worldloom.pipelines.encoding import EpisodeFrames, encode_videos
from worldloom.pipelines.evaluate import EvaluateConfig, evaluate
from worldloom.pipelines.info import InfoConfig, describe, info
from worldloom.pipelines.tokenizer_pictures import ShownFrames
from worldloom.tokenizer.metrics import psnr, small_object_masks, small_objects, ssim, usage

HELD_OUT = "episode-000009"


class Greys:
    """Somebody's tokenizer: mean greys of cells of 4 x 4, coarse and the rest; r = 2, Q = 2."""

    height, width, resize = 16, 24, "exact"

    def __init__(self):
        codes = CodeSpec(
            vocab_size=16,
            grid_height=self.height // 4,
            grid_width=self.width // 4,
            code_dim=1,
            frames_per_latent=2,
            num_levels=2,
        )
        self.spec = TokenizerSpec(
            name="greys", codes=codes, height=self.height, width=self.width, resize=self.resize,
            fps=0, frame_skip=0, compute_dtype="float32", fingerprint=self.fingerprint(),
        )  # fmt: skip
        self.codebook = torch.stack([torch.arange(16.0) * 16, torch.arange(16.0)]).unsqueeze(-1)

    def fingerprint(self):
        return fingerprint({"greys": [self.height, self.width]}, [])

    def open_encoder(self):
        return GreysEncoder()

    def open_decoder(self):
        return GreysDecoder()

    def encode(self, frames_BTHWC):
        session = self.open_encoder()
        return torch.cat([session.push(frames_BTHWC), session.flush()], dim=1)

    def decode(self, codes_BthwQ, *, num_frames):
        return self.open_decoder().push(codes_BthwQ)[:, :num_frames]


class LargeGreys(Greys):
    """The same for larger frames, to which others are brought by its rule."""

    height, width, resize = 32, 48, "stretch"


class GreysEncoder:
    def __init__(self):
        self.held, self.first = None, True

    def push(self, frames_BTHWC):
        held = frames_BTHWC if self.held is None else torch.cat([self.held, frames_BTHWC], 1)
        codes = []
        while held.shape[1] >= (1 if self.first else 2):
            size = 1 if self.first else 2
            codes.append(self.code(held[:, size - 1]))  # the last frame stands for both
            held, self.first = held[:, size:], False
        self.held = held
        empty = self.code(frames_BTHWC[:, 0])[:, None][:, :0]
        return torch.cat([empty, *(code[:, None] for code in codes)], dim=1)

    def flush(self):
        return self.push(self.held[:, -1:].clone()) if self.held.shape[1] else self.none()

    def none(self):
        batch, _, height, width, _ = self.held.shape
        return torch.zeros((batch, 0, height // 4, width // 4, 2), dtype=torch.int64)

    def code(self, frames_BHWC):
        grey_BHW = frames_BHWC.float().mean(-1)
        mean_Bhw = grey_BHW.unflatten(1, (-1, 4)).unflatten(3, (-1, 4)).mean((2, 4)).long()
        return torch.stack([mean_Bhw // 16, mean_Bhw % 16], dim=-1)


class GreysDecoder:
    def __init__(self):
        self.first = True

    def push(self, codes_BthwQ):
        grey_BtHW = codes_BthwQ[..., 0] * 16 + codes_BthwQ[..., 1]
        grey_BtHW = grey_BtHW.repeat_interleave(4, 2).repeat_interleave(4, 3).byte()
        frames_BTHW = grey_BtHW.repeat_interleave(2, 1)[:, 1 if self.first else 0 :]
        self.first = False
        return frames_BTHW.unsqueeze(-1).repeat(1, 1, 1, 1, 3)


def typed(cls):
    """What a person types to name a class of this file."""
    return f"{cls.__module__}:{cls.__name__}"


@pytest.fixture(scope="module")
def ball_episodes(tmp_path_factory):
    """Eleven episodes of a ball of 2 x 2 over grey stripes; one is one frame long, none is even."""
    folder = tmp_path_factory.mktemp("balls")
    spec = EpisodesSpec(
        actions=ActionSpec.discrete(["STAY", "GO"]), height=16, width=24, fps=10, frame_skip=1,
        source={"env": "balls"},
    )  # fmt: skip
    spec.write(folder)
    for number in range(11):
        length = 1 if number == 3 else 18 + 2 * number
        frames = np.full((length, 16, 24, 3), 40, np.uint8)
        frames[:, :, ::5] = 70
        for t in range(length):
            row, column = (3 + number + t) % 14, (2 * t + number) % 22
            frames[t, row : row + 2, column : column + 2] = (250, 240, 90)
        with EpisodeWriter(folder, f"episode-{number:06d}", spec=spec) as writer:
            for frame in frames:
                writer.append(frame)
            writer.finish(np.ones(length - 1, np.int64))
    return Episodes(folder)


def judge(cls, episodes, output, **settings):
    config = EvaluateConfig(
        tokenizer=typed(cls), episodes=episodes.folder, output=output, device="cpu",
        **({"batch": 3} | settings),
    )  # fmt: skip
    return json.loads(evaluate(config).read_text())


@pytest.fixture(scope="module")
def judged(ball_episodes, tmp_path_factory):
    """One evaluation of somebody's tokenizer, and its folder."""
    folder = tmp_path_factory.mktemp("judged") / "evaluation"
    return judge(Greys, ball_episodes, folder), folder


def held_out_clips(episodes, tokenizer):
    """True and decoded clips of 16 frames of the held-out episode."""
    with episodes.open(HELD_OUT) as episode:
        frames_THWC = torch.from_numpy(np.array(episode.frames()))
    codes = tokenizer.encode(frames_THWC[None])
    decoded_THWC = tokenizer.decode(codes, num_frames=len(frames_THWC))[0]
    return list(zip(frames_THWC.split(16), decoded_THWC.split(16), strict=True))


def test_the_numbers_of_somebodys_tokenizer_are_those_of_its_held_out_clips(judged, ball_episodes):
    clips = held_out_clips(ball_episodes, Greys())
    numbers = judged[0]["tokenizer"]
    assert len(clips) == 3
    true, decoded = (torch.cat(part)[None] for part in zip(*clips, strict=True))
    assert numbers["psnr_db"] == pytest.approx(psnr(true, decoded), abs=1e-6)
    assert numbers["ssim"] == pytest.approx(ssim(true, decoded), abs=1e-9)
    assert numbers["num_frames"] == true.shape[1] == 36
    counts = [small_objects(a[None], b[None], narrower_than=2) for a, b in clips]
    whole = counts[0] + counts[1] + counts[2]
    small = numbers["small_objects"]
    assert small["narrower_than_pixels"] == 2
    assert {name: small[name] for name in whole.numbers()} == whole.numbers()


def test_small_things_are_counted_at_the_size_that_is_asked_for(ball_episodes, tmp_path):
    small = judge(Greys, ball_episodes, tmp_path / "out", small_pixels=12)["tokenizer"][
        "small_objects"
    ]
    assert small["narrower_than_pixels"] == 3  # 12 at 64 pixels, of which there are 16
    assert small["small_pixels"] > 3 * 36
    assert small["recall"] == 0  # it decodes the mean of a cell, mostly background


def test_the_use_of_the_codebook_is_counted_over_every_episode_and_level(judged, ball_episodes):
    tokenizer = Greys()
    changed = compared = 0
    every = []
    for key in ball_episodes.keys:
        with ball_episodes.open(key) as episode:
            codes_thwQ = tokenizer.encode(torch.from_numpy(np.array(episode.frames()))[None])[0]
        every.append(codes_thwQ.flatten(0, 2))
        changed += int((codes_thwQ[1:] != codes_thwQ[:-1]).any(-1).sum())
        compared += codes_thwQ[1:, ..., 0].numel()
    numbers = judged[0]["tokenizer"]
    levels = [usage(torch.cat(every)[:, level], 16) for level in (0, 1)]
    assert numbers["levels"]["codes_used_fraction"] == [used for used, _ in levels]
    assert numbers["levels"]["perplexity"] == pytest.approx([value for _, value in levels])
    assert numbers["perplexity"] == pytest.approx(math.sqrt(levels[0][1] * levels[1][1]))
    assert numbers["code_change_rate"] == changed / compared


def test_a_tokenizer_of_another_size_is_judged_by_its_rule(ball_episodes, tmp_path, capsys):
    written = judge(LargeGreys, ball_episodes, tmp_path / "out")
    assert "resized by its rule, stretch" in capsys.readouterr().err
    assert written["settings"]["tokenizer"]["height"] == 32
    assert written["tokenizer"]["num_frames"] == 36


def test_frames_that_it_does_not_take_are_refused(tiny_chain, tmp_path):
    with pytest.raises(MismatchError, match="16x24 exactly"):
        judge(Greys, Episodes(tiny_chain.folder / "episodes"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_our_own_tokenizer_is_judged_as_with_a_model(tiny_chain, evaluated, tmp_path, capsys):
    """Its numbers are those that stand in the evaluation of a model; stdout is the path alone."""
    output = tmp_path / "evaluation"
    words = ["--tokenizer", tiny_chain.folder / "tokenizer", "--episodes",
             tiny_chain.folder / "episodes", "--shards", tiny_chain.folder / "shards",
             "--output", output, "--batch", "2", "--device", "cpu"]  # fmt: skip
    assert main(["evaluate", *map(str, words)]) == 0
    said = capsys.readouterr()
    assert said.out == f"{output / 'evaluation.json'}\n"
    assert "next: worldloom train-dynamics --shards" in said.err
    written = json.loads((output / "evaluation.json").read_text())
    with_model = evaluated.numbers["tokenizer"]
    assert written["tokenizer"].keys() == with_model.keys()
    for name in ("psnr_db", "moving_psnr_db", "ssim", "code_change_rate", "perplexity"):
        assert written["tokenizer"][name] == pytest.approx(with_model[name], rel=1e-5)
    for name, value in written["tokenizer"]["small_objects"].items():
        assert with_model["small_objects"][name] == pytest.approx(value)


def test_shards_of_another_tokenizer_are_refused(tiny_chain, ball_episodes, tmp_path):
    with pytest.raises(MismatchError, match="fingerprint"):
        judge(Greys, ball_episodes, tmp_path / "out", shards=tiny_chain.folder / "shards")
    assert not (tmp_path / "out").exists()


def test_lpips_is_null_with_its_reason_where_it_is_not_measured(judged):
    perceptual = judged[0]["perceptual"]
    assert perceptual["lpips"] is None
    assert perceptual["lpips_reason"].startswith("not measured: ")


def test_lpips_is_measured_where_its_weights_are(ball_episodes, tmp_path, monkeypatch):
    pytest.importorskip("lpips", reason="lpips is not installed: pip install '.[test]'")
    from torchvision.models import alexnet

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.save(alexnet(weights=None).state_dict(), cache / "alexnet-owt-7be5be79.pth")
    measured = judge(LargeGreys, ball_episodes, tmp_path / "large")["perceptual"]
    assert 0 < measured["lpips"] < 1
    assert measured["lpips_reason"] is None
    small = judge(Greys, ball_episodes, tmp_path / "small")["perceptual"]
    assert small["lpips_reason"].startswith("not measured: frames are 16 x 24")


def test_the_speed_is_the_median_after_a_warm_up_and_says_of_what(monkeypatch):
    frames_BTHWC = torch.zeros((3, 8, 16, 24, 3), dtype=torch.uint8)
    # Encoding takes 9 s to warm up, then 1, 2, 3, 4 and 50; decoding half a second.
    ticks, now = [], 0.0
    for encode_s in (9, 1, 2, 3, 4, 50):
        ticks += [now, now + encode_s, now + encode_s + 0.5]
        now += encode_s + 0.5
    monkeypatch.setattr(measures.time, "perf_counter", iter(ticks).__next__)
    measured = measures.speed(Greys(), frames_BTHWC, device="cpu")
    assert measured["encode_frames_per_s"] == pytest.approx(3 * 8 / 3)
    assert measured["decode_frames_per_s"] == pytest.approx(3 * 8 / 0.5)
    assert (measured["batch"], measured["clip_frames"], measured["device"]) == (3, 8, "cpu")


def test_the_speed_is_taken_on_the_longest_clips_there_are(judged):
    clips = [torch.full((length, 2, 2, 3), length) for length in (3, 16, 5, 16, 16)]
    longest = measures.Longest(2)
    for clip in clips:
        longest.watch(clip, clip, None)
    assert longest.frames_BTHWC().shape == (2, 16, 2, 2, 3)
    assert judged[0]["speed"]["batch"] == 3
    assert judged[0]["speed"]["clip_frames"] == 16
    assert judged[0]["speed"]["encode_frames_per_s"] > 0


def test_the_sheet_shows_the_frame_of_most_small_pixels_and_marks_each_of_them():
    true = torch.full((1, 4, 12, 12, 3), 100, dtype=torch.uint8)
    true[0, 0, 2, 2] = 250
    true[0, 3, 2:4, 8] = 250
    decoded = true.clone()
    decoded[0, 3, 3, 8] = 100  # one of two is lost
    decoded[0, 3, 10, 1] = 0  # and one invented
    shown = ShownFrames()
    shown.watch(true[0], decoded[0], small_object_masks(true, decoded))
    (only,) = shown._moving.spread(9)
    assert torch.equal(only.true_HWC, true[0, 3])
    assert only.label == "1 of 2, 1 false"
    green, red, blue = (only.marked_HWC[place].tolist() for place in ((2, 8), (3, 8), (10, 1)))
    assert [max(range(3), key=colour.__getitem__) for colour in (green, red, blue)] == [1, 0, 2]
    assert only.marked_HWC[0, 0].tolist() == [35, 35, 35]


def test_the_sheet_prefers_clips_in_which_something_moves_and_holds_few():
    still = torch.full((1, 4, 12, 12, 3), 100, dtype=torch.uint8)
    moving = still.clone()
    moving[0, 1, 5, 5] = 250
    shown = ShownFrames()
    for number in range(2000):
        clip = moving if number % 2 else still
        shown.watch(clip[0], clip[0], small_object_masks(clip, clip))
    assert len(shown._moving._kept) <= 256
    frames = shown._moving.spread(12)
    assert len(frames) == 12
    assert all(torch.equal(frame.true_HWC, moving[0, 1]) for frame in frames)


def test_a_folder_is_replaced_whole_and_holds_what_is_named(ball_episodes, judged, tmp_path):
    written, folder = judged
    named = {*written["pictures"].values(), "evaluation.json"}
    assert {path.name for path in folder.iterdir()} == named
    assert written["schema"] == "worldloom.tokenizer-evaluation/1"
    for name in named - {"evaluation.json"}:
        with Image.open(folder / name) as picture:
            picture.verify()
    copy = tmp_path / "evaluation"
    shutil.copytree(folder, copy)
    (copy / "drift.png").write_bytes(b"of an evaluation before")
    judge(Greys, ball_episodes, copy)
    assert {path.name for path in copy.iterdir()} == named
    with pytest.raises(ConfigError, match="not written by evaluate"):
        judge(Greys, ball_episodes, ball_episodes.folder)


def test_where_none_is_held_out_all_are_judged_by_and_it_is_said(ball_episodes, tmp_path, capsys):
    one = tmp_path / "one"
    one.mkdir()
    for name in ("episodes.json", "episode-000001.npz"):
        shutil.copy(ball_episodes.folder / name, one / name)
    written = judge(Greys, Episodes(one), tmp_path / "out")
    assert written["settings"]["split"] == "train"
    assert "on 1 episode, as none is held out" in capsys.readouterr().err


def test_a_single_still_frame_is_judged_and_what_it_lacks_is_null(ball_episodes, tmp_path):
    one = tmp_path / "one"
    one.mkdir()
    for name in ("episodes.json", "episode-000003.npz"):
        shutil.copy(ball_episodes.folder / name, one / name)
    numbers = judge(Greys, Episodes(one), tmp_path / "out")
    assert numbers["tokenizer"]["code_change_rate"] is None
    assert numbers["tokenizer"]["small_objects"]["recall"] is None
    assert numbers["speed"]["clip_frames"] == 1


@pytest.mark.parametrize(
    ("settings", "flag"),
    [
        ({"horizon": 3}, "--horizon"),
        ({"num_rollouts": 3}, "--num-rollouts"),
        ({"seed": 1}, "--seed"),
        ({"sampling": SamplingConfig(temperature=0.25)}, "--sampling"),
    ],
)
def test_settings_of_rollouts_are_refused_without_a_model(tmp_path, settings, flag):
    paths = {"tokenizer": "t", "episodes": tmp_path, "output": tmp_path / "out"}
    with pytest.raises(ConfigError, match=rf"{flag} is of rollouts, which take --model"):
        EvaluateConfig(**paths, **settings)
    EvaluateConfig(**paths, **settings, model=tmp_path)


def test_info_says_what_was_judged_and_the_formats_page_has_every_key(judged):
    written, folder = judged
    about = describe(folder)
    assert about["kind"] == "evaluation"
    assert about["judged"] == "a tokenizer alone"
    for group in ("tokenizer", "perceptual", "speed", "settings"):
        assert about[group] == written[group]
    assert "not measured" in info(InfoConfig(path=folder))
    page = (Path(__file__).parents[2] / "docs" / "formats.md").read_text()
    small = written["tokenizer"]["small_objects"]
    for head, content in {
        "`tokenizer`": written["tokenizer"], "`small_objects`": small,
        "`perceptual`": written["perceptual"], "`speed`": written["speed"],
        "`settings` of it": written["settings"], "`pictures` of it": written["pictures"],
    }.items():  # fmt: skip
        table = page.partition(f"| {head} | meaning |\n|---|---|\n")[2].partition("\n\n")[0]
        first_cells = " ".join(line.split("|")[1] for line in table.splitlines())
        assert set(re.findall(r"`(\w+)`", first_cells)) == set(content), head


def test_the_use_of_the_codebook_streams_what_encoding_gives(ball_episodes):
    tokenizer = Greys()
    counted = measures.codebook_use(None, ball_episodes, tokenizer)
    lengths = measures.lengths_of(ball_episodes, ball_episodes.keys)
    videos = [EpisodeFrames(ball_episodes, key, tokenizer.spec) for key in ball_episodes.keys]
    codes = encode_videos(videos, lengths, tokenizer, batch=1)
    assert int(counted.counts_QV[0].sum()) == sum(part[..., 0].numel() for part in codes)
