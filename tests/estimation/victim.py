"""Processes to be killed: ``python -m tests.estimation.victim folder``.

For every line "fit" or "save" on its standard input it forks a victim and prints the victim's
process id, then "working" when that begins to work, then "gone" with its exit status. A victim of
"fit" fits and saves once; one of "save" saves two posteriors in turn to one path until it is
killed. Forking spares each of them the imports.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from laplace_debiased import DebiasedLaplace
from tests.posterior.cases import fitted, loader, network

PAUSE = 0.01
"""Seconds per batch, so that a fit lasts long enough to be killed in its midst."""


class Paced:
    """An unshuffled loader that takes its time."""

    def __iter__(self) -> Any:
        for batch in loader(batch_size=2):
            time.sleep(PAUSE)
            yield batch


def fit(folder: Path) -> None:
    la = DebiasedLaplace(network(), fisher="mc")
    say("working")
    la.fit(
        Paced(),  # type: ignore[arg-type]
        n_samples=None,
        n_data=30,
        checkpoint=folder / "fit.pt",
        checkpoint_interval=0,
    )
    la.save(folder / "done.pt")


def save(folder: Path) -> None:
    las = [fitted("kron", prior_precision=prior) for prior in (1.0, 2.0)]
    say("working")
    while True:
        for la in las:
            la.save(folder / "la.pt")


def say(line: str) -> None:
    os.write(1, f"{line}\n".encode())


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    for line in sys.stdin:
        victim = os.fork()
        if victim == 0:
            status = 1
            try:
                {"fit": fit, "save": save}[line.strip()](folder)
                status = 0
            finally:
                os._exit(status)
        say(str(victim))
        say(f"gone {os.waitstatus_to_exitcode(os.waitpid(victim, 0)[1])}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
