"""Tables and figures of the fidelity benchmark."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.fidelity.measure import Row


def markdown(rows: Sequence[Row], priors: Sequence[float], reference: str) -> str:
    """A table of mean ± 95 % interval (median; worst) in 1e-3 nats, per prior."""
    heads = " | ".join(f"prior {prior:g}" for prior in priors)
    lines = [f"| m | method | {heads} | s |", "|---|---" + "|---" * len(priors) + "|---|"]
    for row in rows:
        cells = []
        for index in range(len(priors)):
            s = row.summary(reference, index)
            spread = f" ± {s['interval']:.2g} ({s['median']:.3g}; {s['worst']:.3g})"
            cells.append(f"{s['mean']:.3g}" + ("" if math.isnan(s["interval"]) else spread))
        lines.append(f"| {row.budget} | {row.method} | {' | '.join(cells)} | {row.seconds:.1f} |")
    return "\n".join(lines)


def write(
    folder: Path, name: str, rows: Sequence[Row], priors: Sequence[float], notes: str
) -> None:
    """Write ``name``.md, .json and .png into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    references = list(rows[0].divergences)
    parts = [notes]
    for reference in references:
        parts += [
            f"\nKL from the {reference}, in 1e-3 nats: mean ± 95 % interval (median; worst)\n"
        ]
        parts += [markdown(rows, priors, reference)]
    (folder / f"{name}.md").write_text("\n".join(parts) + "\n")
    payload = {"priors": list(priors), "notes": notes, "rows": [asdict(row) for row in rows]}
    (folder / f"{name}.json").write_text(json.dumps(payload, indent=1))
    figure(rows, priors, references[0]).savefig(folder / f"{name}.png", dpi=130)


def read(folder: Path, name: str) -> list[Row]:
    """The rows that :func:`write` has written, if any."""
    path = folder / f"{name}.json"
    if not path.exists():
        return []
    return [Row(**row) for row in json.loads(path.read_text())["rows"]]


def figure(rows: Sequence[Row], priors: Sequence[float], reference: str) -> Figure:
    """KL against budget, one panel per prior and one line per method."""
    drawn = Figure(figsize=(4.6 * len(priors), 4.4), layout="constrained")
    axes = drawn.subplots(1, len(priors), sharey=True, squeeze=False)[0]
    methods = list(dict.fromkeys(row.method for row in rows))
    for index, (axis, prior) in enumerate(zip(axes, priors, strict=True)):
        for method in methods:
            chosen = [row for row in rows if row.method == method]
            summaries = [row.summary(reference, index) for row in chosen]
            axis.errorbar(
                [row.budget for row in chosen],
                [s["mean"] for s in summaries],
                yerr=[0.0 if math.isnan(s["interval"]) else s["interval"] for s in summaries],
                marker="o",
                markersize=4,
                capsize=2,
                label=method,
            )
        axis.set(xscale="log", yscale="log", title=f"prior precision {prior:g}", xlabel="samples m")
        axis.grid(alpha=0.3, which="both")
    axes[0].set_ylabel(f"KL from the {reference} [1e-3 nats]")
    drawn.legend(
        *axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8, frameon=False
    )
    return drawn
