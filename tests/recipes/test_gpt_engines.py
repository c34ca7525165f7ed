"""The recipe under every engine that two CPU processes can run, against one process.

Losses and gradient norms are held to 1e-5 of one process's: the sums are the same, but float32 adds them in another
order, which was measured to move them by 3e-7 (and weights by 2e-7). Resuming is held to the bit. FSDP2 runs through
engine_shim.py, which says why.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.launching import ON_CPUS, assert_no_traceback, finish, launch, preloaded_python, wait_for
from tests.recipes import engines, float64_updates
from tests.recipes.runs import Runs, assert_same, metric, state_at, weights

TINY: dict[str, Any] = {
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 2,
    "seq_length": 32,
    "vocab_size": 300,
    "global_batch_size": 8,
    "max_steps": 6,
    "warmup_steps": 2,
    "log_every": 1,
    "save_every": 3,
}
# Two micro-batches a process. Every update is clipped, to so small a norm that AdamW, which cancels what all gradients
# are divided by, cannot hide it: its epsilon is then as large as they are.
FIELDS = {
    "muon": TINY,
    "unclipped_muon": {**TINY, "max_grad_norm": 0.0, "weight_decay": 0.1, "per_device_batch_size": 2},  # DeepSpeed's
    "adamw": {**TINY, "optimizer": "adamw", "per_device_batch_size": 2, "max_grad_norm": 1e-5, "weight_decay": 0.1},
}
ENGINES = engines.pairs("gpt/pretrain.py")
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def runs(gpt: ModuleType, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(gpt, FIELDS, corpus, tmp_path_factory.mktemp("engines"))


def assert_close(run_dir: Path, other: Path) -> None:
    """Equal but for the order in which float32 numbers were added.

    DeepSpeed's Muon is compared in bfloat16, in which it finds directions on CPUs too, and reports another norm;
    tests/shared/optim/test_muon.py compares its steps in float32.
    """
    is_short = "unclipped_muon" in run_dir.name
    names = ["train/loss", "train/learning_rate", "eval/loss"] + ["train/grad_norm"] * (not is_short)
    assert metric(run_dir, "step") == metric(other, "step")
    for name in names:
        assert metric(run_dir, name) == pytest.approx(metric(other, name), rel=1e-4 if is_short else 1e-5), name
    for name, value in weights(run_dir).items():
        expected = weights(other)[name]
        if is_short:
            assert (value - expected).norm() < 0.1 * expected.norm(), name  # 6 % of a matrix that begins at zero
        else:
            torch.testing.assert_close(value, expected, rtol=0, atol=1e-5)


# -- one process or two ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("engine", "optimizer"), [ENGINES[0], *(pytest.param(*engine, marks=pytest.mark.slow) for engine in ENGINES[1:])]
)
def test_engine_equals_one_process(runs: Runs, engine: str, optimizer: str) -> None:
    from transformers import AutoModelForCausalLM

    run_dir = runs.of_engine(engine, optimizer)
    assert_close(run_dir, runs.of_one_process(optimizer))
    exported = AutoModelForCausalLM.from_pretrained(run_dir).state_dict()
    assert all(torch.equal(exported[name], value) for name, value in weights(run_dir).items())


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{"max_grad_norm": 1.0}, {"learning_rate": 3e-3}, {"global_batch_size": 4}])
def test_the_losses_above_would_show_a_wrong_value(runs: Runs, fields: dict[str, Any]) -> None:
    """With what DeepSpeed clips to by itself, a wrong rate or one micro-batch too few, they differ far more."""
    loss, other = (metric(runs.of_one_process("adamw", **wrong), "train/loss") for wrong in ({}, fields))
    assert abs(loss[-1] / other[-1] - 1) > 1e-3


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[dict[str, Path]]:
    """Two network namespaces joined by a cable, and a disk that each of them has mounted in a folder of its own."""
    folders = {f"{tmp_path.name[-6:]}-{os.getpid()}-{number}": tmp_path / f"machine{number}" for number in (0, 1)}
    (tmp_path / "disk").mkdir()
    first, second = folders
    with contextlib.ExitStack() as undo:
        try:
            for name, folder in folders.items():
                system("ip", "netns", "add", name)
                undo.callback(system, "ip", "netns", "delete", name)
                folder.mkdir()
                system("mount", "--bind", tmp_path / "disk", folder)
                undo.callback(system, "umount", folder)
            system(*f"ip link add cable netns {first} type veth peer name cable netns {second}".split())
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("needs the right to make network namespaces and mounts")
        for number, name in enumerate(folders):
            system("ip", "-n", name, "address", "add", f"10.77.0.{number + 1}/24", "dev", "cable")
            for device in ("lo", "cable"):
                system("ip", "-n", name, "link", "set", device, "up")
        yield folders


def system(*words: str | Path) -> str:
    return subprocess.run(list(map(str, words)), check=True, capture_output=True, text=True).stdout


@pytest.mark.slow
def test_a_machine_that_vanishes_ends_the_other_and_both_go_on(
    runs: Runs, machines: dict[str, Path], tmp_path: Path
) -> None:
    """Its cable is pulled and all of it is killed, so that nobody tells the other, which must not wait for ever."""
    fields = {**TINY, "max_steps": 30, "save_every": 2, "timeout_minutes": 0.25}
    address = ("--main_process_ip=10.77.0.1", "--main_process_port=29500")
    _, second = machines

    def start_both() -> list[subprocess.Popen[str]]:
        return [
            runs.start(
                "multi_node",
                folder / "run",
                fields,
                launcher=(*ON_CPUS, *address, f"--machine_rank={rank}"),
                NETWORK=name,
                GLOO_SOCKET_IFNAME="cable",
            )
            for rank, (name, folder) in enumerate(machines.items())
        ]

    metrics = tmp_path / "disk" / "run" / "metrics.jsonl"
    nodes = start_both()
    wait_for(lambda: metrics.is_file() and metrics.read_text().count("\n") >= 3, 120)
    system("ip", "-n", second, "link", "set", "cable", "down")
    for pid in system("ip", "netns", "pids", second).split():
        os.kill(int(pid), signal.SIGKILL)
    began = time.monotonic()
    whole = runs.start("multi_cpu", tmp_path / "whole", fields)
    output = finish(nodes[0], timeout=90)
    assert nodes[0].returncode == 1, output
    assert time.monotonic() - began < 60
    finish(nodes[1])
    output = finish(whole)
    assert whole.returncode == 0, output
    assert len(metric(tmp_path / "disk" / "run", "step")) < 30
    system("ip", "-n", second, "link", "set", "cable", "up")
    nodes = start_both()
    outputs = [finish(node) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(outputs)
    assert_same(tmp_path / "disk" / "run", tmp_path / "whole")


@pytest.mark.slow
def test_two_nodes_equal_one_process(runs: Runs, tmp_path: Path) -> None:
    """Two launchers on this machine, each a node of one process."""
    nodes = [
        runs.start(
            "multi_node", tmp_path / "run", FIELDS["adamw"], launcher=(*ON_CPUS, *address, f"--machine_rank={rank}")
        )
        for address in [("--main_process_ip=127.0.0.1", f"--main_process_port={free_port()}")]
        for rank in (0, 1)
    ]
    outputs = [finish(node) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(outputs)
    assert_close(tmp_path / "run", runs.of_one_process("adamw"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "optimizer"),
    [
        ("fsdp2", "adamw"),
        ("deepspeed_zero1", "adamw"),  # stage 1 has another optimizer in bfloat16
        ("deepspeed_zero1", "unclipped_muon"),
        ("deepspeed_zero3", "unclipped_muon"),
    ],
)
def test_bfloat16_differs_little_and_resumes_exactly(runs: Runs, tmp_path: Path, engine: str, optimizer: str) -> None:
    """Products have three digits, and their errors mostly cancel, but grow with what the weights have moved.

    Losses were measured to differ by 2e-5 after two updates and by up to 4.4e-4 after four at the full rate.
    """
    options: dict[str, Any] = {"launcher": ("--num_processes=2", "--mixed_precision=bf16")}
    if engine == "fsdp2":
        options["ACCELERATE_USE_CPU"] = "true"
    status, output = runs.run(engine, tmp_path / "run", FIELDS[optimizer], **options)
    assert status == 0, output
    losses = metric(tmp_path / "run", "train/loss")
    assert losses == pytest.approx(metric(runs.of_one_process(optimizer), "train/loss"), rel=1e-3)
    resumed = state_at(tmp_path / "run", 3, tmp_path / "resumed")
    status, output = runs.run(engine, resumed, FIELDS[optimizer], **options)
    assert status == 0, output
    assert_same(resumed, tmp_path / "run")


@pytest.mark.slow
def test_zero3_starts_from_a_whole_model(runs: Runs, tmp_path: Path) -> None:
    """Left alone, transformers shards a model that it loads under ZeRO-3 before its FLOPs can be counted."""
    fields = {**FIELDS["adamw"], "max_steps": 2, "learning_rate": 0.02, "init": str(runs.of_one_process("adamw"))}
    process = runs.start("deepspeed_zero3", tmp_path / "run", fields)
    runs.run_here(tmp_path / "one", fields)
    output = finish(process)
    assert process.returncode == 0, output
    assert_close(tmp_path / "run", tmp_path / "one")


@pytest.mark.slow
def test_float64_updates_are_equal(gpt: ModuleType, tmp_path: Path) -> None:
    """One batch of 8, two micro-batches of 4, two processes, and two with two micro-batches: the same to 1e-10."""
    status, output = launch(
        "multi_cpu", Path(float64_updates.__file__), "gpt", tmp_path, "4", "2", python=preloaded_python()
    )
    assert status == 0, output
    results = [float64_updates.train("gpt", gpt, micro_batch_size) for micro_batch_size in (8, 4)]
    results += [load_file(tmp_path / f"{micro_batch_size}.safetensors") for micro_batch_size in (4, 2)]
    assert results[0]["norm"] > 0.2  # twice what it is clipped to
    for result in results[1:]:
        for name, value in result.items():
            torch.testing.assert_close(value, results[0][name], rtol=1e-10, atol=1e-10)


# -- stop, resume, another number of processes -------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "optimizer", "signalled"),
    # A scheduler signals the launcher, or one process alone gets the signal.
    [(*pair, "2" if pair[0] == "multi_cpu" else "2:1") for pair in engines.STOPPED["gpt/pretrain.py"]],
)
def test_stopping_and_going_on_is_exact(
    runs: Runs, tmp_path: Path, engine: str, optimizer: str, signalled: str
) -> None:
    whole, run_dir = runs.of_engine(engine, optimizer), tmp_path / "run"
    fields = {**FIELDS[optimizer], "save_every": 0}
    status, output = runs.run(engine, run_dir, fields, SIGTERM_AT=signalled)
    assert status == 1, output  # of the launcher
    assert ("exitcode  : 75" in output) == (":" in signalled)  # a launcher that was signalled does not tell
    assert "stopped: saved at step 4 of 6" in output
    assert_no_traceback(output)
    assert metric(run_dir, "step") == [1, 2, 3, 4]
    status, output = runs.run(engine, run_dir, fields)
    assert status == 0, output
    assert_same(run_dir, whole)


@pytest.mark.slow
def test_a_killed_process_ends_the_other_and_both_go_on(runs: Runs, tmp_path: Path) -> None:
    status, output = runs.run("multi_cpu", tmp_path / "run", FIELDS["muon"], KILL_AT="4:1")
    assert status == 1, output
    status, output = runs.run("multi_cpu", tmp_path / "run", FIELDS["muon"])
    assert status == 0, output
    assert_same(tmp_path / "run", runs.of_engine("multi_cpu", "muon"))


@pytest.mark.slow
def test_one_process_goes_on_from_two(runs: Runs, tmp_path: Path) -> None:
    run_dir = state_at(runs.of_engine("multi_cpu", "muon"), 3, tmp_path / "run")
    runs.run_here(run_dir, FIELDS["muon"])
    assert_close(run_dir, runs.of_one_process("muon"))


@pytest.mark.slow
def test_fsdp2_goes_on_with_fewer_processes(runs: Runs, tmp_path: Path) -> None:
    run_dir = state_at(runs.of_engine("fsdp2", "muon"), 3, tmp_path / "run")
    one = ("--num_processes=1", "--mixed_precision=no")
    status, output = runs.run("fsdp2", run_dir, FIELDS["muon"], launcher=one)
    assert status == 0, output
    assert_close(run_dir, runs.of_one_process("muon"))


@pytest.mark.slow
def test_deepspeed_says_that_it_cannot_go_on_with_fewer_processes(runs: Runs, tmp_path: Path) -> None:
    run_dir = state_at(runs.of_engine("deepspeed_zero2", "adamw"), 3, tmp_path / "run")
    one = ("--num_processes=1", "--mixed_precision=no")
    status, output = runs.run("deepspeed_zero2", run_dir, FIELDS["adamw"], launcher=one)
    assert status == 1
    assert "expected a checkpoint of 2 processes, got one of 1" not in output
    assert (
        "expected a checkpoint of 1 processes, got one of 2; DeepSpeed's ds_to_universal converts it, unless" in output
    )
    assert_no_traceback(output)


@pytest.mark.slow
def test_other_data_is_refused_without_a_traceback(runs: Runs, tmp_path: Path) -> None:
    run_dir = state_at(runs.of_engine("multi_cpu", "muon"), 3, tmp_path / "run")
    record = json.loads((run_dir / "run.json").read_text())
    (run_dir / "run.json").write_text(json.dumps({**record, "data_fingerprint": ["another"]}))
    status, output = runs.run("multi_cpu", run_dir, FIELDS["muon"])
    assert status == 1
    assert "it holds a run on other data" in output
    assert_no_traceback(output)


# -- bad updates, bad input --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def poisoned(runs: Runs) -> Path:
    """A run of one process whose update 2 is not finite."""
    run_dir = runs.folder / "poisoned"
    status, output = runs.run("cpu", run_dir, FIELDS["adamw"], launcher=(), POISON="2")
    assert status == 0, output
    return run_dir


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["multi_cpu", "fsdp2", "deepspeed_zero2", "deepspeed_zero3"])
def test_bad_update_on_one_process_is_skipped_on_all(runs: Runs, poisoned: Path, tmp_path: Path, engine: str) -> None:
    """Rank 1's first of two micro-batches is bad; the other process must not step either."""
    run_dir = tmp_path / "run"
    status, output = runs.run(engine, run_dir, FIELDS["adamw"], POISON="2:1")
    assert status == 0, output
    assert metric(run_dir, "train/skipped_updates") == [0, 0, 1, 1, 1, 1]
    for name in ("train/loss", "train/grad_norm"):
        values, expected = metric(run_dir, name), metric(poisoned, name)
        assert values.pop(2) is expected.pop(2) is None  # what metrics.jsonl has for a value that is not finite
        assert values == pytest.approx(expected, rel=1e-5)
    assert metric(run_dir, "eval/loss") == pytest.approx(metric(poisoned, "eval/loss"), rel=1e-5)


