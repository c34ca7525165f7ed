"""Pushing a loadable model to the Hub without ever disturbing the training loop.

`check_push` finds out before training whether a push can work. `HubPusher` sets the loadable files aside on their own
disk and uploads them in one background thread, each push as one atomic commit; a newer push replaces one that still
waits. What fails is tried again, then logged, and said once more by `close` with the command that pushes again. Only
files on an allow-list leave the machine: safetensors, configuration, tokenizer, model card, metrics, images; never a
pickle.
"""

import contextlib
import json
import logging
import os
import re
import shlex
import shutil
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.command_line import UsageError

logger = logging.getLogger(__name__)

# As `hf upload` reads patterns: "*" matches "/" too. A file goes if it matches PUSHED and does not match KEPT_BACK.
PUSHED = (
    *("*.safetensors", "*.json", "*.jsonl", "*.yaml", "*.md", "*.model", "*.jinja", "*vocab.txt", "*merges.txt"),
    *("recipe.py", "*.png", "*.jpg", "*.svg", "samples/*.txt"),
)
KEPT_BACK = ("checkpoints/*", "profile/*", "logs/*", "runs/*", "wandb/*", "mlruns/*", ".*", "*/.*")
ASIDE = ".push"  # in the run folder: what is being pushed

ATTEMPTS = 5
FIRST_WAIT_SECONDS = 2.0  # doubles after each attempt
CHECK_TIMEOUT_SECONDS = 30.0
PUSH_TIMEOUT_SECONDS = 300.0  # for one answer, not for the whole upload

# Tokens, and the signatures in upload addresses.
_SECRET = re.compile(r"(?<=Bearer )[^\s'\"]+|hf_[\w.-]{30,}|(?<=\?)\S+")


def check_push(repo_id: str, *, private: bool) -> str:
    """Create the repository if it is not there, and make sure that this user may write to it.

    Args:
        repo_id: `name` or `owner/name`.
        private: whether a repository that this creates is private; one that exists stays as it is.

    Returns:
        The full id, `owner/name`; "" for "", which asks for nothing.

    Raises:
        UsageError: the id is malformed, there is no valid token, no permission, or no answer.
    """

    def prepare() -> str:
        api = _client(CHECK_TIMEOUT_SECONDS)
        full_id = _full_id(api, repo_id)
        api.create_repo(full_id, private=private, exist_ok=True)
        api.auth_check(full_id, write=True)
        if private and not api.model_info(full_id).private:
            logger.warning("%s exists and is public: what is pushed will be public", full_id)
        return full_id

    return _checked(repo_id, prepare) if repo_id else ""


def check_login(repo_id: str) -> str:
    """What `check_push` can find out without creating anything: the form of the id, and whether the token is known.

    Returns:
        The full id, `owner/name`; "" for "", which asks for nothing.

    Raises:
        UsageError: the id is malformed, there is no valid token, or no answer.
    """
    return _checked(repo_id, lambda: _full_id(_client(CHECK_TIMEOUT_SECONDS), repo_id)) if repo_id else ""


def _full_id(api: Any, repo_id: str) -> str:
    user = api.whoami()["name"]
    return repo_id if "/" in repo_id else f"{user}/{repo_id}"


def _checked(repo_id: str, ask: Callable[[], str]) -> str:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo_id)
        return _retrying()(ask)
    except HFValidationError as error:
        expected, reason = "an id such as me/my-gpt", _one_line(error)
    except Exception as error:  # HTTP, the connection and the source of the token have no common class
        expected, reason = _what_was_expected(error), _one_line(error)
    # Outside of `except`, so that no traceback shows a cause that was not redacted.
    raise UsageError(_redact(f"push_to_hub: {repo_id!r}: expected {expected} ({reason})"))


@dataclass(frozen=True)
class _Push:
    number: int
    folder: Path
    message: str
    tag: str


