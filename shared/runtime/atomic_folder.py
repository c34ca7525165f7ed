"""Folders that are complete or absent, however their writing ends."""

import contextlib
import errno
import fcntl
import logging
import os
import shutil
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from shared.command_line import UsageError

logger = logging.getLogger(__name__)

_TOLD_AFTER_SECONDS = 5.0
_ABANDONED_SECONDS = 6 * 3600  # in which nobody wrote into it


@contextlib.contextmanager
def written_aside(folder: Path) -> Iterator[Path]:
    """A new folder to write into, which is flushed and becomes `folder` at the end unless another run was faster.

    An exception removes it. What a killed run left stays beside `folder` under a hidden name for six hours.

    Raises:
        UsageError: nothing can be written there.
    """
    for left in folder.parent.glob(f".{folder.name}.*"):
        with contextlib.suppress(OSError):  # another run removes it at the same time
            if left.is_dir() and _is_abandoned(left):
                shutil.rmtree(left)
    aside = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")  # process numbers repeat on other nodes
    with _refusing("cache_dir", folder.parent):
        aside.mkdir(parents=True)
    try:
        yield aside
        for path in (path for path in aside.rglob("*") if path.is_file()):
            with path.open("rb") as file:
                os.fsync(file.fileno())  # else a power cut could leave the new name and not the content
        try:
            aside.rename(folder)
        except OSError:
            if not folder.exists():
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def remove_abandoned(folders: Iterable[Path]) -> None:
    """Remove those of which no process holds the lock of `one_at_a_time`, and that nobody wrote into for six hours."""
    for folder in folders:
        with contextlib.suppress(OSError):  # it is held, or another run removes it at the same time
            if _is_abandoned(folder):
                with _lock_file(folder).open("w") as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(folder)
                    _lock_file(folder).unlink()


def _is_abandoned(folder: Path) -> bool:
    last_written = max(path.stat().st_mtime for path in (folder, *folder.rglob("*")))
    return last_written < time.time() - _ABANDONED_SECONDS


def _lock_file(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.lock")


@contextlib.contextmanager
def one_at_a_time(folder: Path, field: str = "cache_dir") -> Iterator[IO[str]]:
    """Let one process after the other run the block, so that what one built the others only find.

    Those of other nodes that see the folder too, as far as its file system has locks (NFS does).

    Gives the file that is locked; a program that inherits it holds the lock as well. `field` names the folder in
    messages.

    Raises:
        UsageError: nothing can be written there.
    """
    file = _lock_file(folder)
    with _refusing(field, folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = file.open("w")
    while not _is_locked(lock, file):  # another run has removed it meanwhile
        lock.close()
        lock = file.open("w")
    with lock:
        yield lock


def _is_locked(lock: IO[str], file: Path) -> bool:
    """Wait for the lock; whether it is still that of the file of this name."""
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            telling = threading.Timer(_TOLD_AFTER_SECONDS, logger.warning, ("another run holds %s, waiting", file))
            telling.daemon = True
            telling.start()
            fcntl.flock(lock, fcntl.LOCK_EX)
            telling.cancel()
    except OSError as error:  # then several may make the same, which does no harm
        logger.warning("%s cannot be locked (%s)", file, error.strerror)
        return True
    return file.exists() and os.path.samestat(os.fstat(lock.fileno()), file.stat())


@contextlib.contextmanager
def one_builder(folder: Path, material: Path | None = None) -> Iterator[bool]:
    """Whether this process is to make `folder`; the others wait until it is there.

    Args:
        folder: appears by a rename, as with `written_aside`.
        material: what it is made from and is used up, so that who makes another folder from it waits too; None =
            nothing of that kind.

    Raises:
        UsageError: nothing can be written there.
    """
    with one_at_a_time(material or folder) as lock:
        try:
            yield not folder.exists()
        finally:
            Path(lock.name).unlink(missing_ok=True)  # who waits for it finds the folder, or makes it


@contextlib.contextmanager
def _refusing(field: str, folder: Path) -> Iterator[None]:
    """Make one line of what goes wrong when something is written into `folder` first, but for a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        expected = f"a folder that can be written, or where all is made already: {error.strerror}"
        raise UsageError(f"{field}: {str(folder)!r}: expected {expected}") from error
