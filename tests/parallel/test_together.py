"""What ranks say to each other: sums, shares, and errors that reach all."""

from __future__ import annotations

import ast
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from laplace_debiased.errors import RankFailedError
from laplace_debiased.parallel import sums as room
from laplace_debiased.parallel.jobs import Job, owners, shared_out
from laplace_debiased.parallel.ranks import Ranks
from laplace_debiased.parallel.sums import assembled, summed
from tests.parallel.cases import Case, loader
from tests.parallel.crowd import Failure, run

CPU = torch.device("cpu")


def everything(rank: int) -> dict[str, Any]:
    """Sums of matrices that fill several messages, gathered rows, shared jobs."""
    ranks = Ranks.present(CPU)
    room.BUCKET_BYTES = 100
    draws = torch.Generator().manual_seed(rank)
    matrices = [torch.randn(*shape, generator=draws).double() for shape in ((5, 5), (2, 3, 3))]
    symmetric = [matrix + matrix.mT for matrix in matrices]
    vectors = [torch.randn(n, generator=draws) for n in (30, 1, 0, 7)]
    given = [symmetric[0], vectors[0], vectors[1], symmetric[1], vectors[2], vectors[3]]
    before = [tensor.clone() for tensor in given]
    sums = summed(ranks, "tensors", given, {0, 3})
    assert all(map(torch.equal, given, before))
    places = ranks.positions(4)
    rows = assembled(ranks, "rows", places.double().unsqueeze(1) * 10, places, 4)
    # A rank's results differ from what the others would find: they are the owner's.
    jobs = [
        Job("a job", float(n), lambda n=n: (torch.full((n, 2), float(rank)), None))
        for n in range(4)
    ]
    results = shared_out(jobs, ranks, "jobs")
    return {
        "given": before,
        "sums": sums,
        "rows": rows,
        "jobs": results,
        "first": ranks.from_first("a value", lambda: [rank, torch.tensor([rank, 7])]),
    }


@pytest.mark.parametrize("world", [1, 2, 3])
def test_sums_rows_and_jobs_of_all_ranks(world: int) -> None:
    found = run(world, everything)
    for theirs in found:
        for sum_of_all, *parts in zip(
            theirs["sums"], *(one["given"] for one in found), strict=True
        ):
            torch.testing.assert_close(sum_of_all, torch.stack(parts).sum(0))
        assert theirs["rows"].tolist() == [[0.0], [10.0], [20.0], [30.0]]
        expected = owners([0.0, 1.0, 2.0, 3.0], world)
        for n, (tensor, nothing) in enumerate(theirs["jobs"]):
            assert nothing is None
            assert torch.equal(tensor, torch.full((n, 2), float(expected[n])))
        assert theirs["first"][0] == 0
        assert theirs["first"][1].tolist() == [0, 7]


def test_costliest_jobs_go_to_the_idlest_rank() -> None:
    assert owners([1.0, 8.0, 1.0, 4.0, 3.0], 2) == [1, 0, 0, 1, 1]
    assert owners([1.0, 2.0], 1) == [0, 0]


def test_one_process_exchanges_nothing() -> None:
    ranks = Ranks.present(CPU)
    assert ranks == Ranks()
    tensor = torch.ones(3)
    assert summed(ranks, "a tensor", [tensor])[0] is tensor
    assert ranks.positions(3).tolist() == [0, 1, 2]
    with pytest.raises(KeyError), ranks.together("a call"):
        raise KeyError


def test_nobody_imports_torch_distributed_before_it_is_needed() -> None:
    """Torch may; of ours only a call on a group that exists does."""
    root = Path(room.__file__).parents[1]
    for path in root.rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [str(node.module)]
            assert not any("distributed" in name for name in names), path


# -- errors ----------------------------------------------------------------------------------


class Bad(torch.utils.data.Dataset):
    """A data set with a sample that cannot be read, or that is NaN."""

    def __init__(self, index: int, how: str) -> None:
        self.data, self.index, self.how = loader().dataset, index, how

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        x, y = self.data[index]
        if index == self.index and self.how == "unreadable":
            raise OSError("disk on fire")
        return x * float("nan") if index == self.index else x, y


