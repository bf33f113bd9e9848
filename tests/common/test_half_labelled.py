"""Promises of episodes and shards without known actions: told apart from no-ops, and kept."""

import hashlib
import io
import json
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import webdataset
from shard_forging import change_manifest, forge, read_everything, replaced, stream_everything
from worldloom.common import (
    ActionSpec,
    Episodes,
    EpisodesSpec,
    EpisodeWriter,
    FormatError,
    TokenEpisode,
    TokenShards,
    npy_bytes,
    stream_episodes,
    write_manifest,
    write_shard,
)

HALF = ((5, 1, 9), (4, 7))
UNLABELLED = (1, 2, 4)


def hashes(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


@pytest.fixture
def half_spec(episodes_spec):
    return replace(episodes_spec, half_labelled=True)


# Episodes


def test_an_episode_without_known_actions_has_none_and_says_so(tmp_path, half_spec, write_episode):
    frames, _ = write_episode(tmp_path, "a", spec=half_spec, num_frames=70, labelled=False)
    _, actions = write_episode(tmp_path, "b", spec=half_spec, num_frames=5)
    write_episode(tmp_path, "c", spec=half_spec, num_frames=1, labelled=False)
    write_episode(tmp_path, "d", spec=half_spec, num_frames=1)
    episodes = Episodes(tmp_path)
    assert episodes.spec == half_spec
    opened = {key: episodes.open(key) for key in episodes.keys}
    labelled = {key: episode.labelled for key, episode in opened.items()}
    assert labelled == {"a": False, "b": True, "c": False, "d": True}
    for key in ("a", "c"):
        assert opened[key].actions is None
        assert opened[key].slots_TA is None
    assert np.array_equal(opened["a"].frames(), frames)
    assert len(opened["a"].rewards) == 69  # those are known
    assert np.array_equal(opened["b"].actions, actions)
    assert np.array_equal(opened["b"].slots_TA, half_spec.actions.encode(actions))
    assert opened["d"].slots_TA.shape == (0, 1)


def test_every_kind_of_actions_can_be_unknown_but_none(tmp_path, episodes_spec, any_actions):
    if any_actions.kind == "none":
        with pytest.raises(ValueError, match="no actions that could be unknown"):
            replace(episodes_spec, actions=any_actions, half_labelled=True)
        return
    spec = replace(episodes_spec, actions=any_actions, half_labelled=True)
    spec.write(tmp_path)
    with EpisodeWriter(tmp_path, "a", spec=spec) as writer:
        for _ in range(3):
            writer.append(np.zeros((16, 24, 3), np.uint8))
        writer.finish(None)
    with Episodes(tmp_path).open("a") as episode:
        assert (episode.labelled, episode.slots_TA) == (False, None)


def test_only_a_folder_that_says_so_takes_episodes_without_actions(tmp_path, episodes_spec):
    message = r"a: has no actions, in a folder whose episodes\.json"
    with EpisodeWriter(tmp_path, "a", spec=episodes_spec) as writer:
        writer.append(np.zeros((16, 24, 3), np.uint8))
        with pytest.raises(FormatError, match=message):
            writer.finish(None)
    assert not list(tmp_path.iterdir())


def test_a_folder_whose_episodes_all_have_actions_is_written_as_ever(episodes_spec, half_spec):
    assert episodes_spec.to_dict()["schema"] == "worldloom.episodes/1"
    assert half_spec.to_dict() == episodes_spec.to_dict() | {"schema": "worldloom.episodes/2"}


@pytest.mark.parametrize(
    ("schema", "changes", "message"),
    [
        (1, {}, r"labelled is False, which may be false alone, and only where episodes\.json"),
        (2, {"labelled": True}, None),
        (2, {"labelled": 0}, "labelled is 0"),
        (2, {"labelled": None}, "labelled is None"),
        (2, {"unlabelled": True}, "must be an object with key, num_frames and metadata"),
    ],
)
def test_an_episode_that_contradicts_its_folder_is_refused(
    tmp_path, half_spec, episodes_spec, write_episode, schema, changes, message
):
    spec = half_spec if schema == 2 else episodes_spec
    write_episode(tmp_path, "a", spec=spec, num_frames=5)
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    about = json.loads(members["episode.json"]) | {"labelled": False} | changes
    members["episode.json"] = json.dumps(about).encode()
    path.unlink()
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    if message is None:
        assert Episodes(tmp_path).open("a").labelled
        return
    with pytest.raises(FormatError, match=message):
        Episodes(tmp_path).open("a")


def test_actions_of_an_episode_that_says_it_has_none_are_refused(
    tmp_path, half_spec, write_episode
):
    write_episode(tmp_path, "a", spec=half_spec, num_frames=5, labelled=False)
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    members["actions.npy"] = npy_bytes(np.zeros(4, np.int64))
    path.unlink()
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    episode = Episodes(tmp_path).open("a")
    with pytest.raises(FormatError, match=r"a\.npz: actions\.npy is \(4,\), but episode\.json"):
        _ = episode.slots_TA


def test_a_description_that_contradicts_itself_is_refused(tmp_path, half_spec):
    half_spec.write(tmp_path)
    path = tmp_path / "episodes.json"
    whole = json.loads(path.read_text())
    for change, message in (
        ({"schema": "worldloom.episodes/3"}, "readable are worldloom.episodes/1 and"),
        ({"half_labelled": True}, "unknown field 'half_labelled'"),
        ({"actions": ActionSpec.none().to_dict()}, "no actions that could be unknown"),
    ):
        path.write_text(json.dumps(whole | change))
        with pytest.raises(FormatError, match=message):
            EpisodesSpec.read(tmp_path)


# Token shards


def test_shards_keep_which_episodes_have_no_known_actions(tmp_path, write_shards):
    written = write_shards(tmp_path, lengths=HALF, unlabelled=UNLABELLED)
    shards = TokenShards(tmp_path)
    shards.verify()
    assert shards.manifest["schema"] == "worldloom.token-shards/2"
    assert [not row.labelled for row in shards.episodes] == [n in UNLABELLED for n in range(5)]
    for index, (row, episode) in enumerate(zip(shards.episodes, written, strict=True)):
        assert np.array_equal(shards.codes_thw(index), episode.codes_thw)
        slots_TA = shards.slots_TA(index)
        if row.labelled:
            assert np.array_equal(slots_TA, episode.slots_TA)
            assert row.num_steps == row.num_frames - 1
            continue
        assert (slots_TA.shape, row.num_steps) == ((0, 1), 0)
        for start, stop in ((0, 3), (2, None), (8, 20)):
            assert shards.slots_TA(index, start, stop).shape == (0, 1)


def test_a_stream_gives_the_same_episodes_without_actions(tmp_path, write_shards):
    write_shards(tmp_path, lengths=HALF, unlabelled=UNLABELLED)
    shards = TokenShards(tmp_path)
    for shard, file in enumerate(shards.files):
        with (tmp_path / file.file).open("rb") as tar:
            for episode, codes_thw, slots_TA in stream_episodes(shards, shard, tar, where="pipe"):
                assert np.array_equal(codes_thw, shards.codes_thw(episode))
                assert np.array_equal(slots_TA, shards.slots_TA(episode))


def test_half_labelled_shards_have_the_same_bytes_every_time(tmp_path, write_shards):
    for name in ("one", "two"):
        write_shards(tmp_path / name, lengths=HALF, unlabelled=UNLABELLED)
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")
    write_shards(tmp_path / "other", lengths=HALF, unlabelled=UNLABELLED[1:])
    others = hashes(tmp_path / "other")
    assert hashes(tmp_path / "one")["shard-000000.tar"] != others["shard-000000.tar"]


def test_fully_labelled_shards_have_the_bytes_that_they_had_before_there_were_others(
    tmp_path, tokenizer_spec, action_spec
):
    """Hashes of what was written before episodes could be unlabelled."""
    codes = tokenizer_spec.codes
    episodes = [
        TokenEpisode(
            key=f"e{n}",
            codes_thw=(np.arange(n * 6).reshape(n, 2, 3) % 300).astype(np.uint16),
            slots_TA=np.arange(n - 1)[:, None] % 3,
            num_frames=n,
            split="train",
            metadata={"n": n},
        )
        for n in (5, 1, 9)
    ]
    record = write_shard(tmp_path, 0, episodes, codes=codes, actions=action_spec)
    write_manifest(
        tmp_path,
        [record],
        tokenizer=tokenizer_spec,
        actions=action_spec,
        codebook_VZ=np.ones((300, 4), np.float32),
        fps=8.75,
        frame_skip=4,
        metrics={"psnr_db": 31.5},
        source={},
    )
    assert {name: digest[:16] for name, digest in hashes(tmp_path).items()} == {
        "codebook.safetensors": "a1cca0b9cde4d80d",
        "manifest.json": "8ee3d91ee705dc52",
        "shard-000000.json": "0c2c934547591163",
        "shard-000000.tar": "f1e50ae0be1793fa",
    }


def test_unknown_actions_where_there_are_none_are_refused(tmp_path, token_episodes, code_spec):
    none = ActionSpec.none()
    (episode,) = token_episodes(code_spec, none, [5])
    with pytest.raises(FormatError, match="slots_TA is None, but there are no actions"):
        write_shard(tmp_path, 0, [replace(episode, slots_TA=None)], codes=code_spec, actions=none)


def npy(rows):
    return npy_bytes(np.zeros((rows, 1), np.uint8))


@pytest.mark.parametrize("read", [read_everything, stream_everything])
def test_a_shard_that_has_actions_where_the_manifest_has_none_is_refused_and_the_other_way(
    tmp_path, write_shards, read
):
    write_shards(tmp_path, lengths=HALF, unlabelled=(1, 2))
    forge(tmp_path, replaced(tmp_path, {"episode-0002.actions.npy": npy(8)}))
    message = r"episode-0002\.actions\.npy: uint8 \(8, 1\), must be uint8 \(0, 1\)"
    with pytest.raises(FormatError, match=message):
        read(tmp_path)
    forge(
        tmp_path,
        replaced(
            tmp_path, {"episode-0002.actions.npy": npy(0), "episode-0000.actions.npy": npy(0)}
        ),
    )
    with pytest.raises(FormatError, match=r"uint8 \(0, 1\), must be uint8 \(4, 1\)"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        (0, {"labelled": False}, "must have the fields key"),
        (1, {"labelled": True}, "says labelled True, the manifest False"),
        (1, {"labelled": 0}, "says labelled 0, the manifest False"),
        (1, {"labelled": None}, "says labelled None"),
    ],
)
def test_a_json_that_contradicts_the_manifest_is_refused(
    tmp_path, write_shards, key, change, message
):
    write_shards(tmp_path, lengths=HALF, unlabelled=(1,))
    name = f"episode-{key:04d}.json"
    about = json.loads(dict(replaced(tmp_path, {}))[name]) | change
    forge(tmp_path, replaced(tmp_path, {name: json.dumps(about).encode()}))
    with pytest.raises(FormatError, match=message):
        TokenShards(tmp_path).metadata(key)


def test_an_unlabelled_row_in_a_folder_of_the_first_schema_is_refused(tmp_path, write_shards):
    write_shards(tmp_path, lengths=HALF, unlabelled=(1,))
    change_manifest(tmp_path, lambda data: data.update(schema="worldloom.token-shards/1"))
    with pytest.raises(FormatError, match="episode episode-0001 is not labelled, which a folder"):
        TokenShards(tmp_path)


def test_webdataset_reads_an_empty_array_where_no_action_is_known(tmp_path, write_shards):
    write_shards(tmp_path, lengths=HALF, unlabelled=(1,))
    urls = [str(tmp_path / "shard-000000.tar")]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    shapes = [np.load(io.BytesIO(sample["actions.npy"])).shape for sample in samples]
    assert shapes == [(4, 1), (0, 1), (8, 1)]
    assert [json.loads(s["json"]).get("labelled", True) for s in samples] == [True, False, True]
