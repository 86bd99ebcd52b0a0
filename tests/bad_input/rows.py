"""The rows: an input, what it raises, and what the message names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain

from tests.bad_input.world import World


@dataclass(frozen=True)
class Row:
    """One bad input.

    Attributes:
        area: heading in the table.
        input: what is given, for readers.
        act: gives it.
        error: name of the exception's class in ``laplace_debiased.errors`` or the built-ins.
        names: what the message names.
        likelihood: the world that it happens in.
        spoil: changes the model or the data beforehand (by the user, not by us).
    """

    area: str
    input: str
    act: Callable[[World], object]
    error: str
    names: tuple[str, ...]
    likelihood: str = "classification"
    spoil: Callable[[World], object] | None = None

    @property
    def key(self) -> str:
        """Identifier in test reports."""
        return f"{self.area}: {self.input}"


@dataclass(frozen=True)
class TestedElsewhere:
    """A row of the table whose test lies in another file.

    Attributes:
        input: as in ``Row``.
        error: as in ``Row``.
        names: as in ``Row``.
        test: the file, from the root of the repository.
    """

    input: str
    error: str
    names: tuple[str, ...]
    test: str


AREAS = (
    "Model and options",
    "Models that cannot be measured",
    "Training data",
    "Loaders and budgets",
    "Prediction",
    "Tuning",
    "Files and states",
    "Scores, diagnostics and optimisers",
)


def all_rows() -> tuple[Row, ...]:
    """Every row, by area."""
    from tests.bad_input import (
        rows_calls,
        rows_fit,
        rows_loaders,
        rows_models,
        rows_options,
        rows_states,
        rows_tools,
        rows_use,
    )

    modules = (
        rows_options,
        rows_models,
        rows_fit,
        rows_loaders,
        rows_use,
        rows_calls,
        rows_states,
        rows_tools,
    )
    rows = tuple(chain.from_iterable(module.ROWS for module in modules))
    return tuple(sorted(rows, key=lambda row: AREAS.index(row.area)))


ELSEWHERE = (
    TestedElsewhere(
        "the model's weights or running statistics changed after the fit",
        "ModelChangedError",
        ("what changed",),
        "tests/posterior/test_changed_model.py",
    ),
    TestedElsewhere(
        "another function at equal weights: an activation, a module's settings, a patched forward; "
        "a hook or an attribute that changes the outputs of a sample of the fit",
        "ModelChangedError",
        ("the module, or how far the outputs differ",),
        "tests/posterior/test_changed_function.py",
    ),
    TestedElsewhere(
        "Ctrl-C (SIGINT) at any moment of any call, also twice",
        "KeyboardInterrupt",
        (),
        "tests/interrupts/test_interrupts.py",
    ),
    TestedElsewhere(
        "an integer or boolean parameter before all others",
        "none: the posterior is of the first real one's dtype",
        (),
        "tests/network/test_integers.py",
    ),
    TestedElsewhere(
        "a model that mixes the samples of a batch, or only of larger ones",
        "ValueError",
        ("how far a sample's outputs differ",),
        "tests/network/test_mixing.py",
    ),
    TestedElsewhere(
        "spectral norm in training mode",
        "none: its buffers are as they were",
        (),
        "tests/posterior/test_untouched.py",
    ),
    TestedElsewhere(
        "memory that runs out, on a GPU or on the CPU, at any operation of any call",
        "MemoryExhaustedError",
        ("byte_budget",),
        "tests/bad_input/test_out_of_memory.py",
    ),
    TestedElsewhere(
        "random wrong arguments of random public calls",
        "a result, or an error",
        ("an argument",),
        "tests/fuzz/test_calls.py",
    ),
    TestedElsewhere(
        "the state of another model, or of another kind of posterior",
        "ValueError",
        ("the entry that does not fit",),
        "tests/posterior/test_saving.py",
    ),
    TestedElsewhere(
        "a file of a model in `torch.compile` or `DataParallel`, for the model, and the reverse",
        "none: wrappers are looked through",
        (),
        "tests/posterior/test_wrapped.py",
    ),
    TestedElsewhere(
        "the process is killed while it saves",
        "none: the file is the old one or the new one",
        (),
        "tests/test_files.py",
    ),
)
