"""``kill -9`` at random moments of a fit and of a save: nothing is lost.

Five kills each by default; ``LAPLACE_DEBIASED_KILLS=25`` makes it 25 each. The moments are drawn
with a seed; which instruction they hit is the scheduler's choice.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from laplace_debiased import DebiasedLaplace
from tests.estimation.victim import Paced
from tests.posterior.cases import INPUTS, assert_equal, network

KILLS = int(os.environ.get("LAPLACE_DEBIASED_KILLS", "5"))
ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(os.name != "posix", reason="kill -9 is POSIX")


class Nursery:
    """Victims, one at a time."""

    def __init__(self, folder: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.estimation.victim", str(folder)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def kill_one(self, task: str, seconds: float) -> bool:
        """Start a victim and kill it some time into its work; whether it was still at it."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{task}\n")
        self.process.stdin.flush()
        said = {self.line(), self.line()}  # in either order
        victim = int((said - {"working"}).pop())
        time.sleep(seconds)
        with suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)
        gone, status = self.line().split()
        assert gone == "gone"
        assert int(status) in (0, -signal.SIGKILL)
        return int(status) != 0


@pytest.fixture
def nursery(tmp_path: Path) -> Iterator[Nursery]:
    made = Nursery(tmp_path)
    yield made
    assert made.process.stdin is not None
    assert made.process.stdout is not None
    made.process.stdin.close()
    made.process.wait(timeout=60)
    made.process.stdout.close()


def test_killed_fit_goes_on_to_the_same_posterior(tmp_path: Path, nursery: Nursery) -> None:
    expected = DebiasedLaplace(network(), fisher="mc")
    expected.fit(Paced(), n_samples=None, n_data=30)
    moments, kills, ends = random.Random(0), 0, 0
    while kills < KILLS:
        kills += nursery.kill_one("fit", moments.uniform(0.0, 0.6))
        if (tmp_path / "done.pt").exists():
            assert_equal(DebiasedLaplace.load(tmp_path / "done.pt", network()), expected)
            (tmp_path / "done.pt").unlink()
            ends += 1
    last = DebiasedLaplace(network(), fisher="mc")
    checkpoint = tmp_path / "fit.pt"
    last.fit(Paced(), n_samples=None, n_data=30, checkpoint=checkpoint, checkpoint_interval=0)
    assert_equal(last, expected)
    last.save(tmp_path / "done.pt")
    assert os.listdir(tmp_path) == ["done.pt"]
    print(f"{kills} kills, {ends + 1} fits came to their end")


def test_killed_save_leaves_the_old_file_or_the_new_one(tmp_path: Path, nursery: Nursery) -> None:
    moments, seen, kills = random.Random(1), set(), 0
    while kills < KILLS:
        assert nursery.kill_one("save", moments.uniform(0.0, 0.05))
        kills += 1
        if not (tmp_path / "la.pt").exists():
            assert not seen
            continue
        la = DebiasedLaplace.load(tmp_path / "la.pt", network())
        assert torch.isfinite(la(INPUTS)).all()
        seen.add(float(la.prior_precision))
    assert seen <= {1.0, 2.0}
    la = DebiasedLaplace(network())
    la.fit(Paced(), n_samples=None, n_data=30)
    la.save(tmp_path / "la.pt")
    assert os.listdir(tmp_path) == ["la.pt"]
