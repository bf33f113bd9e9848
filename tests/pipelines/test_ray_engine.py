"""ray_engine.py: whoever dies on the way, the shards are those of one process, and done once."""

import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version

import pytest
from chain_worlds import hashes, identities, save_tokenizer, write_pushed_squares
from ray_cluster import Watch, add_node, descendants, is_running, parent_of, ray_cluster, wait_until
from worldloom.common import ConfigError, FormatError, WorldloomError, read_json
from worldloom.pipelines.ray_engine import UnitActor, answers
from worldloom.pipelines.tokenize import TokenizeConfig, tokenize
from worldloom.pipelines.units import TokenizeJob

pytest.importorskip("ray", reason="RAY IS NOT INSTALLED, so nothing of --engine ray is tested")

# The third is longer than a piece of 64 frames, one has no action at all.
LENGTHS = (20, 7, 70, 1, 33, 12, 9, 15)


@pytest.fixture(scope="module")
def cluster():
    with ray_cluster() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer") / "model")


@pytest.fixture(scope="module")
def episodes(tmp_path_factory):
    return write_pushed_squares(tmp_path_factory.mktemp("recorded") / "episodes", LENGTHS)


@pytest.fixture(scope="module")
def undisturbed(episodes, model, tmp_path_factory):
    """The shards as one process makes them."""
    output = tmp_path_factory.mktemp("one") / "shards"
    tokenize(replace(config(episodes, model, output), engine="processes", workers=1))
    return output


@pytest.fixture(scope="module")
def wanted(undisturbed):
    return hashes(undisturbed)


def config(episodes, tokenizer, output) -> TokenizeConfig:
    """One shard an episode, by the cluster that this process is connected to."""
    return TokenizeConfig(
        episodes=episodes, tokenizer=str(tokenizer), output=output, device="cpu",
        shard_episodes=1, engine="ray",
    )  # fmt: skip


@contextmanager
def tokenizing(config, watch) -> Iterator[None]:
    """Tokenize while the block runs; after it everybody who waits may go on, to the end."""
    with ThreadPoolExecutor(1) as thread:
        running = thread.submit(tokenize, config)
        try:
            yield
        finally:
            watch.go()
        running.result()


@pytest.mark.slow
def test_two_nodes_write_the_shards_of_one_process_though_one_that_joins_cannot_begin(
    cluster, episodes, model, wanted, tmp_path, capsys
):
    other = tmp_path / "other/worldloom-0.0.1.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: worldloom\nVersion: 0.0.1\n")
    watch, node, said = Watch(tmp_path / "watch", model), None, []

    def has_failed():
        said.append(capsys.readouterr().err)
        return "those that did begin go on" in "".join(said)

    try:
        with tokenizing(config(episodes, watch.tokenizer, tmp_path / "shards"), watch):
            wait_until(lambda: len(watch.waiting) == 2)
            at_work = set(map(parent_of, watch.waiting))
            node = add_node(cluster, environment={"PYTHONPATH": str(other.parent)})
            wait_until(has_failed)
    finally:
        if node is not None:
            cluster.remove_node(node)
    assert hashes(tmp_path / "shards") == wanted
    assert len(at_work) == 2  # a process on each node
    assert watch.num_calls == len(LENGTHS)  # each unit once
    assert "failed 3 times to begin" in "".join(said)
    assert "has worldloom 0.0.1, this is " in "".join(said)


@pytest.mark.slow
def test_with_a_killed_actor_only_its_unit_is_done_again(
    cluster, episodes, model, wanted, tmp_path, capsys
):
    output, watch = tmp_path / "shards", Watch(tmp_path / "watch", model, free=3)
    with tokenizing(config(episodes, watch.tokenizer, output), watch):
        wait_until(lambda: len(watch.waiting) == 2)
        before = identities(output)
        os.kill(watch.waiting[0], signal.SIGKILL)
        wait_until(lambda: len(watch.waiting) == 3)  # the killed one's sign, and its successor's
    assert hashes(output) == wanted
    finished = [name for name in before if name.startswith("shard-")]
    assert len(finished) >= 4  # two shards with their markers
    after = identities(output)
    assert {name: after[name] for name in finished} == {name: before[name] for name in finished}
    assert watch.num_calls == len(LENGTHS) + 1
    said = capsys.readouterr()
    assert said.err.count("handed out again") == 1
    assert said.out == ""


