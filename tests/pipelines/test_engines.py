"""tokenize.py with several processes: whoever does the work, however it ends, the same files."""

import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from chain_worlds import hashes, identities, save_tokenizer, write_pushed_squares
from command_server import quiet_environment
from worldloom.common import ConfigError, TokenShards, finished_shard, read_json
from worldloom.pipelines.ranks import Share, find_share, num_cores
from worldloom.pipelines.tokenize import TokenizeConfig, tokenize

LENGTHS = (20, 7, 70, 1, 33, 12, 25, 9)
UNITS = 4


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer") / "model")


@pytest.fixture(scope="module")
def episodes_folder(tmp_path_factory):
    return write_pushed_squares(tmp_path_factory.mktemp("recorded") / "episodes", LENGTHS)


@pytest.fixture(scope="module")
def words(episodes_folder, tokenizer_folder):
    """The command line but for --output: two episodes a shard, four shards."""
    return ("tokenize", "--episodes", episodes_folder, "--tokenizer", tokenizer_folder,
            "--shard-episodes", 2, "--device", "cpu", "--output")  # fmt: skip


@pytest.fixture(scope="module")
def of_ranks(words):
    """The same for ranks; each works itself, as where there are as many as cores."""
    return (words[0], "--workers", 1, *words[1:])


@pytest.fixture(scope="module")
def undisturbed(commands, words, tmp_path_factory):
    """The shards as one process makes them that nobody disturbs."""
    output = tmp_path_factory.mktemp("undisturbed") / "shards"
    ended = commands.run(*words, output, "--workers", 1)
    assert ended.code == 0, ended.err
    return output


def finished_files(output):
    return {
        f"shard-{index:06d}.{suffix}"
        for index in range(UNITS)
        if (output / f"shard-{index:06d}.json").exists()
        for suffix in ("tar", "json")
    }


def check_whole_or_absent(folder, wanted):
    """Every file under a final name is the one that an undisturbed run leaves."""
    for name, digest in hashes(folder).items():
        assert name.startswith("tmp-") or digest == wanted[name]


def check_continues(run, output, wanted):
    """Running again ends as if nothing had happened, and redoes no finished shard."""
    finished = finished_files(output)
    before = identities(output) if output.exists() else {}
    run()
    assert hashes(output) == wanted
    after = identities(output)
    assert {name: after[name] for name in finished} == {name: before[name] for name in finished}
    return len(finished)


def children(pid):
    """The processes that one has started, and not ended."""
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [int(number) for number in text.split()]


def wait_for(condition, seconds=300):
    give_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up, "waited in vain"
        time.sleep(0.002)


def is_gone(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):  # it may end while it is read
        return True


def command_of(pid):
    """The words that a process was started with; none of one that is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def workers_of(running):
    """The processes of a command's crew: those that were told to serve, without helpers."""
    return [pid for pid in children(running.pid) if b"spawn_main" in command_of(pid)]


# The same bytes


def test_two_processes_write_what_one_writes(commands, words, undisturbed, tmp_path):
    output = tmp_path / "shards"
    ended = commands.run(*words, output, "--workers", 2)
    assert ended.code == 0, ended.err
    assert ended.out == f"{output}\n"
    assert hashes(output) == hashes(undisturbed)


def test_ranks_one_after_the_other_write_what_one_process_writes(
    commands, of_ranks, undisturbed, tmp_path
):
    output = tmp_path / "shards"
    first = commands.run(*of_ranks, output, "--rank", 1, "--world", 2)
    assert (first.code, first.out) == (0, ""), first.err
    assert "rank 1 of 2 (--rank): 2 of 4 shards are its own" in first.err
    assert re.search(
        r"2 of 4 shards are still missing \(shard-000000.tar, shard-000002.tar\), of rank 0;",
        first.err,
    )
    assert sorted(path.name for path in output.iterdir()) == [
        "plan.json", "shard-000001.json", "shard-000001.tar", "shard-000003.json",
        "shard-000003.tar",
    ]  # fmt: skip
    last = commands.run(*of_ranks, output, "--rank", 0, "--world", 2)
    assert (last.code, last.out) == (0, f"{output}\n"), last.err
    assert "4 shards (" not in last.err
    assert hashes(output) == hashes(undisturbed)
    again = commands.run(*of_ranks, output, "--rank", 1, "--world", 2)
    assert (again.code, again.out) == (0, f"{output}\n")
    assert "finished before" in again.err


