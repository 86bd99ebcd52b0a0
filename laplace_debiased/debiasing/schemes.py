"""Which folds give the directions of which eigenbasis, and which are measured along it."""

from __future__ import annotations

from dataclasses import dataclass

from laplace_debiased.options import Scheme


@dataclass(frozen=True)
class Measurement:
    """One eigenbasis that is measured.

    Attributes:
        direction_folds: folds whose factors give the eigenbasis.
        magnitude_folds: folds along which curvature is measured.
        share: weight of this measurement in the joined magnitudes; the shares sum to 1.
    """

    direction_folds: tuple[int, ...]
    magnitude_folds: tuple[int, ...]
    share: float


@dataclass(frozen=True)
class SchemePlan:
    """What a scheme does with its folds.

    Attributes:
        measurements: the eigenbases that are measured, and on what.
        posterior_folds: folds whose factors give the posterior's own eigenbasis.
    """

    measurements: tuple[Measurement, ...]
    posterior_folds: tuple[int, ...]

    @property
    def posterior_basis_is_measured(self) -> bool:
        """Whether the only measured eigenbasis is the posterior's."""
        return (
            len(self.measurements) == 1
            and self.measurements[0].direction_folds == self.posterior_folds
        )


def scheme_plan(scheme: Scheme, fold_sizes: tuple[int, ...]) -> SchemePlan:
    """The measurements of a scheme.

    * ``single``: one fold gives directions and magnitudes.
    * ``two_batch``: fold 0 gives the directions, fold 1 the magnitudes.
    * ``cross_fit``: each fold is measured along the directions of all others, once per sample;
      its share is its share of the samples; the posterior's directions come from all folds.
    """
    folds = tuple(range(len(fold_sizes)))
    match scheme:
        case Scheme.SINGLE:
            return SchemePlan((Measurement(folds, folds, 1.0),), folds)
        case Scheme.TWO_BATCH:
            return SchemePlan((Measurement((0,), (1,), 1.0),), (0,))
        case Scheme.CROSS_FIT:
            total = sum(fold_sizes)
            return SchemePlan(
                tuple(
                    Measurement(tuple(j for j in folds if j != k), (k,), fold_sizes[k] / total)
                    for k in folds
                ),
                folds,
            )