class HubPusher:
    """Pushes a run's loadable files in the background; neither `push` nor `close` raises what goes wrong.

    One without a repository does nothing: that of a run that is not pushed, or of all processes but the main one.

    Attributes:
        repo_id: the full id; "" = it pushes nothing.
    """

    def __init__(self, repo_id: str, private: bool) -> None:
        """Start the thread that uploads.

        Args:
            repo_id: the full id that `check_push` returned; "" = push nothing.
            private: for the command that `close` prints; the repository is there already.
        """
        self.repo_id, self._private = repo_id, private
        self._folder = Path()
        self._newest = 0
        self._problems = {0: ""}  # number of an ended push -> what went wrong
        self._waiting: _Push | None = None
        self._closed = False
        self._changed = threading.Condition()
        if repo_id:
            threading.Thread(target=self._work, name="push_to_hub", daemon=True).start()

    def push(self, folder: Path, message: str, tag: str = "") -> None:
        """Set the loadable files of `folder` aside in it and return; they are uploaded later.

        Args:
            folder: the run folder, always the same. It may be changed as soon as this returns, but for files of
                weights, which are replaced and not written into.
            message: of the commit.
            tag: name that the commit gets, such as step-1000. A tag that exists stays where it is. "" = none.
        """
        if not self.repo_id:
            return
        if not self._newest:
            shutil.rmtree(folder / ASIDE, ignore_errors=True)  # of a run that was killed
        self._folder = folder
        self._newest += 1
        push = _Push(self._newest, folder / ASIDE / str(self._newest), message, tag)
        try:
            _set_aside(folder, push.folder)
        except Exception as error:  # a full disk, a file that vanished: training goes on
            self._end(push, _one_line(error))
            return
        with self._changed:
            replaced, self._waiting = self._waiting, push
            self._changed.notify_all()
        if replaced:
            shutil.rmtree(replaced.folder, ignore_errors=True)

    def close(self, timeout_seconds: float) -> str:
        """Wait at most so long for the newest push, then stop the thread. The last call.

        Returns:
            "" if the newest push is on the Hub, else one line: what went wrong, and the command that pushes again.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._newest in self._problems, timeout_seconds)
            problem = self._problems.get(self._newest, f"it did not end within {timeout_seconds:g} seconds")
            self._waiting, self._closed = None, True
            self._changed.notify_all()
        if not problem:
            return ""
        visibility = "--private" if self._private else "--no-private"
        command = ["hf", "upload", self.repo_id, str(self._folder), ".", visibility]
        command += [f"--include={pattern}" for pattern in PUSHED] + [f"--exclude={pattern}" for pattern in KEPT_BACK]
        return f"push_to_hub: the last push failed ({problem}); to push again: {shlex.join(command)}"

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                push, self._waiting = self._waiting, None
            if push is None:
                return
            problem = ""
            try:
                _retrying()(_upload, self.repo_id, push)
            except Exception as error:  # whatever it is, training goes on
                problem = _one_line(error)
            self._end(push, problem)

    def _end(self, push: _Push, problem: str) -> None:
        shutil.rmtree(push.folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # another one waits in it
            push.folder.parent.rmdir()
        if problem and not self._closed:
            logger.warning("the push %r to %s failed: %s", push.message, self.repo_id, problem)
        with self._changed:
            self._problems[push.number] = problem
            self._changed.notify_all()


def _set_aside(folder: Path, target: Path) -> None:
    """Keep what may be pushed as it is now: weights by another name of theirs, which takes no room, the rest as copies.

    Metrics and model card are later rewritten in place; an export replaces weights (`models.export.move_files`).
    """
    from huggingface_hub.utils import filter_repo_objects

    files = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    names = list(filter_repo_objects(files, allow_patterns=[*PUSHED], ignore_patterns=[*KEPT_BACK]))
    if not names:
        raise FileNotFoundError(f"nothing to push in {folder}")
    for name in names:
        source, kept = folder / name, target / name
        kept.parent.mkdir(parents=True, exist_ok=True)
        if source.suffix != ".safetensors" or not _is_linked(source, kept):
            shutil.copyfile(source, kept)


def _is_linked(source: Path, target: Path) -> bool:
    """Give a file a second name; whether its file system has such."""
    try:
        os.link(source, target)
    except OSError:
        return False
    return True


def _upload(repo_id: str, push: _Push) -> None:
    """One commit with all files of `push`, then its tag; calling it again after a failure is safe."""
    from huggingface_hub import CommitOperationAdd
    from huggingface_hub.utils import disable_progress_bars

    api = _client(PUSH_TIMEOUT_SECONDS)
    files = sorted(path for path in push.folder.rglob("*") if path.is_file())
    additions = [CommitOperationAdd(path.relative_to(push.folder).as_posix(), path) for path in files]
    with disable_progress_bars():  # training has its own
        for addition in additions:
            # One by one: several at once run in a pool, and Python does not exit before a pool's threads have ended.
            api.preupload_lfs_files(repo_id, [addition], free_memory=False)
        _fault("mid_upload")
        commit = api.create_commit(repo_id, additions, commit_message=push.message)
    if push.tag:
        api.create_tag(repo_id, tag=push.tag, revision=commit.oid, exist_ok=True)


def _client(timeout_seconds: float) -> Any:
    from huggingface_hub import HfApi, get_session

    get_session().timeout = timeout_seconds  # by default it waits for an answer for ever
    return HfApi()


def _retrying() -> Any:
    import tenacity

    return tenacity.Retrying(
        retry=tenacity.retry_if_exception(_is_transient),
        stop=tenacity.stop_after_attempt(ATTEMPTS),
        wait=tenacity.wait_exponential(multiplier=FIRST_WAIT_SECONDS, max=60),
        reraise=True,
    )


def _is_transient(error: BaseException) -> bool:
    """Whether trying again may help: overload, a fault of the server, a lost connection, no answer in time."""
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

    if status := _status(error):
        return status in (408, 412, 429) or status >= 500  # 412: another commit came in between
    if isinstance(error, RuntimeError) and error.__cause__:  # how the upload of a large file reports
        return _is_transient(error.__cause__)
    # JSONDecodeError: a gateway's error page. RuntimeError: the connection was closed under the thread, by a fork.
    passing = (HTTPError, ConnectionError, TimeoutError, json.JSONDecodeError, RuntimeError)
    return isinstance(error, passing) and not isinstance(error, OfflineModeIsEnabled)


def _status(error: BaseException) -> int:
    """The HTTP status that the Hub answered with, 0 if it did not answer. Xet only says it in its message."""
    response = getattr(error, "response", None)
    if response is not None:
        return response.status_code
    said = re.search(r"HTTP status \w+ error \((\d{3})", str(error))
    return int(said[1]) if said else 0


def _what_was_expected(error: BaseException) -> str:
    from huggingface_hub.errors import LocalTokenNotFoundError

    status = _status(error)
    if isinstance(error, LocalTokenNotFoundError) or status == 401:
        return "a valid token, from `hf auth login` or HF_TOKEN"
    return "a repository that the token may write to" if 400 <= status < 500 and status != 429 else "a Hub that answers"


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    cause = error.__cause__ if isinstance(error, RuntimeError) else None
    return _redact(text) + (f" {_one_line(cause)}" if cause else "")


def _redact(text: str) -> str:
    return _SECRET.sub("***", text)


def _fault(point: str) -> None:
    """Die here when the environment says so; how the tests show that the Hub never holds half a push."""
    if os.environ.get("FAULT") == point:
        os.kill(os.getpid(), signal.SIGKILL)
