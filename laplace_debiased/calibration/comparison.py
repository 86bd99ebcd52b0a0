"""What a comparison of posteriors and baselines found: a table, plots, plain numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from laplace_debiased.calibration.batches import FloatArray
from laplace_debiased.calibration.evaluation import Evaluation
from laplace_debiased.calibration.reliability import ReliabilityBins

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = (
    ("NLL", "nll", 4, 1.0),
    ("ECE %", "ece", 2, 100.0),
    ("adaptive ECE %", "adaptive_ece", 2, 100.0),
    ("Brier", "brier", 4, 1.0),
    ("accuracy %", "accuracy", 2, 100.0),
    ("AURC %", "aurc", 2, 100.0),
    ("AUROC", "auroc", 3, 1.0),
    ("FPR95", "fpr95", 3, 1.0),
    ("AUROC, MI", "auroc_information", 3, 1.0),
    ("FPR95, MI", "fpr95_information", 3, 1.0),
)
"""Head, field of an evaluation, digits and factor; a column that no row has is left out."""


@dataclass(frozen=True, eq=False)
class ComparedRow:
    """One way to predict.

    Attributes:
        key: "map", "temperature", "prior_only", "last_layer" or "posterior".
        name: what the table calls it.
        evaluation: its scores.
        nlls: negative log-likelihood of every sample [n], in nats.
        risk: share of errors among the k most confident predictions, k = 1 to n.
        settings: what was chosen for it on validation data.
        interval: 95 % bootstrap interval of its NLL minus temperature scaling's, over the same
            samples; None for temperature scaling itself.
    """

    key: str
    name: str
    evaluation: Evaluation
    nlls: FloatArray
    risk: FloatArray
    settings: Mapping[str, float | str]
    interval: tuple[float, float] | None = None


@dataclass(frozen=True, eq=False, repr=False)
class Comparison:
    """Baselines and posteriors on the same test data.

    Attributes:
        rows: one for every way to predict.
    """

    rows: tuple[ComparedRow, ...]

    def __getitem__(self, key: str) -> ComparedRow:
        """The row of a key.

        Raises:
            KeyError: if there is none.
        """
        return {row.key: row for row in self.rows}[key]

    @property
    def table(self) -> str:
        """One row for every way to predict, in Markdown, aligned."""
        scores = {row.key: row.evaluation.to_dict() for row in self.rows}

        def cell(row: ComparedRow, field: str, digits: int, factor: float) -> str:
            value = scores[row.key][field]
            return "–" if value is None else f"{factor * value:.{digits}f}"

        shown = [c for c in COLUMNS[1:] if any(s[c[1]] is not None for s in scores.values())]
        head = ["", "NLL", "against temperature scaling", *(column[0] for column in shown)]
        body = [
            [
                row.name,
                cell(row, *COLUMNS[0][1:]),
                "–"
                if row.interval is None
                else f"{self._gain(row):+.4f} [{row.interval[0]:+.4f}, {row.interval[1]:+.4f}]",
                *(cell(row, *column[1:]) for column in shown),
            ]
            for row in self.rows
        ]
        widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
        rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
        return "\n".join(
            "| "
            + " | ".join([cells[0].ljust(widths[0]), *map(str.rjust, cells[1:], widths[1:])])
            + " |"
            for cells in (head, rule, *body)
        )

    def _gain(self, row: ComparedRow) -> float:
        return row.evaluation.nll - self["temperature"].evaluation.nll

    def __repr__(self) -> str:
        return f"{self.table}\n{self.legend}"

    @property
    def legend(self) -> str:
        """What the columns mean, and what was chosen on validation data."""
        n = self.rows[0].evaluation.n_samples
        outside = self.rows[0].evaluation.n_ood_samples
        text = [
            f"{n} test samples; NLL in nats; in brackets 95 % bootstrap intervals over them.",
            f"ECE with {self.rows[0].evaluation.n_bins} bins; AURC: area under risk-coverage.",
        ]
        if outside:
            text.append(
                f"AUROC and FPR95 against {outside} other inputs, by entropy and by "
                "mutual information (MI)."
            )
        for row in self.rows:
            if row.settings:
                chosen = (
                    f"{k} {v if isinstance(v, str) else f'{v:.3g}'}"
                    for k, v in row.settings.items()
                )
                text.append(f"{row.name}: {', '.join(chosen)}.")
        return "\n".join(text)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """All numbers as plain values, by row."""
        return {
            row.key: {
                **row.evaluation.to_dict(),
                "nll_difference": None if row.interval is None else self._gain(row),
                "nll_difference_interval": None if row.interval is None else list(row.interval),
                "settings": dict(row.settings),
            }
            for row in self.rows
        }

    def plot(self) -> Figure:
        """Reliability and risk-coverage of all rows, side by side.

        Returns:
            The figure; save it with `savefig`. No pyplot state is touched.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(10.0, 4.4), dpi=120, layout="constrained")
        left, right = figure.subplots(1, 2)
        left.plot([0, 1], [0, 1], color="0.6", linestyle="--", linewidth=1)
        for row in self.rows:
            bins = row.evaluation.curve
            assert isinstance(bins, ReliabilityBins)
            left.plot(bins.confidence, bins.accuracy, marker="o", markersize=3, label=row.name)
            n = len(row.risk)
            right.plot(np.arange(1, n + 1) / n, 100 * row.risk, linewidth=1.2, label=row.name)
        left.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="accuracy")
        left.set_title("Reliability")
        left.legend(frameon=False, fontsize="small")
        right.set(xlim=(0, 1), xlabel="coverage (most confident first)", ylabel="errors (%)")
        right.set_ylim(bottom=0)
        right.set_title("Risk against coverage")
        for axis in (left, right):
            axis.spines[["top", "right"]].set_visible(False)
        return figure
