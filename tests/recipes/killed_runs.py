"""Start a recipe again and again and kill each start, in forks of one process, which has imported what it needs.

    python tests/recipes/killed_runs.py RECIPE CONFIG KILL ...

A kill is a fault point, such as before_rename:2, at which the start must die by SIGKILL, or a number, the seconds
after which it gets one unless it has ended well before. The last start is left alone and must end well. Prints how each
start ended.
"""

import os
import runpy
import signal
import sys
import time


def start(recipe: str, config: str, kill: str) -> int:
    """What the start ended with; minus the signal's number for one that was killed."""
    pid = os.fork()
    if not pid:
        os.environ["FAULT"] = kill
        sys.argv = [recipe, "--config", config]
        try:
            runpy.run_path(recipe, run_name="__main__")
        except SystemExit as exit:
            os._exit(int(exit.code or 0))
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        os._exit(0)
    if kill and ":" not in kill:
        time.sleep(float(kill))
        os.kill(pid, signal.SIGKILL)  # it is not waited for yet, so the number is still its own
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


if __name__ == "__main__":
    recipe, config, *kills = sys.argv[1:]
    runpy.run_path(recipe, run_name="imported")
    for kill in [*kills, ""]:
        status = start(recipe, config, kill)
        print(kill or "end", status, flush=True)  # noqa: T201 (what the test reads)
        is_right = status == 0 if not kill else status == -signal.SIGKILL or (":" not in kill and status == 0)
        if not is_right:
            sys.exit(1)
