"""Pushing: what reaches the Hub, what never does, and that no failure of the Hub reaches training.

The client is the real huggingface_hub; the Hub is tests/hub_server.py on loopback.
"""

import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared.command_line import UsageError
from shared.fields import RunControl
from shared.run import hub as hub_module
from shared.run.hub import HubPusher, check_login, check_push
from tests.hub_server import TOKEN, Hub, start_hub

ROOT = Path(__file__).parents[3]
REPO = "tester/my-gpt"

LOADABLE = {
    "config.json": b'{"model_type": "gpt2"}',
    "model.safetensors": b"weights",
    "model.safetensors.index.json": b"{}",
    "tokenizer/vocab.txt": b"a\nb\n",
    "README.md": b"---\nlicense: apache-2.0\n---\n# My GPT\n",
    "config.yaml": b"seed: 0\n",
    "run.json": b"{}",
    "metrics.jsonl": b'{"step": 1}\n',
    "figures/loss.png": b"image",
    "samples/generated.txt": b"Once",
}
KEPT_BACK = (
    ".env",
    "optimizer.bin",
    "scheduler.pkl",
    "pytorch_model.bin",
    "train.log",
    "logs/events.json",
    "runs/hparams.yaml",
    "wandb/run-1/files/config.yaml",
    "mlruns/0/meta.yaml",
    "profile/trace.json",
    "figures/loss.pkl",
    "samples/.hidden.png",
    "checkpoints/step_00000001/model.safetensors",
    "checkpoints/step_00000001/state.json",
)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A fresh Hub that the clients of this process talk to, with short waits."""
    from huggingface_hub import constants

    server = start_hub()
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    # huggingface_hub read these from the environment when it was imported.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
    monkeypatch.setattr(hub_module, "FIRST_WAIT_SECONDS", 0.01)
    yield server
    server.stop()


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A run folder with everything that may go to the Hub and much that may not."""
    folder = tmp_path / "my run"
    for name in (*LOADABLE, *KEPT_BACK):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(LOADABLE.get(name, f"never {TOKEN}".encode()))
    return folder


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GPT-2 and its tokenizer, as a recipe leaves them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    words = Tokenizer(models.WordLevel({"<eos>": 0, "once": 1, "upon": 2, "a": 3, "time": 4}, unk_token="<eos>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", unk_token="<eos>").save_pretrained(folder)
    GPT2LMHeadModel(GPT2Config(vocab_size=5, n_positions=8, n_embd=8, n_layer=1, n_head=1)).save_pretrained(folder)
    return folder


def push_and_close(folder: Path, *, tag: str = "", timeout_seconds: float = 20) -> str:
    """One push to `REPO` from beginning to end."""
    check_push(REPO, private=True)
    pusher = HubPusher(REPO, True)
    pusher.push(folder, "step 1", tag)
    return pusher.close(timeout_seconds)


def set_aside(folder: Path) -> list[str]:
    """Names of the files that wait to be pushed; unlike glob, walk bears that the pusher's thread removes folders."""
    return [name for _, _, names in os.walk(folder / hub_module.ASIDE) for name in names]


def replace(file: Path, content: bytes) -> None:
    """Give a file another content as exports do."""
    aside = file.with_name(".aside")
    aside.write_bytes(content)
    aside.replace(file)


def run_client(hub: Hub, code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a process of its own."""
    variables = hub.environment() | {"OMP_NUM_THREADS": "1"} | environment
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=60, check=False)


# Before training


def test_repository_is_created_private_by_default(hub: Hub) -> None:
    assert check_push("my-gpt", private=RunControl.hub_private) == REPO
    assert hub.model(REPO).private
    assert check_push(REPO, private=True) == REPO  # it exists now
    assert [json.loads(request.body)["visibility"] for request in hub.sent("/repos/create")] == ["private"] * 2


def test_public_repository_is_created_when_asked_for(hub: Hub) -> None:
    check_push(REPO, private=False)
    assert not hub.model(REPO).private


def test_existing_public_repository_is_said_to_be_public(hub: Hub, caplog: pytest.LogCaptureFixture) -> None:
    check_push(REPO, private=False)
    assert not caplog.records
    check_push(REPO, private=True)
    assert "is public" in caplog.text


def test_login_is_checked_without_creating_anything(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_login("my-gpt") == REPO
    assert not hub.repositories
    monkeypatch.setenv("HF_TOKEN", "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")
    with pytest.raises(UsageError, match=r"^push_to_hub: 'my-gpt': expected a valid token.*$"):
        check_login("my-gpt")


def test_no_id_asks_for_nothing(hub: Hub) -> None:
    assert check_login("") == check_push("", private=True) == ""
    assert not hub.requests


@pytest.mark.parametrize("repo_id", ["a/b/c", "me/my gpt", "../me", "me/my--gpt", "me/my\ngpt", "me/my-gpt.git"])
def test_malformed_id_is_refused_before_any_request(hub: Hub, repo_id: str) -> None:
    with pytest.raises(UsageError, match=r"^push_to_hub: '.*': expected an id such as me/my-gpt \(.*\)$"):
        check_push(repo_id, private=True)
    assert not hub.requests


@pytest.mark.parametrize("token", ["", "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"])
def test_missing_or_wrong_token_is_refused(hub: Hub, monkeypatch: pytest.MonkeyPatch, token: str) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(UsageError, match=r"^push_to_hub: 'tester/my-gpt': expected a valid token.*$") as caught:
        check_push(REPO, private=True)
    assert not token or token not in str(caught.value)
    assert not hub.repositories


def test_repository_of_others_is_refused(hub: Hub) -> None:
    check_push(REPO, private=True)
    hub.read_only.add(REPO)
    for repo_id in (REPO, "somebody/else"):
        with pytest.raises(
            UsageError, match=rf"^push_to_hub: '{repo_id}': expected a repository that the token may write"
        ):
            check_push(repo_id, private=True)


def test_hub_that_is_down_is_refused_in_the_end(hub: Hub) -> None:
    hub.fail("whoami", status=503)
    check_push(REPO, private=True)
    hub.fail("whoami", status=503, times=99)
    with pytest.raises(UsageError, match=r"^push_to_hub: .* expected a Hub that answers"):
        check_push(REPO, private=True)
    assert len(hub.sent("whoami")) == 2 + hub_module.ATTEMPTS


def test_offline_mode_is_refused_at_once(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub_module, "FIRST_WAIT_SECONDS", 1000)
    with pytest.raises(UsageError, match="offline mode"):
        check_push(REPO, private=True)


# What is pushed


def test_loadable_files_and_nothing_else_are_pushed_as_one_tagged_commit(hub: Hub, run_folder: Path) -> None:
    assert push_and_close(run_folder, tag="step-1") == ""
    assert hub.files(REPO) == LOADABLE
    assert hub.model(REPO).messages == ["initial commit", "step 1"]
    assert hub.model(REPO).tags == {"step-1": hub.model(REPO).head}
    assert TOKEN.encode() not in b"".join(hub.files(REPO).values())
    assert not (run_folder / hub_module.ASIDE).exists()


@pytest.mark.slow
def test_pushed_model_loads_in_a_clean_process(hub: Hub, model_folder: Path, tmp_path: Path) -> None:
    assert push_and_close(model_folder) == ""
    code = f"""
from transformers import AutoModelForCausalLM, AutoTokenizer
model, loading = AutoModelForCausalLM.from_pretrained({REPO!r}, output_loading_info=True, use_safetensors=True)
tokens = AutoTokenizer.from_pretrained({REPO!r})("once upon a time", return_tensors="pt")
assert tokens["input_ids"].tolist() == [[1, 2, 3, 4]], tokens
assert model(input_ids=tokens["input_ids"]).logits.shape == (1, 4, 5)
assert not loading["missing_keys"] and not loading["unexpected_keys"], loading
"""
    client = run_client(hub, code, HF_HOME=str(tmp_path / "home"))
    assert client.returncode == 0, client.stderr
    unknown = run_client(hub, f"import huggingface_hub as h; h.model_info({REPO!r}, token=False)")
    assert "RepositoryNotFoundError" in unknown.stderr  # private: not there for those who have no token


def test_folder_may_change_as_soon_as_push_returns(hub: Hub, run_folder: Path) -> None:
    check_push(REPO, private=True)
    hub.fail("preupload", delay=0.3)
    pusher = HubPusher(REPO, True)
    pusher.push(run_folder, "step 1")
    replace(run_folder / "model.safetensors", b"the next weights")
    (run_folder / "metrics.jsonl").write_bytes(b"half of a li")
    (run_folder / "config.json").unlink()
    assert pusher.close(20) == ""
    assert hub.files(REPO) == LOADABLE


@pytest.mark.parametrize("has_links", [True, False])
def test_what_is_pushed_stays_on_its_disk_where_weights_are_named_twice(
    hub: Hub, run_folder: Path, monkeypatch: pytest.MonkeyPatch, has_links: bool
) -> None:
    """The folder for temporary files is often in memory, and here there is none."""
    monkeypatch.setattr(tempfile, "tempdir", str(run_folder / "not there"))
    if not has_links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(PermissionError("no links here")))
    check_push(REPO, private=True)
    hub.fail("preupload", delay=0.3)
    (run_folder / hub_module.ASIDE / "7").mkdir(parents=True)  # of a run that was killed
    pusher = HubPusher(REPO, True)
    pusher.push(run_folder, "step 1")
    assert os.stat(run_folder / "model.safetensors").st_nlink == (2 if has_links else 1)
    assert pusher.close(20) == ""
    assert hub.files(REPO) == LOADABLE
    assert not (run_folder / hub_module.ASIDE).exists()


def test_newest_push_replaces_the_one_that_waits(hub: Hub, run_folder: Path) -> None:
    check_push(REPO, private=True)
    hub.fail("/commit/", delay=1.5)
    pusher = HubPusher(REPO, True)
    for step in range(1, 7):
        replace(run_folder / "model.safetensors", f"weights of step {step}".encode())
        pusher.push(run_folder, f"step {step}")
        if step == 1:
            while not hub.sent("/commit/"):
                time.sleep(0.01)
    assert set_aside(run_folder).count("model.safetensors") == 2  # of the push under way and the one that waits
    assert pusher.close(20) == ""
    assert hub.model(REPO).messages == ["initial commit", "step 1", "step 6"]
    assert hub.files(REPO)["model.safetensors"] == b"weights of step 6"


# What goes wrong


@pytest.mark.parametrize(
    ("request_pattern", "fault"),
    [
        ("/commit/", {"status": 500, "times": 2}),
        ("/commit/", {"status": 429}),
        ("/commit/", {"drop": "before"}),
        ("/commit/", {"drop": "after"}),
        ("/commit/", {"delay": 2.0, "drop": "before"}),  # a hang, cut by the time-out
        ("/validate-yaml", {"status": 502}),
        ("/tag/", {"status": 503}),
        ("/preupload/", {"status": 503}),
        ("PUT /large-files/", {"drop": "before"}),
    ],
)
def test_passing_failure_is_retried_and_makes_one_commit(
    hub: Hub, run_folder: Path, monkeypatch: pytest.MonkeyPatch, request_pattern: str, fault: dict
) -> None:
    monkeypatch.setattr(hub_module, "PUSH_TIMEOUT_SECONDS", 0.5)
    hub.fail(request_pattern, **fault)
    assert push_and_close(run_folder, tag="step-1") == ""
    assert hub.files(REPO) == LOADABLE
    assert hub.model(REPO).messages == ["initial commit", "step 1"]
    assert hub.model(REPO).tags == {"step-1": hub.model(REPO).head}
    assert hub.faults[0].times == 0  # it did go wrong


def test_lasting_failure_is_reported_with_the_command_that_pushes_again(
    hub: Hub, run_folder: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    hub.fail("/commit/", status=403, times=99)
    message = push_and_close(run_folder)
    assert len(hub.sent("/commit/")) == 1
    assert hub.files(REPO) == {}
    assert message.startswith("push_to_hub: the last push failed (403 Forbidden")
    assert "\n" not in message
    warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 1
    # The server repeated the token in its error; nobody else may.
    assert TOKEN not in message + caplog.text + "".join(capfd.readouterr())

    hub.faults.clear()
    hub.repositories.clear()
    command = message.split("to push again: ")[1]
    assert command.startswith(f"hf upload {REPO} '{run_folder}' . --private ")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    client = subprocess.run(
        command, shell=True, env=hub.environment() | {"PATH": path}, capture_output=True, check=False
    )
    assert client.returncode == 0, client.stderr
    assert hub.files(REPO) == LOADABLE
    assert hub.model(REPO).private


@pytest.mark.parametrize("status", [403, 404])
def test_refusal_by_xet_is_not_retried(
    hub: Hub, run_folder: Path, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    """The Rust client of large files, which real Hubs use, words its errors in its own way."""
    pytest.importorskip("hf_xet")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
    hub.fail("/xet-write-token/", status=status, times=99)
    assert str(status) in push_and_close(run_folder)
    assert len(hub.sent("/xet-write-token/")) == 1


def test_earlier_failure_is_forgotten_once_a_push_succeeds(hub: Hub, run_folder: Path) -> None:
    check_push(REPO, private=True)
    pusher = HubPusher(REPO, True)
    hub.fail("/commit/", status=403)
    pusher.push(run_folder, "step 1")
    while hub.faults[0].times:
        time.sleep(0.01)
    pusher.push(run_folder, "step 2")
    assert pusher.close(20) == ""
    assert hub.model(REPO).messages == ["initial commit", "step 2"]


def test_folder_that_cannot_be_copied_is_reported_not_raised(hub: Hub, tmp_path: Path) -> None:
    assert "nothing to push" in push_and_close(tmp_path / "missing")


def test_close_without_a_push_says_nothing(hub: Hub) -> None:
    assert HubPusher(REPO, True).close(0) == ""
    assert not hub.requests


def test_close_keeps_its_deadline_and_the_process_ends(hub: Hub, run_folder: Path) -> None:
    """Two large files hang: a pool of upload threads would keep the process from ending."""
    hub.fail("PUT /large-files/", times=99, delay=20)
    check_push(REPO, private=True)
    code = f"""
import pathlib, sys, time
from shared.run.hub import HubPusher
pusher = HubPusher({REPO!r}, True)
pusher.push(pathlib.Path({str(run_folder)!r}), "step 1")
print(pusher.close(1.0))
"""
    start = time.monotonic()
    client = run_client(hub, code)
    assert time.monotonic() - start < 10
    assert client.returncode == 0, client.stderr
    assert "the last push failed (it did not end within 1 seconds)" in client.stdout
    assert hub.files(REPO) == {}


def test_kill_in_the_middle_of_a_push_leaves_the_old_model(hub: Hub, model_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    assert push_and_close(model_folder) == ""
    old = dict(hub.files(REPO))
    weights = load_file(model_folder / "model.safetensors")
    new_folder = tmp_path / "new"
    new_folder.mkdir()
    save_file({name: value + 1 for name, value in weights.items()}, new_folder / "model.safetensors", {"format": "pt"})
    (new_folder / "config.json").write_text('{"model_type": "another"}')
    code = f"""
import pathlib
from shared.run.hub import HubPusher
pusher = HubPusher({REPO!r}, True)
pusher.push(pathlib.Path({str(new_folder)!r}), "step 2")
print(pusher.close(20))
"""
    client = run_client(hub, code, FAULT="mid_upload")
    assert client.returncode == -signal.SIGKILL, client.stderr
    assert (new_folder / "model.safetensors").read_bytes() in hub.large_files.values()  # uploaded, not committed
    assert hub.files(REPO) == old
    client = run_client(hub, f"from huggingface_hub import snapshot_download; print(snapshot_download({REPO!r}))")
    downloaded = AutoModelForCausalLM.from_pretrained(client.stdout.strip())
    assert all((downloaded.state_dict()[name] == value).all() for name, value in weights.items())


def test_token_travels_in_its_header_and_nowhere_else(
    hub: Hub, run_folder: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    hub.fail("/commit/", status=500)
    assert push_and_close(run_folder, tag="step-1") == ""
    for request in hub.requests:
        others = {name: value for name, value in request.headers.items() if name != "authorization"}
        assert TOKEN not in f"{request.path} {request.query} {others}"
        assert TOKEN.encode() not in request.body
    assert not any(request.has_token for request in hub.sent("PUT /large-files/"))
    assert TOKEN not in caplog.text + "".join(capfd.readouterr())


def test_no_progress_bar_is_drawn_beside_the_one_of_training(
    hub: Hub, run_folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS")
    assert push_and_close(run_folder) == ""
    assert "".join(capfd.readouterr()) == ""


# Around it


def test_importing_is_fast_because_the_client_is_imported_late(hub: Hub) -> None:
    code = (
        "import sys, shared.run.hub; print([name for name in ('huggingface_hub', 'tenacity') if name in sys.modules])"
    )
    assert run_client(hub, code).stdout.strip() == "[]"


@pytest.mark.slow
def test_server_serves_data_sets(hub: Hub) -> None:
    """The look-alike is good enough for datasets, also streaming: recipes' tests rely on it."""
    code = """
import datasets
rows = datasets.Dataset.from_dict({"text": [f"story {i}" for i in range(20)]})
rows.push_to_hub("tester/stories", private=True)
assert datasets.load_dataset("tester/stories", split="train")["text"] == rows["text"]
streamed = datasets.load_dataset("tester/stories", split="train", streaming=True)
assert [row["text"] for row in streamed] == list(rows["text"])
"""
    client = run_client(hub, code)
    assert client.returncode == 0, client.stderr
    assert hub.repositories["datasets", "tester/stories"].private