@pytest.mark.slow
def test_a_node_that_joins_is_used_and_when_it_is_killed_its_unit_is_done_elsewhere(
    cluster, episodes, model, wanted, tmp_path
):
    output, watch = tmp_path / "shards", Watch(tmp_path / "watch", model, free=2)
    with tokenizing(config(episodes, watch.tokenizer, output), watch):
        wait_until(lambda: len(watch.waiting) == 2)
        known = set(watch.waiting)
        node = add_node(cluster)
        wait_until(lambda: len(watch.waiting) == 3)
        (lost,) = set(watch.waiting) - known
        assert parent_of(lost) not in map(parent_of, known)
        before = identities(output)
        cluster.remove_node(node, allow_graceful=False)
        wait_until(lambda: not is_running(lost))
    assert hashes(output) == wanted
    finished = [name for name in before if name.startswith("shard-")]
    assert len(finished) >= 2
    after = identities(output)
    assert {name: after[name] for name in finished} == {name: before[name] for name in finished}
    assert watch.num_calls == len(LENGTHS) + 1


@pytest.mark.slow
def test_a_unit_that_always_kills_its_process_ends_with_a_sentence_after_three_tries(
    cluster, episodes, model, wanted, tmp_path
):
    output, watch = tmp_path / "shards", Watch(tmp_path / "watch", model, free=4, then="die")
    with pytest.raises(WorldloomError, match=r"^shard-00000\d.tar: its process died 3 times \("):
        tokenize(replace(config(episodes, watch.tokenizer, output), workers=1))
    assert watch.num_calls == 4 + 3
    kept = {name: digest for name, digest in hashes(output).items() if "tmp-" not in name}
    assert len(kept) == 1 + 2 * 4  # the plan, and four shards with their markers
    assert kept.items() <= wanted.items()


@pytest.mark.slow
def test_a_damaged_episode_is_a_format_error_and_what_is_finished_is_kept(
    cluster, model, wanted, tmp_path
):
    folder, output = write_pushed_squares(tmp_path / "episodes", LENGTHS), tmp_path / "shards"
    bad = folder / "episode-000005.npz"
    content = bad.read_bytes()
    bad.write_bytes(content[:200] + bytes(100) + content[300:])  # its size is part of the plan
    one = replace(config(folder, model, output), workers=1)
    with pytest.raises(FormatError, match="episode-000005") as raised:
        tokenize(one)
    assert type(raised.value) is FormatError
    assert len(hashes(output)) == 1 + 2 * 5
    before = identities(output)
    bad.write_bytes(content)
    tokenize(replace(one, engine="processes"))
    assert hashes(output) == wanted
    after = identities(output)
    assert {name: after[name] for name in before} == before


@pytest.fixture
def job(episodes, model, undisturbed, tmp_path) -> TokenizeJob:
    """All units of a folder that was just begun."""
    output = tmp_path / "begun"
    output.mkdir()
    shutil.copy(undisturbed / "plan.json", output)
    return TokenizeJob(
        episodes=episodes, tokenizer=str(model), output=output, device="cpu", threads=1,
        shard_episodes=1, batch_episodes=16, skip_bad=0, plan=read_json(
            output / "plan.json", what="a plan"
        ),
    )  # fmt: skip


@pytest.mark.slow
def test_a_job_on_cuda_goes_where_a_gpu_is_free_and_sees_that_one_only(
    cluster, job, model, tmp_path
):
    """No GPU is needed: a node says that it has two, and the tokenizer notes what it is told."""
    watch = Watch(tmp_path / "watch", model, free=len(LENGTHS))
    node = add_node(cluster, num_cpus=0, num_gpus=2)
    try:
        on_cuda = replace(job, tokenizer=watch.tokenizer, device="cuda:7")
        reports = list(answers(on_cuda, [4, 2, 1, 0], workers=0, address=""))
    finally:
        cluster.remove_node(node)
    assert sorted(report.index for report in reports) == [0, 1, 2, 4]
    assert sorted(watch.devices) == [("cuda", "0"), ("cuda", "1")]


