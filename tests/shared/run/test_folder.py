"""Which folders a command may use, and what is written down about a run."""

import contextlib
import json
import os
import re
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from shared.command_line import UsageError
from shared.run.folder import FREE_FIELDS, check_run_folder, hardware, update_run_record, write_run_record

TOKEN = "hf_" + "Zz09" * 9
FIELDS = {"output_dir": "x", "seed": 0, "learning_rate": 1e-5, "data": "no", "log_every": 10, "compile": False}
FACTS = {"data": "sample", "data_fingerprint": ["abc"], "init": "scratch"}


def make_run(folder: Path, **changes: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({**FIELDS, **changes}))
    return folder


def refusal(folder: Path, resume: str = "auto", **changes: Any) -> str:
    with pytest.raises(UsageError) as caught:
        check_run_folder(folder, resume, {**FIELDS, **changes})
    assert "\n" not in str(caught.value)
    return str(caught.value)


def tree(folder: Path) -> list[tuple[str, int]]:
    return sorted((str(path), path.lstat().st_mtime_ns) for path in folder.rglob("*"))


# Which folders are taken


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_a_new_and_an_empty_folder_are_taken_and_nothing_is_written(tmp_path, resume):
    (tmp_path / "empty").mkdir()
    before = tree(tmp_path)
    for name in ("new", "deep/er/new", "empty"):
        check_run_folder(tmp_path / name, resume, FIELDS)
    assert tree(tmp_path) == before


def test_a_relative_folder_is_taken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_run_folder(Path("outputs/x"), "auto", FIELDS)
    check_run_folder(Path("../outputs"), "auto", FIELDS)
    assert tree(tmp_path) == []


def test_a_run_of_the_same_configuration_is_taken(tmp_path):
    check_run_folder(make_run(tmp_path / "run"), "auto", FIELDS)


def test_free_fields_may_change(tmp_path):
    changed = {**FIELDS, "output_dir": "y", "log_every": 3, "resume": "auto", "num_workers": 8, "push_to_hub": "me/x"}
    check_run_folder(make_run(tmp_path / "run"), "auto", changed)
    assert {"output_dir", "resume", "save_every", "num_workers", "per_device_batch_size"} <= set(FREE_FIELDS)
    assert not {"seed", "data", "learning_rate", "max_steps", "global_batch_size", "deterministic"} & set(FREE_FIELDS)


def test_what_a_start_that_was_killed_at_once_left_does_not_count(tmp_path):
    (tmp_path / "run" / ".export").mkdir(parents=True)
    (tmp_path / "run" / ".write_probe").touch()
    check_run_folder(tmp_path / "run", "never", FIELDS)


# Which are refused


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "file").write_text("x")
    before = tree(tmp_path)
    for name in ("file", "file/run", "file/deep/run"):
        assert refusal(tmp_path / name) == (
            f"output_dir: {str(tmp_path / name)!r}: expected a folder that can be written, "
            f"{str(tmp_path / 'file')!r} is not one"
        )
    assert tree(tmp_path) == before


@contextlib.contextmanager
def without_privileges() -> Iterator[None]:
    """Root may write everywhere, so be nobody for a while."""
    if os.getuid():
        yield
        return
    os.setresuid(65534, 65534, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


@pytest.mark.parametrize("mode", [0o555, 0o666, 0o000])
def test_a_folder_without_permission(mode):
    folder = Path(tempfile.mkdtemp(prefix="locked_"))
    try:
        folder.chmod(mode)
        with without_privileges():
            for name in (".", "run", "deep/run"):
                given = refusal(folder / name)
                assert f"expected a folder that can be written, {str(folder)!r} is not one" in given
    finally:
        folder.chmod(0o700)
        shutil.rmtree(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "run.json", "checkpoints"])
def test_a_folder_with_other_files(tmp_path, name):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).touch()
    before = tree(tmp_path)
    assert refusal(tmp_path / "run") == (
        f"output_dir: {str(tmp_path / 'run')!r}: expected an empty folder or one of an earlier run, "
        "it holds other files"
    )
    assert tree(tmp_path) == before


def test_resume_never_on_a_run(tmp_path):
    run_dir = make_run(tmp_path / "run")
    assert refusal(run_dir, "never") == (
        f"output_dir: {str(run_dir)!r}: expected an empty folder with resume never, it holds a run"
    )


