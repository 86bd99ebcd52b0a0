"""Scores of the outcomes benchmark as Markdown, JSON and a figure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.common.tables import table
from benchmarks.outcomes.methods import BASELINES, Outcome
from benchmarks.outcomes.problems import Problem
from laplace_debiased.calibration import Evaluation, metrics
from laplace_debiased.calibration.asking import classified, unlabelled
from laplace_debiased.calibration.comparison import COLUMNS
from laplace_debiased.calibration.evaluation import score_classification
from laplace_debiased.calibration.predictions import ClassPredictions


class _Labels:
    """What says how labels are to be read."""

    likelihood = "classification"


@dataclass(frozen=True, eq=False)
class Row:
    """One way to predict.

    Attributes:
        name: of the row.
        scores: by set.
        interval: 95 % bootstrap interval of NLL minus temperature scaling's on the clean images.
        chosen: settings of the two halves.
        seconds: of the fit and the choices.
    """

    name: str
    scores: dict[str, Evaluation]
    interval: tuple[float, float] | None
    chosen: list[dict[str, float]]
    seconds: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        scores = {name: score.to_dict() for name, score in self.scores.items()}
        return {
            "name": self.name,
            "scores": scores,
            "interval": self.interval,
            "chosen": self.chosen,
            "seconds": self.seconds,
        }


def rows_of(problem: Problem, outcomes: Sequence[Outcome]) -> list[Row]:
    """Score all rows of all methods against the temperature scaling of the first of them."""
    baseline = _clean(outcomes[0], BASELINES["temperature"]).nll
    rows = []
    for outcome in outcomes:
        for name in outcome.answers:
            nll = _clean(outcome, name).nll
            same = name == BASELINES["temperature"]
            interval = None if same else metrics.paired_interval(nll, baseline, 0)
            scores = _scores(problem, outcome, name)
            rows.append(Row(name, scores, interval, outcome.chosen, outcome.seconds))
    return rows


def _clean(outcome: Outcome, name: str) -> ClassPredictions:
    return classified(_Labels(), outcome.answers[name]["clean"], outcome.labels)


def _scores(problem: Problem, outcome: Outcome, name: str) -> dict[str, Evaluation]:
    answers = outcome.answers[name]
    outside = unlabelled(answers["outside"])
    return {
        part: score_classification(
            classified(_Labels(), answers[part], outcome.labels),
            outside if part == "clean" else None,
            15,
        )
        for part in problem.sets
    }


def markdown(problem: Problem, rows: Sequence[Row]) -> str:
    """Tables of one problem, with what has to be known to read them."""
    parts = [f"## {problem.title}", _how(problem), _table(rows)]
    shifts = [name for name in problem.sets if name != "clean"]
    head = ["", *(f"{name}: {what}" for name in shifts for what in ("NLL", "ECE %", "AURC %"))]
    body = [
        [row.name, *(cell for name in shifts for cell in _cells(row.scores[name]))] for row in rows
    ]
    parts.append(table(head, body))
    if problem.published:
        head = ["published, all 10,000 test images", "NLL", "ECE %", "s (GPU, ResNet-20)"]
        body = [
            [name, f"{nll:.4f}", f"{100 * ece:.2f}", "–" if s is None else f"{s:.0f}"]
            for name, nll, ece, s in problem.published
        ]
        parts.append(table(head, body))
        parts.append("Published: Ludvins/FixedMeanGaussianProcesses, results.")
    parts.append(_verdict(rows))
    return "\n\n".join(parts)


def _how(problem: Problem) -> str:
    return (
        f"{problem.about} Priors, temperatures and links are chosen on one half of the test images "
        "for the other half, and the two halves of predictions are scored together. In brackets: "
        "95 % bootstrap interval of the difference in NLL to temperature scaling over the same "
        "images. AUROC and FPR95 by entropy, and by mutual information (MI)."
    )


def _table(rows: Sequence[Row]) -> str:
    baseline = next(r for r in rows if r.name == BASELINES["temperature"]).scores["clean"].nll
    head = ["", "NLL", "against temperature scaling", *(h[0] for h in COLUMNS[1:])]
    head += ["prior", "fit, s", "choice, s"]
    body = []
    for row in rows:
        numbers = row.scores["clean"].to_dict()
        cells = [
            "–" if (value := numbers[field]) is None else f"{factor * value:.{digits}f}"
            for _, field, digits, factor in COLUMNS
        ]
        difference = "–"
        if row.interval is not None:
            low, high = row.interval
            difference = f"{numbers['nll'] - baseline:+.4f} [{low:+.4f}, {high:+.4f}]"
        priors = "–"
        if row.name not in list(BASELINES.values())[:2]:
            key = "prior only" if row.name == BASELINES["prior_only"] else "prior"
            known = [chosen[key] for chosen in row.chosen if key in chosen]
            if row.name != BASELINES["last_layer"]:
                priors = " / ".join(f"{value:.2g}" for value in known)
        body.append(
            [
                row.name,
                cells[0],
                difference,
                *cells[1:],
                priors,
                f"{row.seconds['fit']:.1f}",
                f"{row.seconds['choice']:.1f}",
            ]
        )
    return table(head, body)


def _cells(score: Evaluation) -> list[str]:
    return [f"{score.nll:.4f}", f"{100 * (score.ece or 0.0):.2f}", f"{100 * (score.aurc or 0):.2f}"]


def _verdict(rows: Sequence[Row]) -> str:
    """Whether curvature matters here, in one sentence."""
    by_name = {row.name: row.scores["clean"].nll for row in rows}
    ours, alone = by_name[BASELINES["posterior"]], by_name[BASELINES["prior_only"]]
    if abs(ours - alone) < 0.005:
        return (
            f"Curvature hardly matters here: the prior alone, without any, has an NLL of "
            f"{alone:.4f} beside {ours:.4f}. Where a network fits its training data closely, the "
            "tuned prior dominates; what counts is the right prior and the exact integral."
        )
    better = "better" if ours < alone else "worse"
    return f"Curvature matters here: {ours:.4f} with it, {alone:.4f} without; {better} with it."


def figure(problem: Problem, rows: Sequence[Row]) -> Figure:
    """NLL and ECE of all rows, on every set."""
    drawn = Figure(figsize=(11.0, 0.42 * len(rows) + 1.6), layout="constrained")
    left, right = drawn.subplots(1, 2, sharey=True)
    names = [row.name for row in rows]
    for name in problem.sets:
        nll = [row.scores[name].nll for row in rows]
        ece = [100 * (row.scores[name].ece or 0.0) for row in rows]
        left.plot(nll, names, "o", label=name)
        right.plot(ece, names, "o", label=name)
    left.set(xlabel="NLL (nats)")
    right.set(xlabel="ECE (%)")
    left.invert_yaxis()
    right.legend(frameon=False)
    for axis in (left, right):
        axis.grid(True, axis="x", color="0.92")
        axis.spines[["top", "right"]].set_visible(False)
    drawn.suptitle(problem.title)
    return drawn


def write(folder: Path, name: str, text: str, results: dict[str, Any], drawn: Figure) -> None:
    """Write ``<name>``.md, .json and .png."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.md").write_text(f"{text}\n\n![{name}]({name}.png)\n")
    (folder / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
    drawn.savefig(folder / f"{name}.png", dpi=110)
