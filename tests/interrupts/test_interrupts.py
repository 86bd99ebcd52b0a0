"""However a call is interrupted, the model and the posterior are as they were."""

from __future__ import annotations

import os
import subprocess
import sys

INTERRUPTS = int(os.environ.get("LAPLACE_DEBIASED_INTERRUPTS", "200"))


def test_no_interrupt_leaves_anything_behind() -> None:
    """Half of the interrupts are followed by a second one, while the first is cleaned up after."""
    command = [sys.executable, "-m", "tests.interrupts", str(INTERRUPTS)]
    found = subprocess.run(
        command, capture_output=True, text=True, timeout=60 + 2 * INTERRUPTS, check=False
    )
    assert found.returncode == 0, found.stdout + found.stderr[-4000:]
