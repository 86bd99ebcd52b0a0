"""An interrupted fit goes on to the same posterior to the bit, or says why it cannot."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from laplace.curvature import CurvlinopsGGN
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from laplace_debiased import DebiasedLaplace
from laplace_debiased.curvature.passes import BackwardPass
from laplace_debiased.errors import StoredFileError
from laplace_debiased.estimation import checkpoint as room
from tests.posterior.cases import INPUTS, LABELS, STRUCTURES, assert_equal, loader, network


class Crash(BaseException):
    """The process dies."""


def dying(monkeypatch: pytest.MonkeyPatch, after: int) -> pytest.MonkeyPatch:
    """Die right after the n-th write of a checkpoint."""
    write, written = room.write_record, [0]

    def counted(*args: Any) -> None:
        write(*args)
        written[0] += 1
        if written[0] == after:
            raise Crash

    monkeypatch.setattr(room, "write_record", counted)
    return monkeypatch


def posterior(structure: str = "kron", **options: Any) -> Any:
    subset, hessian = STRUCTURES[structure]
    return DebiasedLaplace(network(), "classification", subset, hessian, **options)


def fit(la: Any, path: Path | None, data: Any = None, **arguments: Any) -> Any:
    """A fit that writes its checkpoint after every batch."""
    la.fit(loader() if data is None else data, checkpoint=path, checkpoint_interval=0, **arguments)
    return la


def interrupted(path: Path, after: int, la: Any, data: Any = None, **arguments: Any) -> None:
    die(path, after, la, data, **arguments)
    assert path.exists()
    assert la.H is None


def die(path: Path, after: int, la: Any, data: Any = None, **arguments: Any) -> None:
    with pytest.MonkeyPatch.context() as patched:
        dying(patched, after)
        with pytest.raises(Crash):
            fit(la, path, data, **arguments)


FITS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "everything": ("kron", {}, {"n_samples": None}),
    "a budget drawn by curvature": ("kron", {}, {"n_samples": 18}),
    "three folds, label draws": ("kron", {"folds": 3, "fisher": "mc"}, {"n_samples": None}),
    "two batches": (
        "kron",
        {"scheme": "two_batch"},
        {"n_samples": 18},
    ),
    "factors alone": ("kron", {"magnitudes": "kfac"}, {"n_samples": None}),
    "one batch": ("kron", {"scheme": "single"}, {"n_samples": 18, "seed": 4}),
    "the last layer": ("kron_last_layer", {}, {"n_samples": None}),
}  # fmt: skip


@pytest.mark.parametrize("name", FITS)
def test_fit_that_died_goes_on_to_the_same_posterior(name: str, tmp_path: Path) -> None:
    structure, options, arguments = FITS[name]
    path = tmp_path / "fit.pt"
    expected = posterior(structure, **options)
    expected.fit(loader(shuffle=True), **arguments)
    for after in (1, 3, 4, 5, 7, 99):
        try:
            interrupted(
                path, after, posterior(structure, **options), loader(shuffle=True), **arguments
            )
        except pytest.fail.Exception:  # the fit has fewer writes than that
            assert after > 5
            break
        la = fit(posterior(structure, **options), path, loader(shuffle=True), **arguments)
        assert_equal(la, expected)
        assert la.effective_sample_size == expected.effective_sample_size
        assert la.loss == expected.loss
        assert os.listdir(tmp_path) == []


def test_fit_that_dies_again_and_again_gets_there(tmp_path: Path) -> None:
    """One more batch per life."""
    path, expected = tmp_path / "fit.pt", posterior()
    expected.fit(loader(), n_samples=None)
    lives = 0
    while True:
        la = posterior()
        try:
            interrupted(path, 1, la, n_samples=None)
        except pytest.fail.Exception:
            break
        lives += 1
    assert lives > 8
    assert_equal(fit(la, None, n_samples=None), expected)


def test_batches_behind_are_not_computed_again(tmp_path: Path, monkeypatch: Any) -> None:
    path = tmp_path / "fit.pt"
    interrupted(path, 8, posterior(), n_samples=None)  # 5 batches and a stage; then 2 of 5
    calls, chunks = [], BackwardPass.chunks
    monkeypatch.setattr(BackwardPass, "chunks", lambda *a, **k: calls.append(1) or chunks(*a, **k))
    fit(posterior(), path, n_samples=None)
    assert len(calls) == 3


class Noisy(Dataset):
    """Augments with torch's global generator."""

    def __len__(self) -> int:
        return 30

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return INPUTS[index] + 0.1 * torch.randn(4).double(), LABELS[index]


def test_augmentations_go_on_where_they_were(tmp_path: Path) -> None:
    path, expected = tmp_path / "fit.pt", posterior()
    data = DataLoader(Noisy(), batch_size=7, shuffle=True)
    expected.fit(data, n_samples=None)
    interrupted(path, 8, posterior(), data, n_samples=None)
    torch.rand(3)
    assert_equal(fit(posterior(), path, data, n_samples=None), expected)


