"""Plans and manifests of any content, through the commands' own functions: our errors, or a value.

What reads the files themselves is fuzzed in tests/common/test_fuzz.py.
"""

import json
import shutil
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from worldloom.common import FormatError, MismatchError, TokenShards, WorldloomError, write_json
from worldloom.pipelines.info import describe
from worldloom.pipelines.info_text import render
from worldloom.pipelines.shard_plan import keep_plan
from worldloom.pipelines.shard_tools import ShardsConfig, shards

PER_SEED = 25


@settings(max_examples=40)
@given(seed=st.integers(0, 2**32))
def test_1000_changed_plans_are_the_same_or_refused(tmp_path, mutations, seed):
    plan = {"made_by": "worldloom shards merge", "sources": ["ab" * 32], "num_shards": 3}
    path = tmp_path / "plan.json"
    for data in mutations(plan, seed=seed, count=PER_SEED):
        path.unlink(missing_ok=True)
        path.write_text(json.dumps(data))
        if data == plan:
            keep_plan(tmp_path, plan)
        else:
            with pytest.raises((FormatError, MismatchError)) as caught:
                keep_plan(tmp_path, plan)
            assert str(caught.value).startswith(str(tmp_path))


@pytest.mark.slow
@settings(max_examples=40)
@given(seed=st.integers(0, 2**32))
def test_1000_changed_manifests_are_described_and_copied_or_refused(
    tmp_path, write_shards, mutations, may_refuse, seed
):
    folder, path = tmp_path / "shards", tmp_path / "shards" / "manifest.json"
    if not (tmp_path / "good.json").exists():
        write_shards(folder, lengths=((5, 1), (4,)))
        write_json(folder / "plan.json", {})
        shutil.copy(path, tmp_path / "good.json")
    output = tmp_path / "copy"
    for data in mutations(
        json.loads((tmp_path / "good.json").read_text()), seed=seed, count=PER_SEED
    ):
        path.unlink(missing_ok=True)
        path.write_text(json.dumps(data))
        began = time.process_time()
        shutil.rmtree(output, ignore_errors=True)
        for work in (lambda: render(describe(folder)), lambda: copy(folder, output)):
            with may_refuse(WorldloomError, str(tmp_path)):
                work()
        assert time.process_time() - began < 5


def copy(folder, output):
    """Cut shards anew, and read what was written."""
    shards(ShardsConfig(action="subset", folders=(folder,), output=output, shard_episodes=2))
    TokenShards(output).verify()