def test_a_changed_configuration_lists_each_field(tmp_path):
    run_dir = make_run(tmp_path / "run")
    before = tree(tmp_path)
    given = refusal(run_dir, seed=1, learning_rate=2e-5, data="yes", compile=True, log_every=5)
    for change in ("seed 0 -> 1", "learning_rate 1e-05 -> 2e-05", "data 'no' -> 'yes'", "compile False -> True"):
        assert change in given
    assert "log_every" not in given
    assert given.endswith("choose another folder")
    assert "width None -> 5" in refusal(run_dir, width=5)
    assert tree(tmp_path) == before


def test_data_that_lies_elsewhere_is_no_change(tmp_path):
    """Its content tells whether it is the same, see the tests of the record."""
    run_dir = make_run(tmp_path / "run")
    (tmp_path / "moved, here").mkdir()
    (tmp_path / "b.txt").touch()
    for data in (str(tmp_path / "moved, here"), f"{tmp_path}/b.txt,{tmp_path}:text_column=x"):
        check_run_folder(run_dir, "auto", {**FIELDS, "data": data})
    assert "data 'no' -> " in refusal(run_dir, data=f"{tmp_path}/b.txt,prose")


@pytest.mark.parametrize("content", ["", "seed: [", "- a\n", "\x00"])
def test_a_config_that_cannot_be_read(tmp_path, content):
    run_dir = make_run(tmp_path / "run")
    (run_dir / "config.yaml").write_text(content)
    assert refusal(run_dir) == f"output_dir: {str(run_dir)!r}: expected a run, but its config.yaml cannot be read"


def test_a_config_with_a_python_tag_runs_nothing(tmp_path):
    run_dir = make_run(tmp_path / "run")
    (run_dir / "config.yaml").write_text(f"!!python/object/apply:os.mkdir [{tmp_path / 'canary'}]")
    assert "config.yaml cannot be read" in refusal(run_dir)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("resume", ["", "Auto", "/nowhere", "checkpoints"])
def test_resume_that_points_nowhere(tmp_path, resume):
    assert refusal(tmp_path / "run", resume) == f"resume: {resume!r}: expected auto, never or a checkpoint folder"


def test_resume_from_a_checkpoint_that_is_pruned_by_now(tmp_path):
    run_dir, resume = make_run(tmp_path / "run"), tmp_path / "run" / "checkpoints" / "step_00000005"
    (newest := resume.with_name("step_00000009")).mkdir(parents=True)
    (newest / "state.json").write_text(json.dumps({"resume": str(resume)}))
    check_run_folder(run_dir, str(resume), FIELDS)
    assert "resume: " in refusal(run_dir, str(resume.with_name("step_00000004")))


def test_resume_from_a_checkpoint_folder(tmp_path):
    checkpoint = tmp_path / "step_00000005"
    checkpoint.mkdir()
    assert "resume: " in refusal(tmp_path / "run", str(checkpoint))
    (checkpoint / "manifest.json").touch()
    check_run_folder(tmp_path / "run", str(checkpoint), FIELDS)


def test_a_run_that_is_older_than_a_field_had_its_default(tmp_path):
    run_dir = make_run(tmp_path / "run")
    check_run_folder(run_dir, "auto", {**FIELDS, "new": 3}, {"new": 3})
    with pytest.raises(UsageError, match="new 3 -> 4"):
        check_run_folder(run_dir, "auto", {**FIELDS, "new": 4}, {"new": 3})


# The record


def record(folder: Path, **facts: Any) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    write_run_record(folder, "seed: 0\n", Path(__file__), {**FACTS, **facts})
    return json.loads((folder / "run.json").read_text())


def test_the_record_says_how_the_run_was_made(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/some/where/pretrain.py", "--seed", "3"])
    written = record(tmp_path / "run", parameters=12)
    assert written["command"] == ["pretrain.py", "--seed", "3"]
    assert written["versions"]["torch"] == torch.__version__
    assert {"transformers", "accelerate", "numpy"} <= set(written["versions"])
    assert written["hardware"] == hardware()
    assert written["python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}.")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4}", written["started"])
    assert re.fullmatch("[0-9a-f]{40}|", written["git_commit"])
    assert {key: written[key] for key in (*FACTS, "parameters")} == {**FACTS, "parameters": 12}
    assert (tmp_path / "run" / "config.yaml").read_text() == "seed: 0\n"
    assert (tmp_path / "run" / "recipe.py").read_text() == Path(__file__).read_text()
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["config.yaml", "recipe.py", "run.json"]