def test_ranks_at_once_write_what_one_process_writes(commands, of_ranks, undisturbed, tmp_path):
    for attempt in range(3):
        output = tmp_path / str(attempt)
        ranks = [commands.start(*of_ranks, output, "--rank", i, "--world", 3) for i in range(3)]
        ended = [rank.wait() for rank in ranks]
        assert [rank.code for rank in ended] == [0, 0, 0], ended
        assert f"{output}\n" in {rank.out for rank in ended}
        assert hashes(output) == hashes(undisturbed)


def test_more_ranks_than_shards_is_no_mistake(commands, of_ranks, undisturbed, tmp_path):
    output = tmp_path / "shards"
    assert commands.run(*of_ranks, output, "--rank", 5, "--world", 6).code == 0
    for rank in range(5):
        assert commands.run(*of_ranks, output, "--rank", rank, "--world", 6).code == 0
    assert hashes(output) == hashes(undisturbed)


@pytest.mark.slow
def test_two_processes_of_torchrun_write_what_one_process_writes(of_ranks, undisturbed, tmp_path):
    output = tmp_path / "shards"
    ended = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
         "-m", "worldloom.pipelines", *map(str, of_ranks), output],
        env=quiet_environment(), capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert "rank 0 of 2 (torchrun): 2 of 4" in ended.stderr
    assert "rank 1 of 2 (torchrun): 2 of 4" in ended.stderr
    assert f"{output}\n" in ended.stdout
    assert hashes(output) == hashes(undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("told", "share"),
    [
        ({"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "2"}, "rank 1 of 2 (Slurm)"),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, "rank 0 of 2 (Slurm)"),
    ],
)
def test_a_task_of_slurm_does_its_share(of_ranks, undisturbed, tmp_path, told, share):
    output = tmp_path / "shards"
    ended = subprocess.run(
        [sys.executable, "-m", "worldloom.pipelines", *map(str, of_ranks), output],
        env={**quiet_environment(), **told}, capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert f"{share}: 2 of 4 shards are its own" in ended.stderr
    assert len(finished_files(output)) == 4
    check_whole_or_absent(output, hashes(undisturbed))


def test_one_pending_shard_starts_no_process(
    episodes_folder, tokenizer_folder, undisturbed, tmp_path
):
    output = tmp_path / "shards"
    shutil.copytree(undisturbed, output)
    (output / "shard-000002.tar").unlink()
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    tokenize(
        TokenizeConfig(
            episodes=episodes_folder, tokenizer=str(tokenizer_folder), output=output,
            shard_episodes=2, device="cpu", workers=2,
        )
    )  # fmt: skip
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime == before
    assert hashes(output) == hashes(undisturbed)


def test_what_one_engine_began_another_goes_on_with(commands, words, undisturbed, tmp_path):
    output = tmp_path / "shards"
    assert commands.run(*words, output, "--rank", 2, "--world", 4, "--workers", 1).code == 0
    run = lambda: commands.run(*words, output, "--workers", 2)  # noqa: E731 - said in one line
    assert check_continues(run, output, hashes(undisturbed)) == 2


def test_ranks_with_another_plan_are_refused(commands, of_ranks, tmp_path):
    output = tmp_path / "shards"
    assert commands.run(*of_ranks, output, "--rank", 0, "--world", 2).code == 0
    before = hashes(output)
    ended = commands.run(*of_ranks, output, "--rank", 1, "--world", 2, "--batch-episodes", 3)
    assert ended.code == 3
    assert "batch_episodes 16 then, 3 now" in ended.err
    assert hashes(output) == before


# Which share


@pytest.mark.parametrize(
    ("environ", "wanted"),
    [
        ({}, (0, 1, 0, 1, "")),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"},
         (3, 8, 1, 2, "torchrun")),
        ({"RANK": "3"}, (0, 1, 0, 1, "")),
        ({"SLURM_ARRAY_TASK_ID": "4", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "1"},
         (3, 4, 0, 1, "Slurm")),
        ({"SLURM_ARRAY_TASK_ID": "6", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "0",
          "SLURM_ARRAY_TASK_STEP": "2"}, (3, 4, 0, 1, "Slurm")),
        ({"SLURM_PROCID": "5", "SLURM_NTASKS": "6", "SLURM_LOCALID": "1",
          "SLURM_STEP_TASKS_PER_NODE": "2(x3)"}, (5, 6, 1, 2, "Slurm")),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "2"},
         (1, 2, 0, 1, "Slurm")),
        ({"SLURM_NTASKS": "4"}, (0, 1, 0, 1, "")),
        ({"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "3", "SLURM_PROCID": "1",
          "SLURM_NTASKS": "4"}, (5, 12, 0, 1, "Slurm")),
        # torchrun inside a Slurm job: it is torchrun that starts the processes.
        ({"RANK": "0", "WORLD_SIZE": "2", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"},
         (0, 2, 0, 1, "torchrun")),
    ],
)  # fmt: skip
def test_the_launcher_is_found_by_its_variables(environ, wanted):
    share = find_share(None, None, environ=environ)
    assert (
        share.rank, share.world, share.local_rank, share.local_world, share.launcher
    ) == wanted  # fmt: skip


def test_flags_win_over_the_launcher():
    environ = {"RANK": "0", "WORLD_SIZE": "2"}
    assert find_share(1, 3, environ=environ) == Share(rank=1, world=3, launcher="--rank")


@pytest.mark.parametrize(
    ("flags", "environ", "said"),
    [
        ((2, None), {}, "go together"),
        ((2, 2), {}, "rank 2 of 2"),
        ((-1, 2), {}, "rank -1 of 2"),
        ((None, None), {"RANK": "x", "WORLD_SIZE": "2"}, "RANK is 'x'"),
        ((None, None), {"RANK": "4", "WORLD_SIZE": "2"}, "rank 4 of 2"),
        # --array=1,3,7: no step fits.
        ((None, None), {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "3",
                        "SLURM_ARRAY_TASK_MIN": "1"}, "give --rank and --world"),
    ],
)  # fmt: skip
def test_a_share_that_cannot_be_is_refused(flags, environ, said):
    with pytest.raises(ConfigError, match=said):
        find_share(*flags, environ=environ)


def test_shares_are_disjoint_and_complete():
    for world in (1, 2, 3, 7, 20):
        shares = [Share(rank=rank, world=world).of(range(13)) for rank in range(world)]
        assert sorted(index for share in shares for index in share) == list(range(13))


def test_ranks_of_one_machine_divide_its_cores_and_slurm_may_give_fewer():
    cores = len(os.sched_getaffinity(0))
    assert num_cores(Share(), environ={}) == cores
    assert num_cores(Share(world=8, local_world=cores), environ={}) == 1
    assert num_cores(Share(world=999, local_world=999), environ={}) == 1
    assert num_cores(Share(), environ={"SLURM_CPUS_PER_TASK": "1"}) == 1


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--rank", 1), "--rank and --world go together"),
        (("--rank", 2, "--world", 2), "rank 2 of 2"),
        (("--rank", 0, "--world", 2, "--engine", "ray"), "Ray hands out the work itself"),
        (("--engine", "processes", "--ray-address", "auto"), "--ray-address goes with"),
        (("--workers", -1), "--workers must be at least 0"),
        (("--skip-bad", -1), "--skip-bad must be at least 0"),
        (("--engine", "abacus"), "abacus"),
    ],
)
def test_settings_that_contradict_each_other_end_with_2_and_write_nothing(
    commands, words, tmp_path, flags, said
):
    ended = commands.run(*words, tmp_path / "shards", *flags)
    assert ended.code == 2
    assert said in ended.err
    assert not (tmp_path / "shards").exists()