def test_adding_to_a_fit_and_a_magnitude_loader_go_on_too(tmp_path: Path) -> None:
    path, first, second = tmp_path / "fit.pt", posterior(), posterior()
    for la in (first, second):
        la.fit(loader(), n_samples=10)
    first.fit(loader(), n_samples=10, override=False)
    die(path, 2, second, n_samples=10, override=False)
    assert_equal(fit(second, path, n_samples=10, override=False), first)
    batches = list(loader())
    both = {"magnitude_loader": batches[3:], "n_data": 30, "n_samples": None}
    expected = posterior()
    expected.fit(batches[:3], **both)
    interrupted(path, 7, posterior(), batches[:3], **both)
    assert_equal(fit(posterior(), path, batches[:3], **both), expected)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda: (posterior(), loader(), {"seed": 1}), "seed was 0, now it is 1"),
        (lambda: (posterior(), loader(), {"n_samples": 12}), "n_samples was 20"),
        (lambda: (posterior(folds=3), loader(), {}), "folds was 2"),
        (lambda: (posterior("kron_last_layer"), loader(), {}), "last layer was"),
        (lambda: (posterior(), loader(batch_size=6), {}), "data and draws was"),
        (lambda: (posterior(), loader(), {"n_data": 99}), "n_data was None"),
    ],
)
def test_checkpoint_of_another_fit_is_refused_and_kept(
    change: Any, match: str, tmp_path: Path
) -> None:
    path = tmp_path / "fit.pt"
    interrupted(path, 3, posterior(), n_samples=20)
    before = path.read_bytes()
    la, data, arguments = change()
    with pytest.raises(ValueError, match=rf"(?s)another fit: .*{match}.*remove the file"):
        fit(la, path, data, **{"n_samples": 20, **arguments})
    assert path.read_bytes() == before


def test_checkpoint_at_other_weights_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "fit.pt"
    interrupted(path, 3, posterior(), n_samples=None)
    la = posterior()
    with torch.no_grad():
        la.model[0].weight += 1
    with pytest.raises(ValueError, match="model was"):
        fit(la, path, n_samples=None)


class Shuffling:
    """Shuffles by itself, whatever the seeds."""

    def __init__(self) -> None:
        self.order = random.Random(0)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        batches = list(loader())
        self.order.shuffle(batches)
        return iter(batches)


def test_loader_that_shuffles_by_itself_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "fit.pt"
    options = {"scheme": "single", "magnitudes": "kfac"}
    data = Shuffling()
    interrupted(path, 3, posterior(**options), data, n_data=30, n_samples=None)
    with pytest.raises(RuntimeError, match=r"shuffles.*remove the file"):
        fit(posterior(**options), path, data, n_data=30, n_samples=None)


def test_magnitudes_along_another_basis_start_anew(tmp_path: Path, monkeypatch: Any) -> None:
    """Another machine's eigenvectors may have other signs: sums along both would be neither."""
    path, expected = tmp_path / "fit.pt", posterior()
    expected.fit(loader(), n_samples=None)
    interrupted(path, 8, posterior(), n_samples=None)
    record = torch.load(path, weights_only=True)
    walk = record["walks"]["magnitudes"]
    assert walk["position"] == 2
    walk["key"] = "another"
    for sums in walk["sums"]:
        sums["tables"] = {name: 2 * table for name, table in sums["tables"].items()}
    torch.save(record, path)
    assert_equal(fit(posterior(), path, n_samples=None), expected)


def test_impossible_checkpoints_are_named_before_anything_runs(tmp_path: Path) -> None:
    la = posterior()
    for arguments, error, match in [
        ({"checkpoint": tmp_path / "no" / "c.pt"}, FileNotFoundError, "folder"),
        ({"checkpoint": 3}, TypeError, "path"),
        ({"checkpoint": tmp_path / "c.pt", "checkpoint_interval": -1}, ValueError, "0 or more"),
        ({"checkpoint": tmp_path / "c.pt", "checkpoint_interval": "1"}, TypeError, "seconds"),
    ]:
        with pytest.raises(error, match=match):
            la.fit(loader(), **arguments)
    (tmp_path / "c.pt").write_bytes(b"garbage")
    with pytest.raises(StoredFileError, match="checkpoint file"):
        la.fit(loader(), checkpoint=tmp_path / "c.pt")
    backend = posterior(magnitudes="kfac", backend=CurvlinopsGGN)
    with pytest.raises(ValueError, match="drop backend"):
        backend.fit(loader(), checkpoint=tmp_path / "d.pt")


def test_interval_spaces_the_writes(tmp_path: Path, monkeypatch: Any) -> None:
    written = []
    write = room.write_record
    monkeypatch.setattr(room, "write_record", lambda *a: written.append(1) or write(*a))
    posterior().fit(loader(), n_samples=None, checkpoint=tmp_path / "c.pt", checkpoint_interval=1e6)
    assert len(written) == 2  # the end of each walk
    assert os.listdir(tmp_path) == []
