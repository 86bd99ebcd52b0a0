"""``kill -9`` of a rank: the others say so, and any number of processes go on where it was."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from laplace_debiased.estimation.checkpoint import chosen_sums
from tests.parallel.cases import INPUTS, LABELS, Case, numbers
from tests.parallel.crowd import Crowd, Failure, run

OPTIONS = {"fisher": "mc", "folds": 3}
DRAWN_BY_CURVATURE = {"n_samples": 17}
EVERYTHING = {"n_samples": None}


class Deadly(torch.utils.data.Dataset):
    """Kills the process that reads from it, at its n-th sample."""

    def __init__(self, last: float) -> None:
        self.last, self.reads = last, 0

    def __len__(self) -> int:
        return len(INPUTS)

    def __getitem__(self, index: int) -> Any:
        self.reads += 1
        if self.reads > self.last:
            os.kill(os.getpid(), signal.SIGKILL)
        return INPUTS[index], LABELS[index]


def fit(rank: int, path: str, arguments: dict[str, Any], victim: int = -1, last: int = 0) -> Any:
    """Numbers and samples read of a fit with a checkpoint, in which one rank may die."""
    la = Case(options=OPTIONS).posterior()
    data = Deadly(last if rank == victim else float("inf"))
    loader = torch.utils.data.DataLoader(data, batch_size=2)
    started = time.monotonic()
    try:
        la.fit(loader, checkpoint=path, checkpoint_interval=0, **arguments)
    except RuntimeError as error:
        assert la.H is None
        assert time.monotonic() - started < 15
        return Failure(error)
    return numbers(la), data.reads


def attempt(world: int, path: Path, arguments: dict[str, Any], last: int) -> list[Any]:
    """What the ranks say of a fit whose last rank dies."""
    return Crowd(world, fit, str(path), arguments, world - 1, last, patience=10).results()


def check(found: Any, expected: dict[str, torch.Tensor]) -> None:
    for what, value in expected.items():
        torch.testing.assert_close(
            found[what], value, rtol=1e-10, atol=1e-10, msg=lambda m, at=what: f"{at}: {m}"
        )


@pytest.mark.parametrize("arguments", [EVERYTHING, DRAWN_BY_CURVATURE])
def test_any_number_of_processes_goes_on_where_a_rank_was_killed(
    arguments: dict[str, Any], tmp_path: Path
) -> None:
    expected = fit(0, str(tmp_path / "whole.pt"), arguments)[0]
    for world, share in [(2, 0.6), (3, 0.9), (1, 0.9)]:  # in the first walk, or in the second
        folder = tmp_path / f"{world}"
        folder.mkdir()
        *_, (undisturbed, reads) = run(world, fit, str(folder / "fit.pt"), arguments)
        check(undisturbed, expected)
        *others, dead = attempt(world, folder / "fit.pt", arguments, int(share * reads))
        assert dead is None
        for other in others:
            assert other.kind == "RankLostError"
            assert "waits for another rank in vain" in other.message
        assert list(folder.iterdir())
        for again in (1, 2, 3):
            copy = tmp_path / f"{world} then {again}"
            shutil.copytree(folder, copy)
            for found, read in run(again, fit, str(copy / "fit.pt"), arguments):
                check(found, expected)
                assert again != world or world == 1 or read < reads
            assert list(copy.iterdir()) == []


def test_fit_that_is_killed_again_and_again_gets_there(tmp_path: Path) -> None:
    """With another number of processes each time; every life reads fewer samples than a walk."""
    expected = fit(0, str(tmp_path / "whole.pt"), EVERYTHING)[0]
    path = tmp_path / "fit.pt"
    lives, found = 0, [None]
    while found[-1] is None and lives < 20:
        found = attempt((2, 1, 3)[lives % 3], path, EVERYTHING, last=9)
        lives += 1
    assert lives > 3
    check(found[0][0], expected)
    assert list(tmp_path.iterdir()) == []


def test_sums_that_overlap_count_once() -> None:
    def sums(*places: int, complete: bool = False) -> tuple[bool, torch.Tensor]:
        return complete, torch.tensor(places, dtype=torch.int64)

    stored = [[sums(0, 1)], [sums(0, 1, 4, 5), sums(2)], [sums(2, 3, 7)], []]
    assert chosen_sums(stored, 9) == ([(1, 0), (2, 0)], False)
    assert chosen_sums([[sums(1)], [sums(3, complete=True)]], 9) == ([(1, 0)], True)
    assert chosen_sums([[], []], 9) == ([], False)