# What is damaged


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """Fifty episodes in ten shards; the 27th and the 31st are cut short."""
    folder = write_pushed_squares(
        tmp_path_factory.mktemp("damaged") / "episodes", tuple(3 + i % 5 for i in range(50))
    )
    for number in (26, 30):
        path = folder / f"episode-{number:06d}.npz"
        path.write_bytes(path.read_bytes()[:-100])
    return folder


def test_damaged_episodes_are_named_counted_and_left_out_by_every_engine(
    commands, tokenizer_folder, damaged, tmp_path
):
    words = ("tokenize", "--episodes", damaged, "--tokenizer", tokenizer_folder, "--device", "cpu",
             "--shard-episodes", 5, "--skip-bad", 2, "--output")  # fmt: skip
    for name, ways in {
        "one": [("--workers", 1)],
        "two": [("--workers", 2)],
        "ranks": [("--rank", rank, "--world", 2, "--workers", 1) for rank in (0, 1)],
    }.items():
        ended = [commands.run(*words, tmp_path / name, *way) for way in ways]
        assert [one.code for one in ended] == [0] * len(ways)
        said = "".join(one.err for one in ended)
        for key in ("episode-000026", "episode-000030"):
            assert said.count(f"skipped: {damaged}/{key}.npz: ") == 1
        assert "skipped 2 damaged episodes: episode-000026, episode-000030" in said
        assert " 48 episodes, " in said
        assert hashes(tmp_path / name) == hashes(tmp_path / "one")
    shards = TokenShards(tmp_path / "one")
    shards.verify()
    assert sorted(shards.source["skipped"]) == ["episode-000026", "episode-000030"]
    assert list(finished_shard(tmp_path / "one", 5).skipped) == ["episode-000026"]
    assert len(shards.episodes) == 48
    assert shards.source["plan"]["num_episodes"] == 50


