"""info.py: every kind of folder is recognised, and its numbers are those of what was written."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from worldloom.common import (
    ActionSpec,
    CodeSpec,
    ConfigError,
    EpisodesSpec,
    EpisodeWriter,
    FormatError,
    RunLog,
    TokenEpisode,
    TokenizerSpec,
    TokenShards,
    save_checkpoint,
    save_model,
    to_plain,
    write_json,
    write_manifest,
    write_shard,
)
from worldloom.dynamics import SamplingConfig
from worldloom.pipelines import info_data
from worldloom.pipelines.demo import StageRecord
from worldloom.pipelines.generate import GenerateConfig, generate
from worldloom.pipelines.info import InfoConfig, describe, info
from worldloom.tokenizer.metrics import count_codes

LENGTHS = (5, 9, 4)
ACTIONS = ActionSpec.discrete(["left", "right", "fire"])
FINGERPRINT = "ab" * 32


def write_episodes(folder, actions=ACTIONS, raw=None):
    spec = EpisodesSpec(
        actions=actions, height=6, width=8, fps=10, frame_skip=4, source={"seed": 7}
    )
    spec.write(folder)
    for number, length in enumerate(LENGTHS):
        with EpisodeWriter(folder, f"episode-{number}", spec=spec) as writer:
            for _ in range(length):
                writer.append(np.full((6, 8, 3), 40 * number, np.uint8))
            chosen = np.zeros(length - 1, np.int64) + number if raw is None else raw(length - 1)
            writer.finish(chosen, rewards=np.ones(length - 1, np.float32))
    return folder


@pytest.fixture
def episodes(tmp_path):
    return write_episodes(tmp_path / "episodes")


@pytest.fixture
def shards(tmp_path):
    codes = CodeSpec(vocab_size=10, grid_height=2, grid_width=2, code_dim=3)
    tokenizer = TokenizerSpec(
        name="image", codes=codes, height=6, width=8, resize="exact", fps=10, frame_skip=4,
        compute_dtype="float32", fingerprint=FINGERPRINT,
    )  # fmt: skip
    rows = [
        TokenEpisode(
            key=f"episode-{number}", split="validation" if number == 2 else "train",
            codes_thw=np.full((length, 2, 2), 2 * number, np.uint8), num_frames=length,
            slots_TA=np.full((length - 1, 1), number),
        )
        for number, length in enumerate(LENGTHS)
    ]  # fmt: skip
    folder = tmp_path / "shards"
    record = write_shard(folder, 0, rows, codes=codes, actions=ACTIONS)
    write_manifest(
        folder, [record], tokenizer=tokenizer, actions=ACTIONS, fps=10, frame_skip=4,
        codebook_VZ=np.zeros((10, 3), np.float32), metrics={"psnr_db": 28.5}, source={},
    )  # fmt: skip
    return folder


@pytest.fixture
def model(tmp_path):
    config = {"name": "image", "fingerprint": FINGERPRINT, "tokenizer": {"dim": 4}}
    weights = {"a": torch.zeros(3, 4), "b": torch.zeros(())}
    save_model(tmp_path / "m", kind="tokenizer", config=config, weights=weights, card="")
    return tmp_path / "m"


@pytest.fixture
def run(tmp_path):
    log = RunLog(tmp_path / "run", config=InfoConfig(path=tmp_path))
    log.metrics(10, loss=0.5, psnr_db=20.0)
    log.metrics(20, loss=0.25)
    save_checkpoint(tmp_path / "run", 20, {"model": {"a": torch.zeros(3, 4)}}, {})
    return tmp_path / "run"


@pytest.fixture
def demo(tmp_path):
    folder = tmp_path / "demo"
    write_episodes(folder / "episodes")
    RunLog(folder / "tokenizer", config=InfoConfig(path=tmp_path)).metrics(1, loss=0.5)
    (folder / "notes").mkdir()
    records = {
        name: StageRecord(seconds=seconds, finished=finished, chain=FINGERPRINT, settings={})
        for name, seconds, finished in (("train-tokenizer", 2.5, False), ("record", 1.25, True))
    }
    write_json(folder / "stages.json", to_plain(records))
    return folder


@pytest.fixture
def evaluation(evaluated):
    return evaluated.folder


@pytest.fixture
def generated(tiny_chain, tmp_path):
    return generate(
        GenerateConfig(
            **tiny_chain.paths, start=tiny_chain.folder / "shards", output=tmp_path / "generated",
            actions="RIGHT*3,STAY,LEFT*2", prompt_frames=2, seed=5, num_samples=2, device="cpu",
        )
    )  # fmt: skip


def test_episodes_are_counted_by_split_and_by_action(episodes):
    about = describe(episodes)
    assert about["kind"] == "episodes"
    assert (about["num_episodes"], about["num_frames"], about["seconds"]) == (3, 18, 1.8)
    assert about["splits"] == {
        "train": {"num_episodes": 2, "num_frames": 14},
        "validation": {"num_episodes": 1, "num_frames": 4},
    }
    assert about["actions"]["histogram"] == {"left": 4, "right": 8, "fire": 3}
    assert about["episode_return"] == {"min": 3.0, "median": 4.0, "max": 8.0}


@pytest.mark.parametrize(
    ("spec", "raw", "histogram"),
    [
        (
            ActionSpec.keys(["a", "b"]),
            lambda steps: np.tile([[1, 1]], (steps, 1)) * (np.arange(steps) > 0)[:, None],
            {"none": 3, "a": 12, "b": 12},
        ),
        (
            ActionSpec.multi_discrete([2, 3], names=["x", "y"]),
            lambda steps: np.tile([[1, 2]], (steps, 1)),
            {"x": [0, 15], "y": [0, 0, 15]},
        ),
        (
            ActionSpec.continuous([-1], [1], names=["turn"], bins=3),
            lambda steps: np.full((steps, 1), 0.9, np.float32),
            {"turn": [0, 0, 15]},
        ),
        (ActionSpec.none(), lambda steps: np.zeros((steps, 0), np.int64), {}),
    ],
)
def test_every_kind_of_actions_has_a_histogram_of_what_was_chosen(tmp_path, spec, raw, histogram):
    folder = write_episodes(tmp_path / "episodes", spec, raw)
    assert describe(folder)["actions"]["histogram"] == histogram
    assert info(InfoConfig(path=folder))


def test_shards_show_fingerprint_splits_and_the_codes_that_are_used(shards):
    about = describe(shards)
    assert (about["kind"], about["fingerprint"]) == ("shards", FINGERPRINT)
    assert about["splits"]["validation"] == {"num_episodes": 1, "num_frames": 4}
    usage = about["code_usage"]
    share = np.array(LENGTHS) / sum(LENGTHS)
    assert (usage["codes_used"], usage["codes_used_fraction"]) == (3, 0.3)
    assert usage["perplexity"] == pytest.approx(np.exp(-(share * np.log(share)).sum()))
    assert about["actions"]["histogram"] == {"left": 4, "right": 8, "fire": 3}


def test_shards_tell_their_sizes_and_what_a_token_takes(shards):
    about = describe(shards)
    frames, tar_bytes = sum(LENGTHS), (shards / "shard-000000.tar").stat().st_size
    codes, slots = 4 * frames, frames - 3
    assert (about["num_codes"], about["num_action_slots"]) == (codes, slots)
    assert (about["num_tokens"], about["all_shards_bytes"]) == (codes + slots, tar_bytes)
    assert about["bytes_per_token"] == tar_bytes / (codes + slots)
    assert about["overhead_fraction"] == (tar_bytes - codes - slots) / tar_bytes
    assert about["episode_frames"] == {"min": 4, "median": 5.0, "max": 9}
    assert about["code_usage"]["code_change_rate"] == 0  # every episode is of one code


def test_the_json_of_shards_has_these_keys_on_which_a_program_may_rely(shards):
    about = json.loads(info(InfoConfig(path=shards, json=True)))
    assert sorted(about) == sorted([
        "kind", "path", "size_bytes", "num_shards", "num_episodes", "labelled_episodes",
        "num_frames", "latent_frames", "num_codes", "num_action_slots", "num_tokens",
        "all_shards_bytes", "bytes_per_token", "overhead_fraction", "fps", "frame_skip",
        "episode_frames", "splits", "fingerprint", "tokenizer", "code_usage", "actions", "metrics",
        "skipped", "source", "verified",
    ])  # fmt: skip
    assert sorted(about["code_usage"]) == sorted([
        "vocab_size", "codes_used", "codes_used_fraction", "perplexity", "code_change_rate",
        "by_rank", "counted_fraction", "most_frequent",
    ])  # fmt: skip
    assert sorted(about["actions"]) == sorted(
        ["kind", "names", "steps", "histogram", "counted_fraction"]
    )


@pytest.fixture
def write_random(tmp_path):
    """Write shards of random codes; return their folder and the codes of each episode."""

    def write(lengths=(40, 1, 23), *, num_levels=1, source=None, vocab_size=50):
        codes = CodeSpec(
            vocab_size=vocab_size, grid_height=2, grid_width=3, code_dim=2, num_levels=num_levels
        )
        tokenizer = TokenizerSpec(
            name="image", codes=codes, height=6, width=8, resize="exact", fps=10, frame_skip=4,
            compute_dtype="float32", fingerprint=FINGERPRINT,
        )  # fmt: skip
        rng = np.random.default_rng(0)
        every = [rng.integers(0, 9, codes.codes_shape(t)).astype(np.uint8) for t in lengths]
        rows = [
            TokenEpisode(
                key=f"e{number}", split="train", codes_thw=codes_thw, num_frames=len(codes_thw),
                slots_TA=rng.integers(0, 3, (len(codes_thw) - 1, 1)),
            )
            for number, codes_thw in enumerate(every)
        ]  # fmt: skip
        shape = ((num_levels,) if num_levels > 1 else ()) + (vocab_size, 2)
        folder = tmp_path / f"random-{num_levels}-{len(lengths)}"
        record = write_shard(folder, 0, rows, codes=codes, actions=ACTIONS)
        write_manifest(
            folder, [record], tokenizer=tokenizer, actions=ACTIONS, fps=10, frame_skip=4,
            codebook_VZ=np.zeros(shape, np.float32), metrics={}, source=source or {},
        )  # fmt: skip
        return folder, codes, every

    return write


@pytest.mark.parametrize("num_levels", [1, 3])
@pytest.mark.parametrize("block_codes", [1, 100, 1 << 20])
def test_the_use_of_codes_is_what_evaluate_counts_however_it_is_read(
    write_random, monkeypatch, num_levels, block_codes
):
    monkeypatch.setattr(info_data, "_BLOCK_CODES", block_codes)
    folder, spec, every = write_random(num_levels=num_levels)
    counts = [count_codes(torch.from_numpy(codes_thw)[None], spec) for codes_thw in every]
    wanted = (counts[0] + counts[1] + counts[2]).numbers()
    usage = describe(folder)["code_usage"]
    for name in ("codes_used_fraction", "perplexity", "code_change_rate"):
        assert usage[name] == pytest.approx(wanted[name])
        if num_levels > 1:
            assert usage["levels"][name] == pytest.approx(wanted["levels"][name])
    assert usage["counted_fraction"] == 1
    assert 0.5 < usage["code_change_rate"] <= 1


def test_the_histogram_of_codes_has_the_most_frequent_first_and_sums_to_one(write_random):
    folder, _, every = write_random()
    usage = describe(folder)["code_usage"]
    counts = np.bincount(np.concatenate([codes.reshape(-1) for codes in every]), minlength=50)
    order = np.argsort(-counts, kind="stable")[:5]
    assert list(usage["most_frequent"]) == [str(code) for code in order]
    assert list(usage["most_frequent"].values()) == pytest.approx(counts[order] / counts.sum())
    assert len(usage["by_rank"]) == 25  # of two codes each: 32 bars at most
    assert sum(usage["by_rank"]) == pytest.approx(1)
    assert usage["by_rank"] == sorted(usage["by_rank"], reverse=True)
    assert usage["by_rank"][0] == pytest.approx(counts[order][:2].sum() / counts.sum())
    text = info(InfoConfig(path=folder))
    assert re.search(r"by rank +█[▁▂▃▄▅▆▇█]{24}\n", text)
    assert re.search(rf"most frequent +{order[0]} \d+\.\d%, {order[1]} ", text)


def test_of_a_large_corpus_a_sample_is_counted_always_the_same_and_the_share_is_told(
    write_random, monkeypatch
):
    folder, _, _ = write_random((40,) * 12)
    full = describe(folder)
    assert full["code_usage"]["counted_fraction"] == full["actions"]["counted_fraction"] == 1
    monkeypatch.setattr(info_data, "_BLOCK_CODES", 60)  # 48 stretches of 10 frames
    monkeypatch.setattr(info_data, "_COUNTED_CODES", 1000)
    monkeypatch.setattr(info_data, "_COUNTED_SLOTS", 200)
    about = describe(folder)
    assert about["code_usage"]["counted_fraction"] == pytest.approx(1 / 3)  # 16 stretches of 48
    assert about["actions"]["counted_fraction"] == pytest.approx(1 / 3)  # 4 episodes of 12
    assert about == describe(folder)
    assert about["code_usage"]["code_change_rate"] == pytest.approx(
        full["code_usage"]["code_change_rate"], abs=0.05
    )
    assert about["num_codes"] == full["num_codes"]
    assert "33.3%" in info(InfoConfig(path=folder))
    monkeypatch.setattr(info_data, "_COUNTED_READS", 3)
    reads = []
    read = TokenShards.codes_thw
    monkeypatch.setattr(TokenShards, "codes_thw", lambda *a: reads.append(a) or read(*a))
    describe(folder)
    assert len(reads) == 3


def test_what_was_skipped_is_told_with_its_reason_also_of_shards_that_were_merged(write_random):
    folder, _, _ = write_random(
        source={"sources": [{"source": {"skipped": {"bad": "bad.mp4: cut short"}}}, {}],
                "episodes": {"skipped": {"worse": "no frames"}}},
    )  # fmt: skip
    assert describe(folder)["skipped"] == {"bad": "bad.mp4: cut short", "worse": "no frames"}
    assert "bad.mp4: cut short" in info(InfoConfig(path=folder))


def test_a_vocabulary_that_a_forged_manifest_claims_fills_no_memory(write_random):
    folder, _, _ = write_random()
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["tokenizer"]["codes"]["vocab_size"] = 256  # still uint8
    path.write_text(json.dumps(manifest))
    with pytest.raises(FormatError, match=r"must be float32 \(256, 2\)"):
        describe(folder)


def test_a_model_shows_its_fingerprint_its_config_and_its_parameters(model):
    about = describe(model)
    assert (about["kind"], about["fingerprint"]) == ("tokenizer", FINGERPRINT)
    assert (about["num_tensors"], about["num_parameters"]) == (2, 13)
    assert about["config"] == {"name": "image", "tokenizer": {"dim": 4}}


def test_a_run_shows_each_metric_as_last_written_and_its_checkpoints(run):
    about = describe(run)
    assert (about["kind"], about["step"]) == ("run", 20)
    assert about["last_metrics"] == {"loss": 0.25, "psnr_db": 20.0}
    assert about["checkpoints"] == ["step-00000020"]
    assert about["latest"] == "checkpoints/step-00000020"
    checkpoint = describe(run / "checkpoints" / "step-00000020")
    assert (checkpoint["kind"], checkpoint["step"]) == ("checkpoint", 20)
    assert checkpoint["groups"] == {"model": {"num_tensors": 1, "num_parameters": 12}}


def test_a_demo_shows_its_stages_in_their_order_and_the_kinds_of_its_folders(demo):
    about = describe(demo)
    assert (about["kind"], about["seconds"], about["report"]) == ("demo", 3.75, None)
    assert list(about["stages"]) == ["record", "train-tokenizer"]
    assert about["stages"]["record"] == {"seconds": 1.25, "finished": True}
    assert about["stages"]["train-tokenizer"] == {"seconds": 2.5, "finished": False}
    assert about["folders"] == {"episodes": "episodes", "tokenizer": "run"}
    text = info(InfoConfig(path=demo))
    assert "seconds 1.25, finished yes" in text
    assert "seconds 2.5, finished no" in text


def test_verifying_a_demo_reads_what_is_in_its_folders(demo):
    assert describe(demo, verify=True)["verified"]
    (demo / "episodes" / "episode-1.npz").write_bytes(b"damaged")
    describe(demo)
    with pytest.raises(FormatError, match=r"episode-1\.npz"):
        describe(demo, verify=True)


def test_an_evaluation_shows_the_numbers_that_evaluate_wrote(evaluation):
    about = describe(evaluation)
    written = json.loads((evaluation / "evaluation.json").read_text())
    assert about["kind"] == "evaluation"
    for group in ("tokenizer", "dynamics", "rollout", "play", "settings"):
        assert about[group] == written[group]
    assert "drift.png" in about["pictures"]
    text = info(InfoConfig(path=evaluation))
    assert f"{written['rollout']['psnr_over_copy_db']:.2f} dB" in text


def test_a_generated_folder_shows_seeds_settings_frames_and_actions_in_short(generated):
    about = describe(generated)
    assert (about["kind"], about["seeds"], about["num_samples"]) == ("generated", [5, 6], 2)
    assert about["sampling"] == to_plain(SamplingConfig())
    assert (about["prompt_frames"], about["generated_frames"], about["num_frames"]) == (2, 6, 8)
    assert about["actions"] == ["RIGHT*3", "STAY", "LEFT*2"]
    assert "RIGHT*3, STAY, LEFT*2" in info(InfoConfig(path=generated))


@pytest.mark.parametrize(
    ("name", "schema"),
    [("evaluation.json", "worldloom.evaluation/1"), ("session.json", "worldloom.session/1")],
)
def test_a_file_of_another_schema_or_without_its_fields_is_refused(name, schema, tmp_path):
    path = tmp_path / name
    path.write_text('{"schema": "worldloom.other/2"}')
    with pytest.raises(FormatError, match=r"expected schema .*, found 'worldloom.other/2'"):
        describe(tmp_path)
    path.write_text(json.dumps({"schema": schema}))
    with pytest.raises(FormatError, match=name):
        describe(tmp_path)


def test_the_tables_of_the_formats_page_have_the_keys_that_evaluate_and_generate_write(
    evaluation, generated
):
    page = (Path(__file__).parents[2] / "docs" / "formats.md").read_text()
    written = json.loads((evaluation / "evaluation.json").read_text())
    session = json.loads((generated / "session.json").read_text())
    assert written.pop("schema") == "worldloom.evaluation/1"
    tables = {f"`{group}` | meaning": content for group, content in written.items()}
    section = page.partition("`session.json`:")[2]
    for where, head, content in (
        *((page, head, content) for head, content in tables.items()),
        (section, "field | meaning", session),
    ):
        table = where.partition(f"| {head} |\n|---|---|\n")[2].partition("\n\n")[0]
        first_cells = [line.split("|")[1] for line in table.splitlines()]
        assert set(re.findall(r"`(\w+)`", " ".join(first_cells))) == set(content), head
    codes = np.load(generated / "codes.npz", allow_pickle=False)
    assert {name: array.dtype for name, array in codes.items()} == dict.fromkeys(
        ("codes", "actions"), np.int64
    )
    assert codes["codes"].shape == (2, 2 + 6, *codes["codes"].shape[2:])
    assert codes["actions"].tolist() == session["actions"]


def test_a_demo_whose_stages_lack_a_field_is_refused(demo):
    (demo / "stages.json").write_text('{"record": {"seconds": 1.0}}')
    with pytest.raises(FormatError, match=r"stages\.json: record"):
        describe(demo)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("shards", "manifest.json"),
        ("evaluation", "evaluation.json"),
        ("generated", "session.json"),
        ("demo", "stages.json"),
    ],
)
def test_the_file_that_says_what_a_folder_is_is_as_good_as_the_folder(kind, name, request):
    folder = request.getfixturevalue(kind)
    assert describe(folder / name) == describe(folder)


def test_verify_finds_damaged_codes_of_a_generated_folder(generated):
    path = generated / "codes.npz"
    assert describe(generated, verify=True)["verified"]
    content = bytearray(path.read_bytes())
    content[200] ^= 1
    path.write_bytes(content)
    describe(generated)
    with pytest.raises(FormatError, match=r"codes\.npz"):
        describe(generated, verify=True)


@pytest.mark.parametrize("kind", ["shards", "model", "run"])
def test_verify_finds_a_flipped_byte_that_a_plain_look_does_not(kind, request):
    folder = request.getfixturevalue(kind)
    name = {"shards": "*.tar", "model": "*.safetensors", "run": "checkpoints/*/*.safetensors"}[kind]
    (victim,) = folder.glob(name)
    assert describe(folder, verify=True)["verified"]
    content = bytearray(victim.read_bytes())
    # The last byte of a tensor; of a tar, one of the zeros that fill its last block.
    content[-1] ^= 1
    victim.write_bytes(content)
    describe(folder)
    with pytest.raises(FormatError, match=victim.name):
        describe(folder, verify=True)


def test_verify_finds_a_damaged_frame(episodes):
    victim = episodes / "episode-1.npz"
    content = bytearray(victim.read_bytes())
    content[80:90] = bytes(10)
    victim.write_bytes(content)
    with pytest.raises(FormatError, match=r"episode-1.npz"):
        describe(episodes, verify=True)


def test_a_path_that_is_nothing_of_ours_is_refused_saying_what_was_expected(tmp_path, episodes):
    with pytest.raises(FormatError, match="no such file or folder; expected a folder of episodes"):
        describe(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FormatError, match=r"expected .* found none of their files$"):
        describe(tmp_path / "empty")
    with pytest.raises(FormatError, match=r"inside it there are episodes \(episodes\)"):
        describe(tmp_path)
    (tmp_path / "empty" / "plan.json").write_text("{}")
    with pytest.raises(FormatError, match="token shards that is not finished: run its command"):
        describe(tmp_path / "empty")


@pytest.mark.parametrize(
    "content", [b"", b"\xff" * 8, b"\x02\0\0\0\0\0\0\0[]", b"\x02\0\0\0\0\0\0\0{]"]
)
def test_weights_with_a_forged_header_are_refused(model, content):
    path = model / "model.safetensors"
    config = json.loads((model / "config.json").read_text())
    config["files"][path.name]["size_bytes"] = len(content)
    (model / "config.json").write_text(json.dumps(config))
    path.write_bytes(content)
    with pytest.raises(FormatError, match="not readable as safetensors"):
        describe(model)


@pytest.mark.parametrize(
    "kind", ["episodes", "shards", "model", "run", "demo", "evaluation", "generated"]
)
def test_json_is_what_describe_returns_and_the_text_says_what_it_is(kind, request):
    folder = request.getfixturevalue(kind)
    about = describe(folder)
    assert json.loads(info(InfoConfig(path=folder, json=True))) == about
    assert info(InfoConfig(path=folder)).startswith(
        f"{folder}: a" if kind not in ("shards", "generated") else str(folder)
    )


def test_the_preview_shows_the_frames_themselves(episodes, tmp_path):
    info(InfoConfig(path=episodes, preview=tmp_path / "p.png"))
    picture = np.asarray(Image.open(tmp_path / "p.png"))
    for number, length in enumerate(LENGTHS):
        area = length * (6 * 18) * (8 * 18)  # frames of 6x8, enlarged 18 times
        same = (picture == 40 * number).all(-1).sum()
        assert same >= area


def test_a_preview_of_what_has_no_frames_is_refused(shards, tmp_path):
    with pytest.raises(ConfigError, match="only episodes have frames"):
        info(InfoConfig(path=shards, preview=tmp_path / "p.png"))
    assert not (tmp_path / "p.png").exists()


def test_info_needs_no_torch(episodes, shards, demo, evaluation, generated):
    code = (
        "import sys; from worldloom.pipelines.cli import main\n"
        "ended = [main(['info', path, '--verify']) for path in sys.argv[1:]]\n"
        "sys.exit(any(ended) or 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code,
         *map(str, (episodes, shards, demo, evaluation, generated))],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
