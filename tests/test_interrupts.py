"""Ctrl-C between units of work."""

import os
import signal
import threading

import pytest

from nclightning.interrupts import HeldInterrupts, deferred_interrupt


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