def test_one_damaged_episode_too_many_stops_it_and_what_is_finished_is_kept(
    commands, tokenizer_folder, damaged, tmp_path
):
    words = ("tokenize", "--episodes", damaged, "--tokenizer", tokenizer_folder, "--device", "cpu",
             "--shard-episodes", 5, "--output")  # fmt: skip
    output = tmp_path / "shards"
    ended = commands.run(*words, output, "--workers", 1, "--skip-bad", 1)
    assert ended.code == 3
    error = ended.err.splitlines()[-1]
    assert f"{damaged}/episode-000030.npz: " in error
    assert "episode-000026" in error
    assert "--skip-bad 2" in error
    assert len(list(output.glob("shard-*.tar"))) == 6
    before = identities(output)
    less = commands.run(*words, output, "--workers", 1)
    assert less.code == 3
    assert "episode-000026" in less.err.splitlines()[-1]
    assert commands.run(*words, output, "--workers", 1, "--skip-bad", 2).code == 0
    after = identities(output)
    assert {name: after[name] for name in before} == before


def test_the_bound_holds_over_ranks_that_do_not_talk(commands, tokenizer_folder, damaged, tmp_path):
    words = ("tokenize", "--episodes", damaged, "--tokenizer", tokenizer_folder, "--device", "cpu",
             "--shard-episodes", 5, "--skip-bad", 1, "--world", 2, "--workers", 1,
             "--output")  # fmt: skip
    output = tmp_path / "shards"
    assert commands.run(*words, output, "--rank", 0).code == 0
    last = commands.run(*words, output, "--rank", 1)
    assert last.code == 3
    assert "--skip-bad 2" in last.err.splitlines()[-1]
    assert len(list(output.glob("shard-*.json"))) == 10
    assert not (output / "manifest.json").exists()


