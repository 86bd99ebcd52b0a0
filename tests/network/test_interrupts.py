"""No SIGINT cuts a guard's set-up or clean-up in two, however many come and whenever."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from laplace_debiased.network.interrupts import let_through, unbroken, uninterrupted

SIGNALS = 1000
"""Sent within a second; the loop that they hit consists of guards and nothing else."""

PROGRAM = """
import os, signal, subprocess, sys
from laplace_debiased.network import interrupts

changed = [0]


@interrupts.unbroken
def changing():
    changed[0] += 1
    try:
        sum(())
        yield
    finally:
        sum(())
        changed[0] -= 1


def nested():
    with changing():
        sum(())
        with changing(), interrupts.uninterrupted():
            changed[0] += 1
            sum(())
            changed[0] -= 1


def raising(signum, frame):
    if listening:
        raise KeyboardInterrupt


listening, raised, wrong = False, 0, []
signal.signal(signal.SIGINT, raising)
sender = subprocess.Popen([sys.executable, "-c", sys.argv[1], str(os.getpid())])
while sender.poll() is None:
    try:
        listening = True
        for _ in range(20):
            nested()
        listening = False
    except KeyboardInterrupt:
        listening = False
        raised += 1
    state = interrupts._STATE
    now = (changed[0], state.open, state.held, state.pending)
    if now != (0, 0, 0, False) or signal.getsignal(signal.SIGINT) is not raising:
        wrong.append(now)
        break
print(raised, wrong)
"""
SENDER = f"""
import os, random, signal, sys, time
random.seed(0)
try:
    for i in range({SIGNALS}):
        os.kill(int(sys.argv[1]), signal.SIGINT)
        if i % 5:
            time.sleep(random.random() * 3e-4)
except ProcessLookupError:
    pass
"""


def test_a_thousand_interrupts_find_every_guard_entered_or_left() -> None:
    found = subprocess.run(
        [sys.executable, "-c", PROGRAM, SENDER], capture_output=True, text=True, timeout=120
    )
    raised, wrong = found.stdout.split(maxsplit=1)
    assert wrong.strip() == "[]", found.stdout + found.stderr
    assert int(raised) > SIGNALS / 10


@pytest.fixture
def handled() -> Iterator[list[str]]:
    """Signals that the user's handler has seen; it raises."""
    seen: list[str] = []

    def handler(signum: int, frame: Any) -> None:
        seen.append("raised")
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, handler)
    yield seen
    assert signal.getsignal(signal.SIGINT) is handler
    signal.signal(signal.SIGINT, before)


def interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


def test_an_interrupt_in_set_up_or_clean_up_comes_after_it(handled: list[str]) -> None:
    log: list[str] = []

    @unbroken
    def guard() -> Iterator[None]:
        interrupt()
        log.append("set")
        try:
            yield
        finally:
            log.append("restored")

    with pytest.raises(KeyboardInterrupt), guard():
        log.append("never")
    assert log == ["set", "restored"]

    @unbroken
    def leaving() -> Iterator[None]:
        yield
        interrupt()
        log.append("done")

    with pytest.raises(KeyboardInterrupt), leaving():
        log.append("block")
    assert log[2:] == ["block", "done"]
    assert handled == ["raised"] * 2


def test_a_second_interrupt_waits_for_the_clean_up_of_the_first(handled: list[str]) -> None:
    log: list[str] = []

    @unbroken
    def guard() -> Iterator[None]:
        try:
            yield
        finally:
            interrupt()
            log.append("restored")

    with pytest.raises(KeyboardInterrupt), guard():
        interrupt()
    assert log == ["restored"]
    assert len(handled) == 2


def test_a_block_that_holds_interrupts_runs_to_its_end(handled: list[str]) -> None:
    log: list[str] = []

    def block() -> None:
        interrupt()
        interrupt()
        log.append("whole")

    with pytest.raises(KeyboardInterrupt), uninterrupted():
        block()
    assert (log, handled) == (["whole"], ["raised"])


def test_waiting_in_a_set_up_can_be_interrupted(handled: list[str]) -> None:
    @unbroken
    def guard() -> Iterator[None]:
        interrupt()
        let_through()
        yield

    with pytest.raises(KeyboardInterrupt), guard():
        pass
    assert len(handled) == 1


def test_a_handler_that_does_not_raise_is_asked_and_the_block_goes_on() -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGINT, lambda signum, frame: seen.append(signum))
    try:
        with unbroken(lambda: iter([None]))():
            interrupt()
            seen.append(0)
        assert seen == [signal.SIGINT, 0]
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("kind", [signal.SIG_IGN, signal.SIG_DFL])
def test_a_signal_that_is_ignored_or_kills_still_does(kind: Any) -> None:
    before = signal.signal(signal.SIGINT, kind)
    try:
        with uninterrupted():
            assert signal.getsignal(signal.SIGINT) is kind
            if kind is signal.SIG_IGN:
                interrupt()
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_handler_set_in_the_block_stays(handled: list[str]) -> None:
    mine = signal.getsignal(signal.SIGINT)
    other = lambda signum, frame: None  # noqa: E731
    with uninterrupted():
        signal.signal(signal.SIGINT, other)
    assert signal.getsignal(signal.SIGINT) is other
    signal.signal(signal.SIGINT, mine)


def test_a_handler_of_ours_that_was_kept_passes_signals_on(handled: list[str]) -> None:
    mine = signal.getsignal(signal.SIGINT)
    with uninterrupted():
        ours = signal.signal(signal.SIGINT, mine)
    signal.signal(signal.SIGINT, ours)
    with pytest.raises(KeyboardInterrupt):
        interrupt()
    with uninterrupted():
        pass
    assert signal.getsignal(signal.SIGINT) is mine


def test_other_threads_leave_the_handler_alone(handled: list[str]) -> None:
    mine, found = signal.getsignal(signal.SIGINT), []

    def work() -> None:
        with uninterrupted():
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [mine]


def test_an_exception_of_the_block_passes_through(handled: list[str]) -> None:
    with pytest.raises(LookupError), uninterrupted():
        raise LookupError
