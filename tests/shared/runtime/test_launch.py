import os
import platform
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from shared.command_line import UsageError
from shared.runtime import launch
from tests import launching
from tests.conftest import ROOT
from tests.shared.runtime.test_collectives import facts

PROGRAM = Path(__file__).with_name("launch_program.py")
CONFIGS = sorted((ROOT / "accelerate_configs").glob("*.yaml"))
SCRIPT = ROOT / "accelerate_configs" / "slurm" / "multi_node.sbatch"
VARIABLES = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "ACCELERATE_USE_CPU", "ACCELERATE_MIXED_PRECISION", "DS_ACCELERATOR")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for variable in (*VARIABLES, "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "FSDP_VERSION"):
        monkeypatch.setenv(variable, "")  # so that what the code sets is taken back
        monkeypatch.delenv(variable)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def stand_in(processes: int = 1, engine: str = "NO", precision: str = "no", **deepspeed: Any) -> Any:
    """What the module needs of an `Accelerator`."""
    plugin = SimpleNamespace(deepspeed_config=dict(deepspeed)) if engine == "DEEPSPEED" else None
    return SimpleNamespace(
        num_processes=processes,
        distributed_type=SimpleNamespace(value=engine),
        mixed_precision=precision,
        gradient_accumulation_steps=1,
        state=SimpleNamespace(deepspeed_plugin=plugin),
    )


def started(monkeypatch: pytest.MonkeyPatch, accelerator: Any, **environment: str) -> dict[str, Any]:
    """Call `start_accelerator` where accelerate comes up as `accelerator`; what `Accelerator` was given."""
    given: dict[str, Any] = {}
    monkeypatch.setattr("accelerate.Accelerator", lambda **options: given.update(options) or accelerator)
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    assert launch.start_accelerator(30, "", "", False) is accelerator
    return given


# -- what came up ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("accelerator", "environment", "message"),
    [
        (stand_in(), {"WORLD_SIZE": "2"}, "the launcher started 2 processes, but 1 found each other"),
        (
            stand_in(2, "MULTI_CPU"),
            {"WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
            "FSDP was asked for, but MULTI_CPU came up: it needs GPUs here",
        ),
        (
            stand_in(2, "MULTI_CPU"),
            {"WORLD_SIZE": "2", "ACCELERATE_USE_DEEPSPEED": "true"},
            "DeepSpeed was asked for, but MULTI_CPU came up: it needs GPUs here",
        ),
        (stand_in(), {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "fsdp_version: 1: expected 2"),
        (
            stand_in(),
            {"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_USE_CPU": "true"},
            "precision bf16 was asked for, got no",
        ),
        (stand_in(), {"ACCELERATE_MIXED_PRECISION": "bf16"}, "mixed_precision: 'bf16': expected a GPU, none was found"),
        (stand_in(), {"ACCELERATE_MIXED_PRECISION": "fp16"}, "mixed_precision: 'fp16': expected a GPU, none was found"),
        (stand_in(), {"ACCELERATE_MIXED_PRECISION": "fp8"}, "mixed_precision: 'fp8': expected no, bf16 or fp16"),
    ],
)
def test_what_was_not_asked_for_is_refused(
    monkeypatch: pytest.MonkeyPatch, accelerator: Any, environment: dict[str, str], message: str
) -> None:
    with pytest.raises(UsageError, match=f"^accelerate config: {re.escape(message)}"):
        started(monkeypatch, accelerator, **environment)


@pytest.mark.parametrize(
    ("accelerator", "environment"),
    [
        (stand_in(), {}),
        (stand_in(4, "MULTI_CPU"), {"WORLD_SIZE": "4"}),
        (stand_in(2, "DEEPSPEED", "bf16"), {"WORLD_SIZE": "2", "ACCELERATE_USE_DEEPSPEED": "true"}),  # from its file
    ],
)
def test_what_was_asked_for_is_accepted(
    monkeypatch: pytest.MonkeyPatch, accelerator: Any, environment: dict[str, str]
) -> None:
    given = started(monkeypatch, accelerator, **environment)
    assert given["fsdp_plugin"] is None
    assert not given["gradient_accumulation_plugin"].sync_with_dataloader


def test_fsdp2_adds_gradients_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "ACCELERATE_MIXED_PRECISION": "bf16"}
    asked["ACCELERATE_USE_CPU"] = "true"
    policy = started(monkeypatch, stand_in(1, "FSDP", "bf16"), **asked)["fsdp_plugin"].mixed_precision_policy
    assert (policy.param_dtype, policy.reduce_dtype) == (torch.bfloat16, torch.float32)


# -- the batch ---------------------------------------------------------------------------------------------------------


def test_processes_need_a_gpu_each_and_bfloat16_one_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine of four V100s."""
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    monkeypatch.setattr("torch.accelerator.device_count", lambda: 4)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "Tesla V100-SXM2-16GB")
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: including_emulation)
    with pytest.raises(
        UsageError, match=r"^accelerate config: num_processes: 8: expected at most the 4 GPUs of a node"
    ):
        started(monkeypatch, stand_in(8), WORLD_SIZE="8", LOCAL_WORLD_SIZE="8")
    sizes = {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}
    with pytest.raises(UsageError, match=r"^accelerate config: mixed_precision: 'bf16': expected fp16 or no, since"):
        started(monkeypatch, stand_in(4, precision="bf16"), ACCELERATE_MIXED_PRECISION="bf16", **sizes)
    started(monkeypatch, stand_in(4), ACCELERATE_MIXED_PRECISION="no", **sizes)
    started(monkeypatch, stand_in(4, precision="fp16"), ACCELERATE_MIXED_PRECISION="fp16", **sizes)
    sharded = {"ACCELERATE_MIXED_PRECISION": "fp16", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    with pytest.raises(UsageError, match=r"^accelerate config: mixed_precision: 'fp16': expected bf16 or no under"):
        started(monkeypatch, stand_in(4), **sharded, **sizes)


def test_accumulation_follows_from_the_batch() -> None:
    for processes, per_device, micro_batch, accumulation in [(1, 0, 24, 1), (2, 0, 12, 1), (2, 3, 3, 4), (3, 8, 8, 1)]:
        accelerator = stand_in(processes)
        assert launch.set_accumulation(accelerator, 24, per_device) == micro_batch
        assert accelerator.gradient_accumulation_steps == accumulation


def test_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(UsageError, match=r"^global_batch_size: 9: expected a multiple of the 2 processes$"):
        launch.set_accumulation(stand_in(2), 9, 0)
    with pytest.raises(UsageError, match=r"expected a multiple of per_device_batch_size x processes = 3 x 2 = 6$"):
        launch.set_accumulation(stand_in(2), 8, 3)


def test_deepspeed_gets_the_values_of_the_recipe() -> None:
    accelerator = stand_in(2, "DEEPSPEED", gradient_clipping="auto", gradient_accumulation_steps=1)
    accelerator.gradient_accumulation_steps = 4
    launch.set_deepspeed_values(accelerator, micro_batch_size=3, max_grad_norm=0.5)
    assert accelerator.state.deepspeed_plugin.deepspeed_config == {
        "train_batch_size": 24,
        "train_micro_batch_size_per_gpu": 3,
        "gradient_accumulation_steps": 4,
        "gradient_clipping": 0.5,
        "zero_force_ds_cpu_optimizer": False,
    }
    launch.set_deepspeed_values(accelerator, micro_batch_size=3, max_grad_norm=0.5)  # its own values are no obstacle


def test_deepspeed_adds_gradients_in_float32() -> None:
    accelerator = stand_in(2, "DEEPSPEED", precision="bf16", data_types={"grad_accum_dtype": "bf16"})
    launch.set_deepspeed_values(accelerator, 1, 1.0)
    config = accelerator.state.deepspeed_plugin.deepspeed_config
    assert config["communication_data_type"] == "fp32"
    assert config["data_types"] == {"grad_accum_dtype": "bf16"}  # whoever writes it wants it
    assert (config["bf16"]["enabled"], config["torch_autocast"]["enabled"]) == (False, True)  # weights stay in float32
    accelerator = stand_in(2, "DEEPSPEED", precision="bf16")
    launch.set_deepspeed_values(accelerator, 1, 1.0)
    assert accelerator.state.deepspeed_plugin.deepspeed_config["data_types"] == {"grad_accum_dtype": "fp32"}


@pytest.mark.parametrize(
    "fixed", [{"gradient_clipping": 0.3}, {"gradient_accumulation_steps": 2}, {"train_micro_batch_size_per_gpu": 8}]
)
def test_deepspeed_values_that_the_recipe_owns_are_refused(fixed: dict[str, Any]) -> None:
    accelerator = stand_in(2, "DEEPSPEED", **fixed)
    key, value = next(iter(fixed.items()))
    with pytest.raises(UsageError, match=rf"^accelerate config: {key}: {value}: expected auto, the recipe sets it to"):
        launch.set_deepspeed_values(accelerator, micro_batch_size=3, max_grad_norm=0.5)


# -- memory ------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such setting")
@pytest.mark.slow
def test_freed_memory_is_used_again() -> None:
    """32 MB are freed and taken again 40 times: 8,192 pages each time, unless the process keeps them."""
    program = """
import resource, sys, torch
from shared.runtime import launch
if sys.argv[1] == "kept":
    launch._keep_freed_memory()
def pages():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
before = pages()
for _ in range(40):
    torch.ones(8 << 20)
print(pages() - before)
"""
    counts = {}
    for name in ("kept", "by default"):
        command = [sys.executable, "-c", program, name]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=True)
        counts[name] = int(done.stdout)
    assert counts["kept"] < 10 * 8192  # the heap grows a few times
    assert counts["by default"] > 35 * 8192


# -- real processes ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("options", [["--num_processes=1"], ["cpu"]])
def test_one_process_uses_all_cores(options: list[str], all_cores: int) -> None:
    """Also bare, where `accelerate launch` leaves it one."""
    if options == ["cpu"]:
        status, output = launching.launch("cpu", PROGRAM, launcher=())
    else:
        command = [*launching.ACCELERATE, *options, str(PROGRAM)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        status, output = done.returncode, done.stdout
    assert status == 0, output
    assert [threads for _, _, threads in facts(output)] == [all_cores]


@pytest.mark.slow
def test_fsdp_without_gpus_is_refused() -> None:
    status, output = launching.launch("fsdp2", PROGRAM)
    assert status == 1
    assert output.count("error: accelerate config: FSDP was asked for, but MULTI_CPU came up") == 1
    launching.assert_no_traceback(output)


# -- accelerate_configs/ -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configuration_is_what_accelerate_reads(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    lines = path.read_text().splitlines()
    assert len(lines) <= 20
    assert lines[0].startswith("# ")
    assert re.search(r"Run .*by the tests|Not run yet: needs", lines[0])
    assert all("#" in line for line in lines)
    config = load_config_from_file(str(path))
    assert config.mixed_precision in ("no", "bf16", "fp16")
    deepspeed = yaml.safe_load(path.read_text()).get("deepspeed_config", {})
    if deepspeed:
        assert deepspeed["gradient_accumulation_steps"] == deepspeed["gradient_clipping"] == "auto"
        assert not deepspeed["zero3_init_flag"]


STAND_INS = {
    # A step of a job: starts its program, and ends with its status.
    "srun": 'while [ "${1#--}" != "$1" ]; do shift; done\nexport SLURM_PROCID=0\nexec "$@"',
    "scontrol": 'if [ "$1" = show ]; then echo node1; echo node2; else echo "$@" >>"$RECORD"; fi',
    "scancel": 'echo "scancel $*" >>"$RECORD"; kill -TERM "$(cat "$STEP")"',
    "accelerate": 'echo $$ >"$STEP"\necho "accelerate $*" >>"$RECORD"\neval "$TRAINING"',
}


@pytest.mark.parametrize(
    ("training", "stopped", "requeued"),
    [
        ("exit 0", None, False),
        ("exit 1", None, False),
        ("exit 75", None, True),
        ("trap 'exit 1' TERM; while :; do sleep 0.05; done", signal.SIGUSR1, True),  # the launcher's status
        ("trap 'exit 1' TERM; while :; do sleep 0.05; done", signal.SIGTERM, True),
        ("trap 'exit 0' TERM; while :; do sleep 0.05; done", signal.SIGUSR1, False),  # it was done by then
    ],
)
def test_slurm_script_requeues_what_was_stopped(
    tmp_path: Path, training: str, stopped: signal.Signals | None, requeued: bool
) -> None:
    """With stand-ins for Slurm's programs and the launcher, since there is no Slurm here."""
    for name, body in STAND_INS.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    record, step = tmp_path / "record", tmp_path / "step"
    slurm = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_NODELIST": "node[1-2]"}
    environment = {**os.environ, **slurm, "RECORD": str(record), "STEP": str(step), "TRAINING": training}
    environment["PATH"] = f"{tmp_path}:{os.environ['PATH']}"
    job = subprocess.Popen(["bash", str(SCRIPT), "recipe.py", "--field=a b"], env=environment, cwd=ROOT)
    if stopped:
        launching.wait_for(step.is_file, seconds=20)
        job.send_signal(stopped)
    status = job.wait(timeout=30)
    written = record.read_text()
    assert (
        "--num_machines 2 --num_processes 16 --machine_rank 0 --main_process_ip node1 recipe.py --field=a b" in written
    )
    assert ("requeue 7" in written) == requeued
    assert (status == 0) == ("exit 0" in training)