def test_what_others_skipped_before_counts_and_the_next_one_stops_the_work_early(
    commands, tokenizer_folder, damaged, tmp_path
):
    words = ("tokenize", "--episodes", damaged, "--tokenizer", tokenizer_folder, "--device", "cpu",
             "--shard-episodes", 5, "--skip-bad", 1, "--workers", 1, "--output")  # fmt: skip
    output = tmp_path / "shards"
    assert commands.run(*words, output, "--rank", 0, "--world", 2).code == 0
    assert finished_shard(output, 6).skipped
    ended = commands.run(*words, output)
    assert ended.code == 3
    assert f"{damaged}/episode-000026.npz: " in ended.err.splitlines()[-1]
    assert not (output / "shard-000007.tar").exists()


def test_where_all_that_is_held_out_is_damaged_nothing_is_claimed_of_the_reconstruction(
    commands, tokenizer_folder, tmp_path
):
    folder = write_pushed_squares(tmp_path / "episodes", (9, 9, 9))
    (folder / "episode-000002.npz").write_bytes(b"no zip")
    output = tmp_path / "shards"
    ended = commands.run("tokenize", "--episodes", folder, "--tokenizer", tokenizer_folder,
                         "--device", "cpu", "--skip-bad", 1, "--output", output)  # fmt: skip
    assert ended.code == 0, ended.err
    assert "was not measured" in ended.err
    assert TokenShards(output).metrics == {
        "psnr_db": None, "moving_psnr_db": None, "split": "validation"
    }  # fmt: skip


def test_nothing_but_damage_is_no_success(commands, tokenizer_folder, tmp_path):
    folder = write_pushed_squares(tmp_path / "episodes", (9, 9))
    for path in folder.glob("*.npz"):
        path.write_bytes(b"no zip")
    ended = commands.run("tokenize", "--episodes", folder, "--tokenizer", tokenizer_folder,
                         "--device", "cpu", "--skip-bad", 5,
                         "--output", tmp_path / "shards")  # fmt: skip
    assert ended.code == 3
    assert "every episode is damaged" in ended.err


# A dry run


def test_a_dry_run_knows_the_bytes_and_writes_nothing(commands, words, undisturbed, tmp_path):
    output = tmp_path / "shards"
    ended = commands.run(*words, output, "--dry-run", "--workers", 3)
    assert ended.code == 0, ended.err
    assert not output.exists()
    numbers = {name: float(value) for name, value in map(str.split, ended.out.splitlines())}
    assert numbers["units"] == UNITS
    assert (numbers["episodes"], numbers["frames"]) == (len(LENGTHS), sum(LENGTHS))
    assert numbers["shard_bytes"] == sum(p.stat().st_size for p in undisturbed.glob("*.tar"))
    assert numbers["workers"] == 3
    by_default = commands.run(*words, output, "--dry-run")
    assert f"workers {min(len(os.sched_getaffinity(0)), UNITS)}\n" in by_default.out
    assert numbers["frames_per_s"] > 0
    assert "an estimate" in ended.err
    assert "nothing was written" in ended.err


def test_a_dry_run_counts_what_is_left_and_takes_no_more_workers_than_that(
    commands, words, undisturbed, tmp_path
):
    output = tmp_path / "shards"
    shutil.copytree(undisturbed, output)
    (output / "manifest.json").unlink()
    (output / "shard-000001.json").unlink()
    before = identities(output)
    ended = commands.run(*words, output, "--dry-run", "--workers", 3)
    assert "units 1\n" in ended.out
    assert "workers 1\n" in ended.out
    assert "episodes 2\n" in ended.out
    assert identities(output) == before
    refused = commands.run(*words, output, "--dry-run", "--shard-episodes", 3)
    assert refused.code == 3
    assert "shard_episodes 2 then, 3 now" in refused.err


def test_a_dry_run_names_what_it_would_skip(commands, tokenizer_folder, damaged, tmp_path):
    words = ("tokenize", "--episodes", damaged, "--tokenizer", tokenizer_folder, "--device", "cpu",
             "--dry-run", "--output", tmp_path / "shards")  # fmt: skip
    ended = commands.run(*words, "--skip-bad", 2)
    assert "episodes 48\n" in ended.out
    assert f"would be skipped: {damaged}/episode-000026.npz: " in ended.err
    assert commands.run(*words, "--skip-bad", 1).code == 3


# Faults


