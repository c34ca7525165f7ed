"""A process that has imported the libraries and forks programs that need them, since imports take longer than they do.

    python fork_server.py SOCKET

Programs run as `python SCRIPT ...` or `python -m MODULE ...` would, with the arguments, environment, folder and streams
of fork_client.py, which stands in for them. Under `accelerate launch`, which is the library's own, the processes of a
run are forked here as well. NETWORK in the environment names a network namespace (`ip netns`) in which a program runs,
as on a machine of its own. Tests that are about a new interpreter start one.
"""

import atexit
import contextlib
import ctypes
import gc
import json
import os
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import traceback
import warnings
from pathlib import Path
from typing import Any

os.environ.update(DS_ACCELERATOR="cpu", OPENBLAS_NUM_THREADS="1")
CLIENT = Path(__file__).with_name("fork_client.py")
LIBRARIES = (
    *(
        "torch",
        "accelerate",
        "accelerate.commands.launch",
        "datasets",
        "matplotlib.figure",
        "torchmetrics.functional.image",
    ),
    *("torch.distributed.run", "torch.distributed.tensor", "torch.distributed.checkpoint", "torch.distributed.fsdp"),
    *("transformers", "transformers.models.nanochat.modeling_nanochat", "transformers.models.bert.modeling_bert"),
    *("transformers.models.megatron_bert.modeling_megatron_bert", "transformers.models.clip.modeling_clip"),
    *("transformers.models.resnet.modeling_resnet", "diffusers", "diffusers.models.transformers.transformer_prx"),
    *("diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion", "diffusers.pipelines.prx.pipeline_prx"),
    "deepspeed",
)


def import_libraries(path: str) -> None:
    """Import them, and let torch's launcher start processes by the client."""
    import importlib

    for name in LIBRARIES:
        importlib.import_module(name)
    from torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler import SubprocessHandler

    def popen(self: Any, arguments: tuple[str, ...], environment: dict[str, str]) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-S", str(CLIENT), path, *arguments[1:]]
        streams = {"stdout": self._stdout, "stderr": self._stderr}
        return subprocess.Popen(command, env=environment, **streams, start_new_session=True)

    SubprocessHandler._popen = popen  # type: ignore[method-assign] (the one place where the launcher starts a process)
    assert threading.active_count() == 1, "a fork takes one thread along, and others may hold locks"


def receive(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """A request, and the three streams."""
    head, streams, _, _ = socket.recv_fds(connection, 4, 3)
    size, text = struct.unpack("<I", head)[0], b""
    while len(text) < size:
        text += connection.recv(size - len(text))
    return json.loads(text), streams


def run(request: dict[str, Any], streams: list[int]) -> None:
    """Be the program, from here to the end of this process."""
    os.setsid()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    if network := os.environ.get("NETWORK"):
        enter(network)
    arguments = request["arguments"]
    if arguments[0] == "-u":
        arguments = arguments[1:]
        sys.stdout.reconfigure(write_through=True)  # type: ignore[union-attr]
    if arguments[0] == "-m":
        sys.path[0], sys.argv = request["folder"], arguments[1:]
        warnings.filterwarnings("ignore", ".*found in sys.modules.*", RuntimeWarning)
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.path[0], sys.argv = str(Path(arguments[0]).resolve().parent), arguments
        runpy.run_path(arguments[0], run_name="__main__")


def enter(network: str) -> None:
    """Let this process, and those that it starts, see that network namespace and no other network."""
    clone_newnet = 0x40000000  # sched.h
    with open(f"/run/netns/{network}") as file:
        if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), clone_newnet):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), network)


def serve(path: str) -> tuple[dict[str, Any], list[int]]:
    """Fork a process for each connection, which is told how it ended, or ends it; return in the forked process."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(64)
    running: dict[int, socket.socket] = {}
    parent = os.getppid()
    while os.getppid() == parent:
        open_ones = [connection for connection in running.values() if connection.fileno() >= 0]
        ready, _, _ = select.select([listener, *open_ones], [], [], 0.02)
        for connection in ready:
            if connection is listener:
                accepted, _ = listener.accept()
                request, streams = receive(accepted)
                pid = os.fork()
                if not pid:
                    for other in (listener, accepted, *running.values()):
                        other.close()
                    return request, streams
                for stream in streams:
                    os.close(stream)
                running[pid] = accepted
                accepted.sendall(f"{pid}\n".encode())
            else:  # nothing more is said: it was closed
                pid = next(pid for pid, each in running.items() if each is connection)
                os.kill(pid, signal.SIGKILL)
                connection.close()
        for pid in list(running):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                with contextlib.suppress(OSError):
                    running[pid].sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
                running.pop(pid).close()
    sys.exit()


def end(code: int) -> None:
    """As an interpreter ends, but without taking all modules down, which costs seconds in a fork."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    import_libraries(sys.argv[1])
    gc.freeze()  # a fork's collections leave alone what it shares with this process
    print("ready", flush=True)  # noqa: T201 (what the test process waits for)
    asked = serve(sys.argv[1])
    try:
        run(*asked)
    except SystemExit as exit:
        if not isinstance(exit.code, int | None):
            print(exit.code, file=sys.stderr)  # noqa: T201 (as an interpreter does)
        end(exit.code if isinstance(exit.code, int) else int(exit.code is not None))
    except BaseException:
        traceback.print_exc()
        end(1)
    end(0)
