"""Directional profiles: one batch's eigenvectors, measured on that batch and on other data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from laplace_debiased.checks import checked_number
from laplace_debiased.diagnostics.eigen import top_eigenpairs
from laplace_debiased.diagnostics.estimates import DirectionalQuadratic
from laplace_debiased.diagnostics.measure import Derivatives, directional_quadratic
from laplace_debiased.diagnostics.network import check_data
from laplace_debiased.diagnostics.plots import new_figure, plot_quadratics
from laplace_debiased.diagnostics.summary import BiasSummary, summarise
from laplace_debiased.network.modes import public_call
from laplace_debiased.options import parse_choice

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class DirectionalProfile:
    r"""The quadratic ℓ(θ) + gᵀx + ½ xᵀCx along k directions, as three sets of data see it.

    The directions are one batch's own top eigenvectors (or any others), each oriented so that its
    slope on that batch is not negative: without an orientation a slope's sign would mean nothing.

    Attributes:
        own: slopes and curvatures [k] on the batch that chose the directions, per-sample means.
            Given the directions they are exact, so their covariance is not an error.
        other: the same on another batch.
        reference: the same on reference data, such as the training set; None without.
        directions: the directions [P, k] as columns; None where they are not dense.
        parameters_along: uᵀθ [k], float64, for the weight decay's slope; None where not given.
        weight_decay: δ of the term ½ δ‖θ‖² that is in all three quadratics.
    """

    own: DirectionalQuadratic
    other: DirectionalQuadratic
    reference: DirectionalQuadratic | None
    directions: Tensor | None = None
    parameters_along: Tensor | None = None
    weight_decay: float = 0.0

    @classmethod
    def of(
        cls,
        own: DirectionalQuadratic,
        other: DirectionalQuadratic,
        reference: DirectionalQuadratic | None = None,
        directions: Tensor | None = None,
        parameters_along: Tensor | None = None,
    ) -> DirectionalProfile:
        """A profile of what was measured along any directions; the arguments are the attributes.

        Raises:
            ValueError: if the three disagree about the number of directions.
        """
        for role, quadratic in (("other", other), ("reference", reference)):
            if quadratic is not None and quadratic.n_directions != own.n_directions:
                raise ValueError(
                    f"own measured {own.n_directions} directions but {role} measured "
                    f"{quadratic.n_directions}; all must measure the same ones in the same order."
                )
        signs = torch.where(own.slope.mean < 0, -1.0, 1.0)
        if parameters_along is not None:
            parameters_along = parameters_along.detach().to("cpu", torch.float64) * signs
        return cls(
            own.oriented(signs),
            other.oriented(signs),
            None if reference is None else reference.oriented(signs),
            None if directions is None else directions * signs.to(directions),
            parameters_along,
        )

    @property
    def n_directions(self) -> int:
        """Number of directions k."""
        return self.own.n_directions

    def with_weight_decay(self, weight_decay: float) -> DirectionalProfile:
        """The same profile with ½ δ‖θ‖² in the quadratics instead: slopes + δuᵀθ, curvatures + δ.

        The eigenvectors of C and C + δI are the same, so nothing is measured again.

        Args:
            weight_decay: δ ≥ 0; 0 leaves the data's part alone.

        Raises:
            ValueError: if it is negative or not finite, or the profile holds no uᵀθ.
        """
        change = checked_number("weight_decay", weight_decay) - self.weight_decay
        if change == 0.0:
            return self
        if self.parameters_along is None:
            raise ValueError(
                "this profile does not hold the parameters along its directions; give "
                "parameters_along to DirectionalProfile.of."
            )
        along = self.parameters_along

        def decayed(quadratic: DirectionalQuadratic) -> DirectionalQuadratic:
            return DirectionalQuadratic(
                quadratic.slope.shifted(change * along),
                quadratic.curvature.shifted(torch.full_like(along, change)),
            )

        return replace(
            self,
            own=decayed(self.own),
            other=decayed(self.other),
            reference=None if self.reference is None else decayed(self.reference),
            weight_decay=weight_decay,
        )

    def summary(self, n_groups: int = 10) -> BiasSummary:
        """Bias ratios per decile of the directions (by rank), with standard errors.

        Args:
            n_groups: number of groups of neighbouring ranks; fewer if there are fewer directions.
        """
        return summarise(self.own, self.other, self.reference, n_groups)

    def plot(self, axes: tuple[Axes, Axes] | None = None) -> Figure:
        """Slopes and curvatures by rank (paper, Figure 2), into ``axes`` or a new figure."""
        return plot_quadratics((self.own, self.other, self.reference), axes)


def plot_profiles(profiles: Mapping[str, DirectionalProfile]) -> Figure:
    """Several profiles side by side, one column each, titled by their keys; nothing is shown.

    Raises:
        ValueError: if there are none.
    """
    if not profiles:
        raise ValueError("profiles is empty; give at least one titled profile.")
    figure = new_figure(0.6 + 4.6 * len(profiles), 5.4)
    grid = figure.subplots(2, len(profiles), squeeze=False, sharex="col")
    for column, (title, profile) in enumerate(profiles.items()):
        upper, lower = grid[:, column]
        profile.plot((upper, lower))
        upper.set_title(title, fontsize="medium")
        if column:
            upper.set_ylabel("")
            lower.set_ylabel("")
            upper.get_legend().remove()
    return figure


@public_call
def directional_profile(
    model: nn.Module,
    likelihood: str,
    batch: object,
    other_batch: object,
    reference_loader: Iterable[object] | None = None,
    k: int = 100,
    *,
    matrix: str = "ggn",
    solver: str = "auto",
    derivatives: str = "auto",
    seed: int = 0,
    dict_key_y: str = "labels",
    progress_bar: bool = False,
) -> DirectionalProfile:
    r"""Slopes and curvatures along a batch's top eigenvectors, on it, another batch, and reference.

    The mini-batch bias of Tatzel et al. (ICLR 2025, Section 3 and Figure 2): along the directions
    that one batch chose, that batch's curvature is too large at the top and its slopes are too
    steep; another batch's are right in the mean.

    Args:
        model: trained network; evaluation mode inside, everything restored after. Directions are
            in the space of its trainable parameters.
        likelihood: "classification" (cross-entropy) or "regression" (½ squared error, summed over
            outputs: unit noise).
        batch: the batch that chooses the directions: (inputs, targets), or a mapping.
        other_batch: a batch without any sample of the first.
        reference_loader: batches that stand for the population; each walked once. Samples that it
            shares with ``batch`` pull it towards that batch, by their share.
        k: number of top eigenvectors; fewer where the batch's matrix has fewer that are not zero.
        matrix: "ggn" or "hessian".
        solver: "auto", "gram", "lanczos" or "dense", see `top_eigenpairs`.
        derivatives: "auto", "forward" or "reverse", see `Derivatives`.
        seed: for Lanczos' starting vector.
        dict_key_y: key of the targets where a batch is a mapping.
        progress_bar: show one per stage.

    Returns:
        Per-sample means in nats along unit directions; `DirectionalProfile.with_weight_decay` adds
        ½ δ‖θ‖² at no cost.

    Raises:
        ValueError: for a bad option, an empty batch, or targets that do not fit.
        NumericalError: for outputs or parameters that are not finite, a curvature that vanishes,
            or if Lanczos does not converge.
        TypeError: for a batch of an unknown type.
        RuntimeError: if the model cannot be vectorised.
    """
    # What is wrong is said before anything is computed.
    parse_choice(Derivatives, derivatives, "derivatives")
    check_data(batch, other_batch, reference_loader, dict_key_y)
    pairs = top_eigenpairs(
        model,
        likelihood,
        batch,
        k,
        matrix=matrix,
        solver=solver,
        seed=seed,
        dict_key_y=dict_key_y,
        progress_bar=progress_bar,
    )

    along = partial(
        directional_quadratic,
        model,
        likelihood,
        directions=pairs.vectors,
        matrix=matrix,
        derivatives=derivatives,
        dict_key_y=dict_key_y,
        progress_bar=progress_bar,
    )
    parameters = [p.detach().flatten() for p in model.parameters() if p.requires_grad]
    return DirectionalProfile.of(
        along([batch]),
        along([other_batch]),
        None if reference_loader is None else along(reference_loader),
        pairs.vectors,
        pairs.vectors.T @ torch.cat(parameters).to(pairs.vectors),
    )
