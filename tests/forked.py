"""Commands of Python that are forked from this process instead of started: they find imported what takes seconds."""

import contextlib
import fcntl
import logging
import os
import runpy
import signal
import stat
import subprocess
import sys
import traceback
import warnings

PIPE, STDOUT = subprocess.PIPE, subprocess.STDOUT


class Forked(subprocess.Popen):
    """A ``Popen`` of ``[python, "-m", module, ...]`` or ``[python, "-c", code, ...]``.

    What a new interpreter would do is left to a test or two of each kind, which start one. Commands that are not
    Python's are started as ever.
    """

    def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *rest):
        if args[0] != sys.executable:
            return super()._execute_child(args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *rest)
        *_, p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite = rest[:9]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Of threads, which a new command would not have.
            self.pid = os.fork()
        if self.pid == 0:
            end_with(lambda: _become(args[1:], cwd, env, (p2cread, c2pwrite, errwrite)))
        self._child_created = True
        return self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)


def run(command, **options):
    """``subprocess.run`` with the output captured as text."""
    process = Forked(command, stdout=PIPE, stderr=PIPE, text=True, **options)
    out, err = process.communicate()
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def _become(words, cwd, env, files):
    """Do what the command says, in a forked process."""
    for number, file in enumerate(files):
        if file != -1:
            os.dup2(file, number)
    _let_go()
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(n, "r" if n == 0 else "w", closefd=False) for n in range(3))
    _log_to(sys.stderr)
    warnings.resetwarnings()
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if cwd is not None:
        os.chdir(cwd)
    if env is not None:
        os.environ.clear()
        os.environ.update(env)
    kind, what, *sys.argv[1:] = words
    if kind == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        exec(what, {"__name__": "__main__"})


def end_with(run):
    """Run a function, and end the process as the interpreter would: with its status, and what it says of errors.

    Nothing of the parent runs on: neither handlers at the exit, nor the tests.
    """
    status = 1
    try:
        run()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
        traceback.print_exc()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _let_go():
    """Close what a new interpreter would not inherit: pipes, and locks. Fonts are read on, by objects of this process.

    Numbers stay taken, so that an object that closes its own does not close a later one's.
    """
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in map(int, os.listdir("/dev/fd")):
        with contextlib.suppress(OSError):
            read_only = fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
            if number > 2 and number != nothing and not (read_only and stat.S_ISREG(os.fstat(number).st_mode)):
                os.dup2(nothing, number)


def _log_to(stream):
    """Let handlers that were made for the stderr of this process write to that of the forked one."""
    for logger in (logging.root, *map(logging.getLogger, list(logging.root.manager.loggerDict))):
        for handler in logger.handlers:
            if type(handler) is logging.StreamHandler:
                handler.setStream(stream)
    if (rank_zero := sys.modules.get("lightning_utilities.core.rank_zero")) is not None:
        # It belongs to the Lightning imported last: once a test needs pytorch_lightning, to that, without a handler.
        rank_zero.log = logging.getLogger("lightning.pytorch.utilities.rank_zero")