def test_outside_of_git_there_is_no_commit(tmp_path):
    recipe = tmp_path / "recipe" / "r.py"
    recipe.parent.mkdir()
    recipe.write_text("# ü\n", encoding="utf-8")
    write_run_record(tmp_path, "", recipe, FACTS)
    assert json.loads((tmp_path / "run.json").read_text())["git_commit"] == ""
    assert (tmp_path / "recipe.py").read_text(encoding="utf-8") == "# ü\n"


def test_without_git_there_is_no_commit(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert shutil.which("git") is None
    assert record(tmp_path / "run")["git_commit"] == ""


def test_hardware_names_the_processor():
    assert re.match(r"\d+ cores? of \S.*\(.+\)$", hardware()) or "x" in hardware()


def test_the_record_has_no_token_no_home_folder_and_no_host_name(tmp_path, monkeypatch):
    home = "/home/some.one"
    monkeypatch.setenv("HOME", home)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    arguments = ["--data", f"{home}/corpus", f"--tokenizer={home}", "--x", f"a{TOKEN}b", "--y", f"{home}x/{home}"]
    monkeypatch.setattr(sys, "argv", [f"{home}/pretrain.py", *arguments])
    written = record(tmp_path / "run", data=f"{home}/corpus")
    assert written["command"][1:] == ["--data", "~/corpus", "--tokenizer=~", "--x", "ahf_***", "--y", f"{home}x/~"]
    assert written["data"] == "~/corpus"
    returned = update_run_record(tmp_path / "run", {"note": f"{home}/x {TOKEN}"})
    assert returned["note"] == "~/x hf_***"
    for path in (tmp_path / "run").iterdir():
        text = path.read_text()
        assert TOKEN not in text
        if path.name == "run.json":
            assert socket.gethostname() not in text or len(socket.gethostname()) < 4


@pytest.mark.parametrize("home", ["/", "/srv"])
def test_short_home_folders_do_not_spoil_the_record(tmp_path, monkeypatch, home):
    monkeypatch.setenv("HOME", home)
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "--data", "/data/srv/x", "--resume", "/srvfs"])
    assert record(tmp_path / "run")["command"] == ["pretrain.py", "--data", "/data/srv/x", "--resume", "/srvfs"]


@pytest.mark.skipif(os.name != "posix", reason="the list of users is a POSIX one")
def test_a_user_without_a_home_folder_has_a_record(tmp_path, monkeypatch):
    """As in a container that runs under a number that no list of users knows."""
    import pwd

    def unknown(number):
        raise KeyError(number)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "--data", "/data/~"])
    assert record(tmp_path / "run")["command"] == ["pretrain.py", "--data", "/data/~"]


def test_facts_are_added_and_keep_their_values(tmp_path):
    before = record(tmp_path / "run")
    facts = {"training_flops": 1e16, "steps": 5, "training_seconds": 1e-05, "data": "ü"}
    returned = update_run_record(tmp_path / "run", facts)
    assert returned == {**before, **facts} == json.loads((tmp_path / "run" / "run.json").read_text())
    assert isinstance(returned["training_flops"], float)


def test_other_data_to_evaluate_on_are_refused_where_a_run_knows_its_own(tmp_path):
    record(tmp_path / "old")
    record(tmp_path / "old", eval_data_fingerprint=["a"])  # of a version that did not say it
    with pytest.raises(UsageError, match="it holds a run on other eval data, or the eval data has changed"):
        record(tmp_path / "old", eval_data_fingerprint=["b"])


def test_other_data_are_refused_and_nothing_is_written(tmp_path):
    record(tmp_path / "run")
    before = tree(tmp_path)
    with pytest.raises(UsageError, match="holds a run on other data, or the data has changed"):
        record(tmp_path / "run", data_fingerprint=["other"])
    assert tree(tmp_path) == before
    record(tmp_path / "run")


def test_a_record_that_cannot_be_read(tmp_path):
    record(tmp_path / "run")
    (tmp_path / "run" / "run.json").write_text('{"half')
    with pytest.raises(UsageError, match=r"expected a run, but its run\.json cannot be read"):
        record(tmp_path / "run")


def test_what_is_written_is_what_the_check_reads(tmp_path):
    record(tmp_path / "run")
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(FIELDS))
    check_run_folder(tmp_path / "run", "auto", FIELDS)