def spoilt(rank: int) -> list[Any]:
    """Calls that fail on one rank or on all, one after the other, and one that does not."""
    case = Case(arguments={"n_samples": None})
    la = case.fitted()
    before = la.log_marginal_likelihood()

    def attempt(**given: Any) -> Any:
        la = given.pop("la", None) or case.posterior()
        arguments = {"train_loader": loader(), "n_samples": None, "seed": 0, **given}
        started = time.monotonic()
        try:
            la.fit(**arguments)
        except Exception as error:
            assert time.monotonic() - started < 15
            return Failure(error)
        return None

    def bad(how: str) -> Any:
        return torch.utils.data.DataLoader(Bad(8, how), batch_size=5)

    found = {
        "unreadable": attempt(train_loader=bad("unreadable")),
        "nan": attempt(train_loader=bad("nan"), la=la),
        "a wrong argument on one rank": attempt(n_samples="few" if rank == 1 else None),
        "seed": attempt(seed=rank),
        "n_samples": attempt(n_samples=5 + rank),
        "options": attempt(la=Case(options={"folds": 2 + rank}).posterior()),
        "class": attempt(la=Case("lowrank" if rank else "kron").posterior()),
    }
    other = case.posterior()
    with torch.no_grad():
        other.model[1].weight += 0.1 * rank
    found["weights"] = attempt(la=other)
    found["another data set"] = attempt(train_loader=shifted(rank))
    found["a shorter data set"] = attempt(train_loader=shifted(0, cut=rank))
    found["own streams"] = attempt(train_loader=list(loader())[rank:])
    found["a good one"] = attempt()
    assert torch.equal(la.log_marginal_likelihood(), before)
    return found


def shifted(by: int, cut: int = 0) -> Any:
    x, y = loader().dataset.tensors
    length = len(x) - cut
    data = torch.utils.data.TensorDataset(x.roll(by, 0)[:length], y.roll(by, 0)[:length])
    return torch.utils.data.DataLoader(data, batch_size=5)


def test_an_error_of_one_rank_ends_the_call_on_all() -> None:
    first, second = run(2, spoilt)
    # Sample 8 is in the second batch, which rank 0 alone comes to.
    assert (first["unreadable"].kind, first["unreadable"].message) == ("OSError", "disk on fire")
    assert second["unreadable"].kind == "RankFailedError"
    assert "rank 0 of 2 raised OSError: disk on fire" in second["unreadable"].message
    assert "RankFailedError" in {first["nan"].kind, second["nan"].kind}
    assert second["a wrong argument on one rank"].kind == "ValueError"
    assert "rank 1 of 2 raised ValueError: n_samples" in (
        first["a wrong argument on one rank"].message
    )
    for what, named in {
        "seed": "seed (1, not 0)",
        "n_samples": "n_samples (6, not 5)",
        "options": "folds (3, not 2)",
        "class": "class ('LowRankStructure', not 'KronStructure')",
        "weights": "model (",
        "another data set": "labels of the first batch",
        "a shorter data set": "training set (22, not 23)",
    }.items():
        for theirs in (first, second):
            assert theirs[what].kind == "ValueError", theirs[what].traceback
            assert named in theirs[what].message
            assert "fit needs the same arguments on every rank" in theirs[what].message
    for theirs in (first, second):
        assert "pass n_data" in theirs["own streams"].message
        assert theirs["a good one"] is None


def apart(rank: int) -> str:
    ranks = Ranks.present(CPU)
    with pytest.raises(RankFailedError) as caught, ranks.together(("one", "another")[rank]):
        pass
    return str(caught.value)


def test_ranks_that_make_different_calls_hear_of_it() -> None:
    for theirs in run(2, apart):
        assert "rank 0 is at 'the end of one', rank 1 at 'the end of another'" in theirs
