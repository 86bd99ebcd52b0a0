"""Write the files that later versions must read: ``python -m tests.posterior.make_fixtures``.

Run once per version of states; what is checked in is never written again.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from tests.posterior.cases import INPUTS, STRUCTURES, fitted, network

FOLDER = Path(__file__).parent / "fixtures"


def main(version: int) -> None:
    expected, model = {}, network()
    # The weights too: sines differ in their last digit from machine to machine.
    torch.save(model.state_dict(), FOLDER / f"model_v{version}.pt")
    for structure in STRUCTURES:
        target = FOLDER / f"{structure}_v{version}.pt"
        if target.exists():
            raise SystemExit(f"{target.name} is there already; count STATE_VERSION up.")
        la = fitted(structure, model, scheme="cross_fit", temperature=1.5)
        la.optimize_prior_precision(
            val_loader=[(INPUTS, la(INPUTS).argmax(-1))],
            link_approx="mc",
            grid_size=3,
            n_samples=20,
            log_prior_prec_min=-1,
            log_prior_prec_max=1,
        )
        la.save(target)
        expected[structure] = la(INPUTS[:5], link_approx="probit").tolist()
    (FOLDER / f"expected_v{version}.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    from laplace_debiased.posterior.state import STATE_VERSION

    main(STATE_VERSION)
