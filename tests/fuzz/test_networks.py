"""Random networks of every layer type have the dense oracle's tables and predictions."""

import os

import pytest

from tests.fuzz.checks import outcome
from tests.fuzz.networks import make_case

NETWORKS = int(os.environ.get("FUZZ_NETWORKS", "200"))
CHUNK = 25


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("first", range(0, NETWORKS, CHUNK))
def test_random_networks_equal_the_dense_oracle(first: int) -> None:
    found = {seed: outcome(make_case(seed)) for seed in range(first, min(first + CHUNK, NETWORKS))}
    assert not {seed: problems for seed, problems in found.items() if problems}
