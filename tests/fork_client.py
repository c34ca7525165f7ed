"""Stands in for a new Python: has fork_server.py run a program, hands it its streams and signals, and ends as it does.

    python -S fork_client.py SOCKET [-u] (-m MODULE | SCRIPT) [ARGUMENT ...]

It imports the standard library alone, so that it starts in a few milliseconds. Killed, it takes the program with it:
the server sees its connection closed.
"""

import json
import os
import signal
import socket
import struct
import sys


def main() -> None:
    """Ask, forward signals, wait."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(sys.argv[1])
    environment = {**os.environ, "LAUNCHER_PID": str(os.getppid())}
    request = json.dumps({"arguments": sys.argv[2:], "environment": environment, "folder": os.getcwd()}).encode()
    socket.send_fds(connection, [struct.pack("<I", len(request))], [0, 1, 2])
    connection.sendall(request)
    answers = connection.makefile()
    pid = int(answers.readline())
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, lambda received, _: os.kill(pid, received))
    code = int(answers.readline() or -signal.SIGKILL)  # "": the server is gone
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


if __name__ == "__main__":
    main()