@pytest.mark.slow
def test_dry_run_with_deepspeeds_muon(runs: Runs, tmp_path: Path) -> None:
    (tmp_path / "dry.yaml").write_text("dry_run: true\n")
    fields = {**FIELDS["unclipped_muon"], "config": str(tmp_path / "dry.yaml")}
    status, output = runs.run("deepspeed_zero2", tmp_path / "run", fields)
    assert status == 0, output
    assert "all updates" in output
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["deepspeed_zero2", "deepspeed_zero3"])
def test_bad_update_leaves_deepspeeds_muon_alone(runs: Runs, tmp_path: Path, engine: str) -> None:
    """Its momentum too, without which all that follows would be not finite."""
    status, output = runs.run(engine, tmp_path / "run", FIELDS["unclipped_muon"], POISON="2:1")
    assert status == 0, output
    assert metric(tmp_path / "run", "train/skipped_updates") == [0, 0, 1, 1, 1, 1]
    losses = metric(tmp_path / "run", "train/loss")
    assert losses.pop(2) is None
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "error: max_grad_norm: 1.0: expected 0 for Muon under DeepSpeed"),
        ({"max_grad_norm": 0.0, "architecture": "gpt2"}, "error: optimizer: 'muon': expected adamw under DeepSpeed"),
    ],
)
def test_what_deepspeed_s_muon_cannot_do_is_refused(
    runs: Runs, tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    status, output = runs.run("deepspeed_zero2", tmp_path / "run", {**TINY, **fields})
    assert status == 1
    assert output.count(message) == 1
    assert_no_traceback(output)
    assert not (tmp_path / "run").exists()
