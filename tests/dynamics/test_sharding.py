"""Promises of sharding.py: dealt-out weights train what whole ones do, and take half the memory.

Two processes under torchrun, on gloo. `python test_sharding.py bytes` and `losses` are what they
run that say how much they hold, and what they compute.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from dynamics.test_training import ENVIRONMENT, assert_equal_runs, numbers, rewind
from dynamics.test_training_processes import shards, train_in_two  # noqa: F401 - a fixture
from dynamics.toys import make_model, random_codes, random_slots, tiny, train
from dynamics.training_options import MODEL
from dynamics.training_options import TRAINING as EVERYTHING
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from worldloom.common import newest_checkpoint
from worldloom.dynamics import DynamicsModel, WindowBatch
from worldloom.dynamics.objective import Objective
from worldloom.dynamics.sharding import Sharded

DEALT: dict[str, object] = {"sharded": True}
SETTINGS: dict[str, dict[str, dict[str, object]]] = {
    "the defaults": {"training": DEALT},
    "adamw": {"training": {**DEALT, "optimizer": "adamw"}},
    "everything": {"model": MODEL, "training": {**EVERYTHING, **DEALT, "micro_windows": 1}},
    "streams, prepended, factorised, distance": {
        "model": {
            "residual_streams": 2, "action_input": "prepended", "attention": "factorised",
            "head": "distance",
        },
        "training": DEALT,
    },
    "no meta tokens, an action head that learns nothing": {
        "model": {**MODEL, "num_meta_tokens": 0}, "training": {**DEALT, "action_weight": 0.0},
    },
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_two_processes_with_half_the_weights_train_what_one_with_all_trains(
    shards,  # noqa: F811
    tmp_path,
    name,
):
    """Losses of twenty updates within 1e-5; weights and gradients but for what Adam enlarges."""
    model, training = (SETTINGS[name].get(part, {}) for part in ("model", "training"))
    training = {**training, "num_steps": 20, "checkpoint_every": 20, "learning_rate": 1e-3}
    train_in_two(shards, tmp_path / "two", {"model": model, "training": training})
    train(shards.folder, tmp_path / "one", model=tiny(**model), **{**training, "sharded": False})
    one, two = (numbers(tmp_path / run) for run in ("one", "two"))
    assert len(one) == len(two) == 20 + 7
    for first, second in zip(one, two, strict=True):
        assert first.keys() == second.keys()
        for key in ("loss", "action_loss", "validation_loss", "gradient_norm"):
            # The norm follows the weights, and the shares of streams differ by more: see below.
            within = 1e-4 if key == "gradient_norm" else 1e-5
            if key in first:
                assert second[key] == pytest.approx(first[key], rel=within), (first["step"], key)
    groups = [newest_checkpoint(tmp_path / run)[0].tensors for run in ("one", "two")]
    assert groups[0].keys() == groups[1].keys()
    for group, tensors in groups[0].items():
        assert tensors.keys() == groups[1][group].keys()
        for key, tensor in tensors.items():
            other = groups[1][group][key]
            assert other.shape == tensor.shape
            if group != "optimizer":
                # Adam divides by what is nearly 0, and so enlarges a rounding: most of all in the
                # shares of streams, whose gradients are about 0 as long as all streams are alike.
                most = 1e-3 if key.endswith(".share") else 5e-5
                assert torch.allclose(tensor, other, rtol=0, atol=most), (group, key)


@pytest.mark.slow
def test_in_bfloat16_half_the_weights_learn_what_all_learn(shards, tmp_path):  # noqa: F811
    training = {"num_steps": 6, "bf16": True}
    train_in_two(shards, tmp_path / "two", {"training": {**training, **DEALT}})
    train(shards.folder, tmp_path / "one", **training)
    losses = [
        [row["loss"] for row in numbers(tmp_path / run) if "loss" in row] for run in ("one", "two")
    ]
    # bf16 has three digits; what is summed in another order differs in the last.
    assert losses[1] == pytest.approx(losses[0], rel=5e-3)


@pytest.mark.slow
def test_resuming_changes_nothing_to_the_last_bit(shards, tmp_path):  # noqa: F811
    settings = SETTINGS["everything"]
    train_in_two(shards, tmp_path / "finished", settings)
    run = rewind(tmp_path / "finished", tmp_path / "run")
    train_in_two(shards, run, settings)
    assert "from update 3" in (run / "log.txt").read_text()
    assert_equal_runs(tmp_path / "finished", run)


@pytest.mark.slow
@pytest.mark.parametrize("began", ["sharded", "whole"])
def test_whole_weights_go_on_with_what_dealt_out_ones_began_and_the_reverse(
    shards,  # noqa: F811
    tmp_path,
    began,
):
    model, training = SETTINGS["everything"]["model"], SETTINGS["everything"]["training"]
    whole = {**training, "sharded": False}
    for run in ("straight", "changed"):
        train(shards.folder, tmp_path / run, model=tiny(**model), **whole)
    if began == "sharded":
        shutil.rmtree(tmp_path / "changed")
        train_in_two(shards, tmp_path / "changed", {"model": model, "training": training})
    run = tmp_path / "changed"
    shutil.rmtree(run / "checkpoints" / "step-00000006")
    shutil.rmtree(run / "model")
    if began == "sharded":
        train(shards.folder, run, model=tiny(**model), **whole)
    else:
        train_in_two(shards, run, {"model": model, "training": training})
    assert "from update 3" in (run / "log.txt").read_text()
    for first, second in zip(numbers(tmp_path / "straight"), numbers(run), strict=True):
        if "loss" in first:
            assert second["loss"] == pytest.approx(first["loss"], rel=1e-5)
    assert DynamicsModel.from_pretrained(run / "model").config == tiny(**model)


def told_by_two(what: str) -> list[dict[str, object]]:
    """What two processes that run this file say."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               "--nproc_per_node=2", __file__, what]  # fmt: skip
    done = subprocess.run(
        command, env=ENVIRONMENT, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(told) == 2
    return told


@pytest.mark.slow
def test_layers_gathered_whole_in_bfloat16_learn_with_several_streams():
    """As they are where they are compiled, which is on CUDA only."""
    for one in told_by_two("losses"):
        assert one["whole_layers"] == pytest.approx(one["plain"], rel=1e-2)


@pytest.mark.slow
def test_each_process_holds_half_of_the_bytes_and_the_layers_only_while_they_run():
    told = told_by_two("bytes")
    for kind in ("parameters", "gradients"):
        for one in told:
            # A vector is dealt out too; what has a single row lies in one process alone.
            assert one[kind] == pytest.approx(one["whole"] / 2, rel=0.05)
        assert sum(one[kind] for one in told) == told[0]["whole"]
    for one in told:
        assert one["layers_whole"] == [False, False, False]


def say_bytes() -> None:
    """Print what this process holds after a forward and a backward."""
    accelerator = Accelerator(cpu=True)
    dynamics = make_model(num_layers=3, dim=64).requires_grad_(requires_grad=True).train()
    whole = _bytes(dynamics.parameters())
    place = Sharded(Objective(dynamics, z_loss=False, bf16=False), accelerator)
    codes_Bthw = random_codes(dynamics, 3)
    batch = WindowBatch(
        codes_Bthw=codes_Bthw,
        slots_BTA=random_slots(dynamics, 3),
        valid_Bt=torch.ones(codes_Bthw.shape[:2], dtype=torch.bool),
    )
    place.objective(batch, batch).code_nats.backward()
    told = {
        "whole": whole,
        "parameters": _bytes(dynamics.parameters()),
        "gradients": _bytes([p.grad for p in dynamics.parameters()]),
        "layers_whole": [
            any(not isinstance(m.weight, DTensor) for m in layer.modules() if type(m) is nn.Linear)
            for layer in dynamics.transformer.layers
        ],
    }
    sys.stdout.write(json.dumps(told) + "\n")


def say_losses() -> None:
    """Print the loss in bf16 with layers gathered whole, and with nothing dealt out."""
    accelerator = Accelerator(cpu=True)
    dynamics = make_model(residual_streams=2).requires_grad_(requires_grad=True).train()
    objective = Objective(dynamics, z_loss=False, bf16=True)
    codes_Bthw = random_codes(dynamics, 3)
    batch = WindowBatch(
        codes_Bthw=codes_Bthw,
        slots_BTA=random_slots(dynamics, 3),
        valid_Bt=torch.ones(codes_Bthw.shape[:2], dtype=torch.bool),
    )
    plain = objective(batch, batch).code_nats.item()
    place = Sharded(objective, accelerator, whole_layers=True)
    nats = place.objective(batch, batch).code_nats
    nats.backward()
    sys.stdout.write(json.dumps({"plain": plain, "whole_layers": nats.item()}) + "\n")


def _bytes(tensors: object) -> int:
    return sum(_own(tensor).nbytes for tensor in tensors)  # type: ignore[attr-defined]


def _own(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    torch.set_num_threads(1)
    {"bytes": say_bytes, "losses": say_losses}[sys.argv[1]]()
    torch.distributed.barrier()  # or one would leave while the other still hears from it
    torch.distributed.destroy_process_group()
