"""Ctrl-C between units of work."""

import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from lightning.pytorch.utilities.exceptions import SIGTERMException

from nclightning.interrupts import HeldInterrupts, Terminated, deferred_interrupt, status_of, terminable

ROOT = Path(__file__).resolve().parents[1]


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


def test_the_block_ends_first():
    done = []

    def work():
        with deferred_interrupt() as state:
            interrupt()
            assert state.waiting
            done.append("block")
        done.append("after")

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == ["block"]
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_interrupt_acts_at_once():
    done = []

    def work():
        with deferred_interrupt():
            interrupt()
            interrupt()
            done.append("block")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == []


def test_an_error_in_the_block_comes_through():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(RuntimeError), deferred_interrupt():
        raise RuntimeError
    assert signal.getsignal(signal.SIGINT) is before


def test_other_threads_are_left_alone():
    seen = []

    def work():
        with deferred_interrupt() as state:
            seen.append(state.waiting)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]


def test_held_interrupts_are_noted_and_a_second_one_acts():
    before = signal.getsignal(signal.SIGINT)
    held = HeldInterrupts()
    held.hold()
    try:
        signal.raise_signal(signal.SIGINT)
        assert held.waiting
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is before
    finally:
        held.release()
    assert signal.getsignal(signal.SIGINT) is before


def test_held_interrupts_collect_those_of_blocks_within():
    held = HeldInterrupts()
    held.hold()
    try:
        with deferred_interrupt() as inner:
            signal.raise_signal(signal.SIGINT)
            assert inner.waiting
            assert not held.waiting
        assert held.waiting
    finally:
        held.release()


def test_sigterm_is_an_exception_once():
    before, done = signal.getsignal(signal.SIGTERM), []

    def work():
        with terminable():
            try:
                signal.raise_signal(signal.SIGTERM)
            finally:
                signal.raise_signal(signal.SIGTERM)
                done.append("cleaned up")

    with pytest.raises(Terminated) as stop:
        work()
    assert stop.value.code == 143
    assert done == ["cleaned up"]
    assert signal.getsignal(signal.SIGTERM) is before


def test_statuses_are_those_of_shells():
    assert status_of(KeyboardInterrupt()) == 130
    assert status_of(SIGTERMException()) == 143
    assert status_of(SystemExit(1)) is None
    stop = SystemExit(1)  # Lightning's, while it handles an interrupt.
    stop.__context__ = KeyboardInterrupt()
    assert status_of(stop) == 130


# A first rank launches another, which waits where ranks meet, for longer than any test.
RANK = """
from datetime import timedelta
from torch.distributed import TCPStore
from nclightning.interrupts import follow_launcher
follow_launcher()
print("waits", flush=True)
TCPStore("localhost", {port}, 2, is_master=False, timeout=timedelta(hours=1))
"""
LAUNCHER = """
import subprocess, sys
from nclightning.interrupts import ends_with_launcher
with ends_with_launcher():
    rank = subprocess.Popen([sys.executable, "-c", sys.argv[1]])
rank.wait()
"""


@pytest.mark.skipif(os.name == "nt", reason="ranks end by themselves on POSIX systems only")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_rank_that_waits_ends_with_the_first(number):
    with socket.socket() as nobody:  # Bound, so that nobody else listens there.
        nobody.bind(("localhost", 0))
        rank = RANK.format(port=nobody.getsockname()[1])
        first = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER, rank], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        with first:
            assert first.stdout.readline() == "waits\n"
            first.send_signal(number)
            said = first.stderr.read()  # Until both have closed it.
        assert "error: the process that launched this one is gone." in said


@pytest.mark.skipif(os.name == "nt", reason="ranks end by themselves on POSIX systems only")
def test_a_rank_whose_first_is_gone_already_ends(monkeypatch):
    monkeypatch.setenv("NCLIGHTNING_LAUNCHER", "1" if os.getpid() != 1 else "2")
    done = subprocess.run(
        [sys.executable, "-c", RANK.format(port=9)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "the process that launched this one is gone" in done.stderr
