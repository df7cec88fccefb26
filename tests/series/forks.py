"""The command in a forked process, which is killed at a state."""

import os
import signal

from nclightning.cli import main
from nclightning.files import observers


class Killer:
    """Kills its process behind the n-th operation that fits. Nothing happens on the disk from there to the next one.

    Args:
        number: From 1 on.
        name: Of the operation; empty fits all.
        file: Name of the file; empty fits all.
    """

    def __init__(self, number, name="", file=""):
        self.left, self.name, self.file = number, name, file

    def __call__(self, operation):
        if operation.done and self.name in ("", operation.name) and self.file in ("", operation.path.name):
            self.left -= 1
            if not self.left:
                os.kill(os.getpid(), signal.SIGKILL)


def run_killed(words, killer):
    """Run the command in a fork; say whether it was killed, and not done before."""
    child = os.fork()
    if not child:
        status = 1
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            observers.append(killer)
            main(words)
            status = 0
        finally:
            os._exit(status)
    status = os.waitpid(child, 0)[1]
    assert status == 0 or os.WTERMSIG(status) == signal.SIGKILL, status
    return status != 0
