"""Interrupt every call at random moments: ``python -m tests.interrupts 5000``."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections import Counter
from typing import Any

import torch

from tests.interrupts.calls import Record, World, calls, nothing_left_behind, whole

SENDER = """
import os, signal, sys, time
for line in sys.stdin:
    for delay in map(float, line.split()):
        time.sleep(delay)
        os.kill(int(sys.argv[1]), signal.SIGINT)
    print("sent", flush=True)
"""
DRAWS = ("nn", "functional samples", "sample")
"""Calls that draw from torch's global generator."""
CHANGES = {
    "generators": tuple(f"{la}: {name}" for la in ("kron", "last", "lowrank") for name in DRAWS),
    "kron": ("marglik", "adding to a fit", "kron: fit", "kron: grid", "kron: state"),
    "last": ("last: fit", "last: grid", "last: state"),
    "lowrank": ("two loaders", "lowrank: fit", "lowrank: grid", "lowrank: state"),
    "optimised": ("NewtonCG",),
}
"""What a call may change, as a whole."""


class Interrupted:
    """Counts interrupts that reached a call."""

    def __init__(self) -> None:
        self.listening, self.raised = False, 0

    def __call__(self, signum: int, frame: Any) -> None:
        if self.listening:
            self.raised += 1
            raise KeyboardInterrupt


def main(n_interrupts: int) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    w, rng, handler = World(), random.Random(0), Interrupted()
    known = calls(w)
    seconds = {name: measured(call) for name, call in known.items()}
    signal.signal(signal.SIGINT, handler)
    sender = subprocess.Popen(
        [sys.executable, "-c", SENDER, str(os.getpid())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert sender.stdin is not None
    assert sender.stdout is not None
    wrong: list[str] = []
    reached: Counter[str] = Counter()
    rounds = 0
    while handler.raised < n_interrupts and rounds < 20 * n_interrupts:
        rounds += 1
        name = rng.choice(list(known))
        before = Record(w)
        second = f" {rng.random() ** 3 * 0.002}" if rng.random() < 0.5 else ""
        sender.stdin.write(f"{rng.random() * seconds[name]}{second}\n")
        sender.stdin.flush()
        was = handler.raised
        try:
            handler.listening = True
            known[name]()
            handler.listening = False
        except KeyboardInterrupt:
            handler.listening = False
        except Exception:
            handler.listening = False
            wrong.append(f"{name}: {traceback.format_exc()}")
        reached[name] += handler.raised > was
        sender.stdout.readline()
        wrong += [f"{name}: {problem}" for problem in problems(w, name, before, handler)]
    sender.kill()
    print(
        f"{handler.raised} interrupts in {rounds} calls, {len(wrong)} wrong", *wrong[:20], sep="\n"
    )
    print("never reached:", sorted(set(known) - set(reached)))
    sys.exit(bool(wrong))


def measured(call: Any) -> float:
    """Seconds that a call takes, after a first one."""
    call()
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def problems(w: World, name: str, before: Record, handler: Interrupted) -> list[str]:
    """What the interrupted call has left behind."""
    found = []
    for part in before.differences(Record(w)):
        if not any(name.startswith(call) for call in CHANGES.get(part, ())):
            found.append(f"{part} changed")
        elif part in w.posteriors and not whole(w.posteriors[part]):
            found.append(f"{part} is of two halves")
    if signal.getsignal(signal.SIGINT) is not handler:
        found.append("the handler stayed")
        signal.signal(signal.SIGINT, handler)
    try:
        with nothing_left_behind(w):
            pass
    except AssertionError as error:
        found.append(f"left behind: {error}")
    return found


if __name__ == "__main__":
    main(int(sys.argv[1]))