def run_ranks(commands, words, output, **kwargs):
    """Two ranks at once; how they ended."""
    ranks = [commands.start(*words, output, "--rank", i, "--world", 2, **kwargs) for i in range(2)]
    return [rank.wait() for rank in ranks]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("failpoint", "passes"),
    # Of each rank: plan, two shards and their markers; of the last one codebook and manifest.
    [("write", (1, 2, 4, 6)), ("fsync", (3, 5, 7)), ("rename", range(1, 8)),
     ("shard-marker", (1, 2))],
)  # fmt: skip
def test_ranks_killed_at_any_step_and_run_again_leave_the_files_of_an_undisturbed_run(
    commands, of_ranks, undisturbed, tmp_path, failpoint, passes
):
    wanted, killed = hashes(undisturbed), 0
    for nth in passes:
        output = tmp_path / str(nth)
        ended = run_ranks(commands, of_ranks, output, failpoint=f"{failpoint}:{nth}")
        killed += sum(rank.code == -signal.SIGKILL for rank in ended)
        check_whole_or_absent(output, wanted)
        check_continues(lambda: run_ranks(commands, of_ranks, output), output, wanted)  # noqa: B023
    assert killed >= len(passes)


def test_what_a_rank_left_that_was_killed_over_the_manifest_goes_though_another_wrote_it(
    commands, of_ranks, undisturbed, tmp_path
):
    output = tmp_path / "shards"
    shutil.copytree(undisturbed, output, ignore=lambda *_: ["manifest.json"])
    killed = commands.run(*of_ranks, output, "--rank", 0, "--world", 2, failpoint="fsync:2")
    assert killed.code == -signal.SIGKILL
    assert [name for name in hashes(output) if name.endswith("-manifest.json")]
    shutil.copy(undisturbed / "manifest.json", output)  # as the other rank writes it meanwhile
    check_continues(lambda: run_ranks(commands, of_ranks, output), output, hashes(undisturbed))


@pytest.mark.slow
def test_ranks_killed_at_random_times_and_run_again_leave_the_files_of_an_undisturbed_run(
    commands, of_ranks, undisturbed, tmp_path
):
    wanted, rng, killed = hashes(undisturbed), random.Random(5), 0
    began = time.monotonic()
    run_ranks(commands, of_ranks, tmp_path / "clock")
    took = time.monotonic() - began
    for nth in range(20):
        output = tmp_path / str(nth)
        ranks = [commands.start(*of_ranks, output, "--rank", i, "--world", 2) for i in range(2)]
        time.sleep(took * rng.random())
        ranks[nth % 2].send(signal.SIGKILL)
        killed += [rank.wait() for rank in ranks][nth % 2].code == -signal.SIGKILL
        check_whole_or_absent(output, wanted)
        check_continues(lambda: run_ranks(commands, of_ranks, output), output, wanted)  # noqa: B023
    assert killed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("failpoint", "passes"),
    # With the plan there, each worker writes a shard and its marker, about twice.
    [("write", (1, 2, 3)), ("fsync", (2, 4)), ("rename", (1, 2, 3)), ("shard-marker", (1, 2))],
)
def test_workers_killed_at_any_step_cost_no_shard(
    commands, words, undisturbed, tmp_path, failpoint, passes
):
    wanted = hashes(undisturbed)
    for nth in passes:
        output = tmp_path / str(nth)
        output.mkdir()
        shutil.copy(undisturbed / "plan.json", output)
        ended = commands.run(*words, output, "--workers", 2, failpoint=f"{failpoint}:{nth}")
        if ended.code == 1:
            assert re.search(r"process \d+ was killed by SIGKILL on task \d", ended.err)
        else:  # no worker came that far, but then the one who merges did
            assert ended.code == -signal.SIGKILL, ended.err
        check_whole_or_absent(output, wanted)
        check_continues(
            lambda: commands.run(*words, output, "--workers", 1),  # noqa: B023 - called at once
            output,
            wanted,
        )


