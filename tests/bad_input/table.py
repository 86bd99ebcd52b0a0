"""The documentation's table, from the rows: ``python -m tests.bad_input.table`` writes it."""

from __future__ import annotations

from pathlib import Path

from tests.bad_input.rows import AREAS, ELSEWHERE, all_rows

PAGE = Path(__file__).parents[2] / "docs" / "bad-input.md"
HEAD = """# Bad input

What a wrong argument, model, loader or batch raises, and what the message names besides saying what
to do. Every row is a test (`tests/bad_input`), and this page is made from those tests
(`python -m tests.bad_input.table`).

In every row the posterior that was fitted before (its curvature, mean, prior and hyper-parameters),
the model (weights, gradients, `requires_grad`, modes, hooks) and the random number generators are
as they were; nothing ends the process, and nothing passes in silence. `NotFittedError`,
`NumericalError`, `CoverageError`, `ModelCallError` and `ModelChangedError` are in
`laplace_debiased.errors`, and each is a `ValueError` too. An exception of the user's own loader or
loss passes through as it is.
"""
LABELS = {"sequence": "sequences"}


def page() -> str:
    """The whole page."""
    rows = all_rows()
    parts = [HEAD]
    for area in AREAS:
        parts.append(f"\n## {area}\n\n| input | exception | the message names |\n|---|---|---|\n")
        for row in rows:
            if row.area == area:
                parts.append(_line(row.input, row.error, row.names))
    parts.append("\n## After the fit\n\n")
    parts.append("| input | exception | the message names | test |\n|---|---|---|---|\n")
    parts += [
        f"| {one.input} | {one.error} | {', '.join(one.names)} | `{one.test}` |\n"
        for one in ELSEWHERE
    ]
    parts.append(TAIL)
    return "".join(parts)


TAIL = """
## What is not noticed

* After the fit, an entry of a weight that is written through `.data` or a numpy view without
  touching the largest one of its tensor (`with torch.no_grad(): weight[...] = value` is noticed);
  a hook, a function or an attribute that changes no output of one sample of the fit by more than
  1e-3 of the largest; what lies deeper in an attribute than the entries of a list or dictionary.
  Call `fit` again after such a change.
* Where a file is loaded: what changes no output of the one sample in it by more than 1e-3 of the
  largest. The sample is made up, since a file must hold no data: real entries are drawn with the
  mean and deviation of the first batch, integers are its smallest, flags are set. There is none
  where the model refuses it or takes more than tensors, nor on a GPU where whole numbers among
  real ones, or negative integers, may be indices.
* Samples that a model mixes only in batches of more than 16, or only some of them: the first and
  the last of a batch are looked at.
* Labels of a causal language model that come as pairs `(batch, labels)` are taken as they are. This
  is the choice: `NextTokenLabels` around the loader's `collate_fn` shifts those of mappings, for
  every call alike; pairs say that each position predicts its own token.
* A parameter that a scripted function or another library's C++ code reads keeps its trained value
  in sampled networks: torch functions do not see it. Scripted modules are refused.
* Outputs of very different scale under `sigma_noise="residual"`: the one σ is that of the largest.
  Standardise the targets first.
* `n_data=1` is no mistake: curvature and losses are then per-sample means.
"""


def _line(input: str, error: str, names: tuple[str, ...]) -> str:
    shown = ", ".join(f"`{name}`" for name in names)
    return f"| {input} | `{error}` | {shown} |\n".replace("|`", "| `")


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page())
