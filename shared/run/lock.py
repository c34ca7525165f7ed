"""One run writes into a folder at a time."""

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import time
from pathlib import Path
from typing import IO

from shared.command_line import UsageError

WAIT_SECONDS = 10.0  # for a run that was just ended and still saves
_TAKEN = (errno.EACCES, errno.EAGAIN)

logger = logging.getLogger(__name__)


def lock_folder(folder: Path, wait_seconds: float = WAIT_SECONDS) -> IO[str] | None:
    """Lock a run folder, made if it is not there, until this process ends or closes a file of that name.

    The lock is the system's (POSIX record locks), which NFS has too: that of a dead process, or after a while of a dead
    machine, is gone, so nothing stale has to be told from what lives. None where the file system has no such locks;
    then nothing keeps two runs apart.

    Args:
        folder: of the run.
        wait_seconds: for another one to end.

    Raises:
        UsageError: another process holds it, it says which; or nothing can be written there.
    """
    name = f"output_dir: {str(folder)!r}: expected a folder"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("a+", encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{name} that can be written, got {error.strerror}") from error
    deadline = time.monotonic() + wait_seconds
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:
            if error.errno not in _TAKEN:
                file.close()
                logger.warning("%s cannot be locked (%s): see that no other run writes there", folder, error.strerror)
                return None
            if time.monotonic() >= deadline:
                with file:
                    raise UsageError(f"{name} that no other run writes into, {_holder(file)} does") from error
            time.sleep(0.2)
    about = {"process": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    with contextlib.suppress(OSError):  # a full disk; it is for people alone
        file.truncate(0)
        file.write(json.dumps(about))
        file.flush()
    return file


def _holder(file: IO[str]) -> str:
    """Who holds the lock, in words."""
    file.seek(0)
    try:
        about = json.loads(file.read())
    except ValueError:  # it is being written
        return "one"
    return f"process {about['process']} on {about['host']} (since {about['since']})"