@pytest.mark.slow
def test_processes_killed_at_random_times_cost_no_shard_and_leave_none_behind(
    commands, words, undisturbed, tmp_path
):
    wanted, rng, killed = hashes(undisturbed), random.Random(7), 0
    began = time.monotonic()
    assert commands.run(*words, tmp_path / "clock", "--workers", 2).code == 0
    took = time.monotonic() - began
    for nth in range(8):  # each starts three processes; the ranks above take 20
        output = tmp_path / str(nth)
        running = commands.start(*words, output, "--workers", 2)
        # Not before there is something to lose: the processes' start takes most of the time.
        if nth % 4:
            wait_for(lambda: not running.is_running() or any(output.glob("*shard-*")))  # noqa: B023
            time.sleep(0.3 * rng.random())
        else:
            time.sleep(took * rng.random())
        workers = workers_of(running)
        if nth % 2 and workers:
            os.kill(rng.choice(workers), signal.SIGKILL)
        else:
            running.send(signal.SIGKILL)
        code = running.wait().code
        assert code in (0, 1, -signal.SIGKILL)
        killed += code != 0
        wait_for(lambda: all(map(is_gone, workers)), 60)  # noqa: B023 - called at once
        check_whole_or_absent(output, wanted)
        check_continues(
            lambda: commands.run(*words, output, "--workers", 1),  # noqa: B023 - called at once
            output,
            wanted,
        )
    assert killed


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_every_process_and_leaves_nothing_half_written(
    commands, tokenizer_folder, tmp_path, number, code
):
    folder = write_pushed_squares(tmp_path / "episodes", (300,) * 16)
    words = ("tokenize", "--episodes", folder, "--tokenizer", tokenizer_folder, "--device", "cpu",
             "--shard-episodes", 2, "--output")  # fmt: skip
    assert commands.run(*words, tmp_path / "whole", "--workers", 1).code == 0
    wanted, output = hashes(tmp_path / "whole"), tmp_path / "shards"
    running = commands.start(*words, output, "--workers", 2)
    wait_for(lambda: any(output.glob("shard-*.json")))
    workers = workers_of(running)
    assert len(workers) == 2
    running.send(number)
    ended = running.wait()
    assert ended.code == code, ended.err
    assert all(map(is_gone, workers))
    assert not list(output.glob("tmp-*"))
    assert not (output / "manifest.json").exists()
    check_whole_or_absent(output, wanted)
    check_continues(lambda: commands.run(*words, output, "--workers", 1), output, wanted)


@pytest.mark.slow
def test_a_full_disk_in_a_worker_is_one_sentence_and_leaves_what_was_whole(
    commands, words, undisturbed, tmp_path
):
    wanted, output = hashes(undisturbed), tmp_path / "shards"
    limit = (undisturbed / "shard-000001.tar").stat().st_size - 1
    ended = commands.run(*words, output, "--workers", 2, largest_file_bytes=limit)
    assert ended.code == 1
    assert len(ended.err.strip().splitlines()) == 1
    assert re.search(r"shard-00000\d.tar: .* bytes free", ended.err)
    assert not list(output.glob("tmp-*"))
    check_whole_or_absent(output, wanted)
    check_continues(lambda: commands.run(*words, output, "--workers", 1), output, wanted)


def test_a_marker_without_its_measures_is_not_taken_for_a_finished_shard(
    commands, words, undisturbed, tmp_path
):
    """As one of an earlier version: the manifest's metrics could not be summed up."""
    output = tmp_path / "shards"
    shutil.copytree(undisturbed, output)
    (output / "manifest.json").unlink()
    marker = read_json(output / "shard-000001.json", what="a marker")
    for measured in ({}, {**marker["measured"], "pixels": -1}, {"pixels": 1}):
        (output / "shard-000001.json").write_text(json.dumps({**marker, "measured": measured}))
        (output / "manifest.json").unlink(missing_ok=True)
        before = identities(output)
        ended = commands.run(*words, output, "--workers", 1)
        assert ended.code == 0, ended.err
        assert hashes(output) == hashes(undisturbed)
        assert identities(output)["shard-000002.tar"] == before["shard-000002.tar"]
