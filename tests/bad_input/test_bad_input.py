"""Every row of the table is refused by name, and nothing is lost."""

from __future__ import annotations

import builtins
import copy
from pathlib import Path

import pytest

from laplace_debiased import errors
from tests.bad_input.rows import ELSEWHERE, Row, all_rows
from tests.bad_input.table import PAGE, page
from tests.bad_input.world import World, snapshot, world
from tests.untouched import equal, untouched

ROWS = all_rows()
FAMILIES = (ValueError, TypeError, RuntimeError)


@pytest.fixture(scope="module")
def worlds() -> dict[str, World]:
    return {}


def fresh(worlds: dict[str, World], likelihood: str) -> World:
    """A copy of a world: no row sees what another has done."""
    if likelihood not in worlds:
        worlds[likelihood] = world(likelihood)
    return copy.deepcopy(worlds[likelihood])


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.key)
def test_bad_input_is_refused_by_name_and_nothing_is_lost(
    row: Row, worlds: dict[str, World]
) -> None:
    w = fresh(worlds, row.likelihood)
    if row.spoil is not None:
        row.spoil(w)
    expected = getattr(errors, row.error, None) or getattr(builtins, row.error)
    before = snapshot(w.la)
    with untouched(w.model), pytest.raises(expected) as caught:
        row.act(w)
    assert type(caught.value) is expected
    message = str(caught.value)
    missing = [name for name in row.names if name not in message]
    assert not missing, f"{missing} not in: {message}"
    assert equal(snapshot(w.la), before)
    if row.spoil is None:
        assert w.la.log_marginal_likelihood().isfinite()


def test_every_row_has_a_name_of_its_own() -> None:
    keys = [row.key for row in ROWS]
    assert len(keys) == len(set(keys))


def test_what_we_raise_is_of_a_documented_family() -> None:
    own = {row.error for row in ROWS} - {"OSError"}
    for name in own:
        kind = getattr(errors, name, None) or getattr(builtins, name)
        assert issubclass(kind, FAMILIES), name
        if hasattr(errors, name):
            assert issubclass(kind, ValueError)


def test_the_page_is_made_from_these_rows() -> None:
    """If this fails, run ``python -m tests.bad_input.table``."""
    assert PAGE.read_text() == page()


def test_rows_that_are_tested_elsewhere_name_their_test() -> None:
    root = Path(__file__).parents[2]
    for one in ELSEWHERE:
        assert (root / one.test).is_file(), one.test