@pytest.mark.slow
def test_a_node_that_does_not_see_the_data_is_a_sentence(cluster, job, tmp_path):
    elsewhere, said = tmp_path / "elsewhere", r"elsewhere: not there on Ray's node .* same path$"
    with pytest.raises(ConfigError, match=said):
        list(answers(replace(job, episodes=elsewhere), [0], workers=1, address=""))
    for lost in (
        replace(job, output=elsewhere),
        replace(job, tokenizer=str(elsewhere)),
        replace(job, tokenizer=f"module:Class={elsewhere}"),
    ):
        kind, error = UnitActor(lost, "", version("worldloom")).open()
        assert kind == "error"
        assert isinstance(error, ConfigError)
        assert re.search(said, str(error))


def test_a_node_with_another_worldloom_is_refused(job):
    kind, error = UnitActor(job, "", "0.0.1").open()
    assert kind == "error"
    assert isinstance(error, ConfigError)
    assert "this is 0.0.1" in str(error)


def test_without_ray_the_error_says_how_to_install_it(job, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install 'worldloom\[ray\]'"):
        list(answers(job, [0], workers=1, address=""))


@pytest.mark.parametrize("address", ["127.0.0.1:9", "ray://127.0.0.1:9", "somewhere"])
def test_an_address_without_a_cluster_is_wrong_usage_at_once(
    commands, episodes, model, tmp_path, address
):
    assert commands.run("--version").code == 0  # the server that starts them is ready
    began = time.monotonic()
    ended = commands.run("tokenize", "--episodes", episodes, "--tokenizer", model,
                         "--output", tmp_path / "shards", "--device", "cpu",
                         "--ray-address", address)  # fmt: skip
    assert ended.code == 2, ended.err
    assert f"error: --ray-address {address}: " in ended.err
    assert len(ended.err.strip().splitlines()) == 1
    assert time.monotonic() - began < 60  # most of it imports Ray, which would try for minutes


def folders_of_ray(pid) -> list[str]:
    """The folders of the Ray that a command started, which have its number in their name."""
    return [name for name in os.listdir("/tmp") if name.startswith(f"worldloom-ray-{pid}-")]


@pytest.fixture(scope="module")
def words(episodes, model):
    return ("tokenize", "--episodes", episodes, "--tokenizer", model, "--device", "cpu",
            "--shard-episodes", 1, "--engine", "ray", "--output")  # fmt: skip


@pytest.mark.slow
def test_a_local_ray_says_nothing_on_stdout_redoes_no_marked_unit_and_leaves_nothing(
    commands, words, wanted, tmp_path
):
    """Every worker dies as soon as the marker of its second unit is there, its report unsaid."""
    output = tmp_path / "shards"
    running = commands.start(*words, output, "--workers", 2, failpoint="rename:4")
    wait_until(lambda: (output / "shard-000000.json").exists())
    started = descendants(running.pid)
    assert len(started) > 5
    assert len(folders_of_ray(running.pid)) == 1
    ended = running.wait()
    assert ended.code == 0, ended.err
    assert ended.out == f"{output}\n"
    assert hashes(output) == wanted
    assert "handed out again" not in ended.err
    wait_until(lambda: not any(map(is_running, started)), timeout_s=60)
    assert folders_of_ray(running.pid) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "local"), [(signal.SIGTERM, 143, True), (signal.SIGINT, 130, False)]
)
def test_a_signal_ends_it_with_every_process_gone_and_the_next_run_continues(
    cluster, commands, words, episodes, model, wanted, tmp_path, number, code, local
):
    output, watch = tmp_path / "shards", Watch(tmp_path / "watch", model, free=3)
    where = () if local else ("--ray-address", cluster.address)
    running = commands.start(*words, output, "--tokenizer", watch.tokenizer, "--workers", 1, *where)
    wait_until(lambda: watch.waiting)
    started = [*descendants(running.pid), *watch.waiting]
    assert len(folders_of_ray(running.pid)) == int(local)
    running.send(number)
    ended = running.wait()
    assert ended.code == code, ended.err
    assert ended.out == ""
    assert "run the same command again" in ended.err
    wait_until(lambda: not any(map(is_running, started)), timeout_s=60)
    assert folders_of_ray(running.pid) == []
    if not local:
        assert len([node for node in cluster.list_all_nodes() if node.any_processes_alive()]) == 2
    before = {name: at for name, at in identities(output).items() if name.startswith("shard-")}
    assert len(before) == 2 * 3
    again = replace(config(episodes, model, output), engine="processes", workers=1)
    tokenize(again)
    assert hashes(output) == wanted
    after = identities(output)
    assert {name: after[name] for name in before} == before
