"""The demo's tables, for a terminal and in Markdown, and its numbers as JSON."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from laplace_debiased.demo.data import (
    HEAVY_NOISE_STD,
    HELD_OUT_DIGITS,
    ROTATION_DEGREES,
    SENSOR_NOISE_STD,
)
from laplace_debiased.demo.posteriors import LOG10_PRIOR_MAX, LOG10_PRIOR_MIN, N_PRIORS
from laplace_debiased.demo.results import FIXED_PRIOR, Comparison, Row


@dataclass(frozen=True)
class Column:
    """One column: its heading, its metric, and how a number is written."""

    head: str
    metric: str
    digits: int
    scale: float = 1.0

    def cell(self, row: Row) -> str:
        """Mean, with its standard error where there are several draws."""
        summary = row.summary(self.metric)
        if summary is None:
            return "–"
        mean, error = summary
        text = f"{self.scale * mean:.{self.digits}f}"
        return text if error is None else f"{text}±{self.scale * error:.{self.digits}f}"


@dataclass(frozen=True)
class Table:
    """A titled table."""

    title: str
    columns: tuple[Column, ...]

    def text(self, comparison: Comparison) -> str:
        """Aligned for a terminal."""
        head, methods, references = self._cells(comparison)
        widths = [max(map(len, column)) for column in zip(head, *methods, *references, strict=True)]
        line = "─" * (sum(widths) + 2 * (len(widths) - 1))

        def written(cells: list[str]) -> str:
            first, *others = zip(cells, widths, strict=True)
            return "  ".join([first[0].ljust(first[1]), *(c.rjust(w) for c, w in others)])

        parts = [[self.title, line, written(head), line], map(written, methods), [line]]
        return "\n".join([*(t for part in parts for t in part), *map(written, references), line])

    def markdown(self, comparison: Comparison) -> str:
        """For a Markdown file."""
        head, methods, references = self._cells(comparison)
        rule = ["---", *["---:"] * len(self.columns)]
        body = [f"| {' | '.join(cells)} |" for cells in (head, rule, *methods, *references)]
        return "\n".join([f"## {self.title}", "", *body])

    def _cells(self, comparison: Comparison) -> tuple[list[str], list[list[str]], list[list[str]]]:
        methods, references = (
            [[row.name, *(column.cell(row) for column in self.columns)] for row in rows]
            for rows in (comparison.rows, comparison.references)
        )
        return ["", *(column.head for column in self.columns)], methods, references


def tables(comparison: Comparison) -> tuple[Table, ...]:
    """Predictions, predictions under shift, and distances from the full-data posteriors."""
    tuned = f"{comparison.tuned_prior:.3g}"
    fixed = f"{FIXED_PRIOR:.3g}"
    return (
        Table(
            "Clean test split",
            (
                Column("NLL", "clean/nll", 4),
                Column("ECE %", "clean/ece", 1, 100.0),
                Column("Brier", "clean/brier", 4),
                Column("accuracy %", "clean/accuracy", 1, 100.0),
                Column("AUROC", "clean/auroc", 3),
                Column("KL to full data", "kl/kron@1", 2, 1e3),
                Column("seconds", "seconds", 1),
            ),
        ),
        Table(
            "Shifted test splits",
            tuple(
                Column(f"{split} {head}", f"{split}/{metric}", digits, scale)
                for split in ("noisy", "rotated")
                for head, metric, digits, scale in (
                    ("NLL", "nll", 3, 1.0),
                    ("ECE %", "ece", 1, 100.0),
                    ("Brier", "brier", 3, 1.0),
                )
            ),
        ),
        Table(
            "KL to the predictives of full-data posteriors, 1e-3 nats, by prior precision δ",
            (
                Column(f"Kronecker, δ={fixed}", "kl/kron@1", 2, 1e3),
                Column(f"dense, δ={fixed}", "kl/dense@1", 2, 1e3),
                Column(f"Kronecker, δ={tuned}", "kl/kron@tuned", 2, 1e3),
                Column(f"dense, δ={tuned}", "kl/dense@tuned", 2, 1e3),
                Column("tuned log10 δ", "log10_prior_precision", 1),
            ),
        ),
    )


def notes(comparison: Comparison) -> Iterator[str]:
    """What has to be known to read the tables."""
    m, n = comparison.n_samples, comparison.n_data
    held_out = " and ".join(map(str, HELD_OUT_DIGITS))
    yield (
        f"A CNN of {comparison.n_params} parameters, over-trained on {n} digits 0 to 7 under "
        f"pixel noise (std {SENSOR_NOISE_STD:g} of 16 grey levels) so that it is over-confident. "
        f"noisy: std {HEAVY_NOISE_STD:g}. rotated: by {ROTATION_DEGREES:g} degrees to either "
        f"side. AUROC: entropy separates the clean split from digits {held_out}, never seen in "
        "training."
    )
    n_draws = max(len(row.draws) for row in comparison.rows)
    draws = f"{n_draws} draws" if n_draws > 1 else "one draw"
    yield (
        f"Rows with {m} use curvature from {m} of {n} training samples: mean ± standard error over "
        f"{draws} of the samples, for one network. All rows share the samples but ours by default, "
        "which draws in proportion to curvature (one forward pass over the training data). NLL in "
        "nats, mean over images."
    )
    yield (
        "Every prior precision (and the temperature) is chosen by validation NLL; priors from the "
        f"same {N_PRIORS} points between 1e{LOG10_PRIOR_MIN} and 1e{LOG10_PRIOR_MAX}. "
        "laplace-torch's own grid search averages the losses of different grid points, so a "
        "plain search with one pass of Jacobians stands in for it."
    )
    yield (
        f"'laplace-torch, {m}' is what a Subset of {m} samples gives: a posterior scaled to "
        f"{m} data in place of {n}. The next row has its curvature scaled to {n}."
    )
    yield (
        "KL: of each row's predictive from the full-data one, KL(full data ‖ row), in 1e-3 nats, "
        "mean over clean test images, at one prior precision for all rows, before any tuning "
        f"(first table: Kronecker, δ={FIXED_PRIOR:g}). Kronecker: our posterior with exact "
        "magnitudes on all training data. dense: laplace-torch's FullLaplace, which assumes no "
        "structure; against it the Kronecker approximation's own error can mask or cancel the "
        f"mini-batch error. δ={comparison.tuned_prior:.3g} is the tuned prior of the Kronecker "
        "reference."
    )
    yield "seconds: fit, tuning and prediction of the clean test split."
    edge = [row.name for row in (*comparison.rows, *comparison.references) if _on_edge(row)]
    if edge:
        yield f"Tuned to an end of the grid in some draw: {'; '.join(edge)}."


def as_dict(comparison: Comparison, settings: dict[str, Any]) -> dict[str, Any]:
    """Everything as plain numbers: per metric the values of all draws, mean, standard error."""
    return {
        "settings": {
            **settings,
            "n_data": comparison.n_data,
            "n_params": comparison.n_params,
            "reference_prior_precision": comparison.tuned_prior,
        },
        "rows": [_row_as_dict(row) for row in comparison.rows],
        "references": [_row_as_dict(row) for row in comparison.references],
    }


def _row_as_dict(row: Row) -> dict[str, Any]:
    metrics: dict[str, Any] = {}
    for name in row.draws[0].metrics():
        summary = row.summary(name)
        assert summary is not None
        metrics[name] = {"mean": summary[0], "stderr": summary[1], "draws": row.values(name)}
    return {"key": row.key, "name": row.name, "metrics": metrics}


def _on_edge(row: Row) -> bool:
    inside = (LOG10_PRIOR_MIN + 1e-3, LOG10_PRIOR_MAX - 1e-3)
    return any(not inside[0] < v < inside[1] for v in row.values("log10_prior_precision"))
