"""``python -m tests.fuzz --networks 2000 [--first 0]``: as the test, on as many as one likes."""

import argparse
import time
import traceback

from tests.fuzz.checks import outcome
from tests.fuzz.networks import make_case


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("--networks", type=int, default=200)
    parser.add_argument("--first", type=int, default=0, help="first seed")
    arguments = parser.parse_args()
    start, bad = time.perf_counter(), 0
    for seed in range(arguments.first, arguments.first + arguments.networks):
        try:
            found = outcome(make_case(seed))
        except Exception:
            found = [traceback.format_exc()]
        if found:
            bad += 1
            print(f"seed {seed}: " + "; ".join(found), flush=True)
    elapsed = time.perf_counter() - start
    print(f"{arguments.networks} networks, {bad} with mismatches, {elapsed:.0f} s")
    raise SystemExit(bool(bad))


if __name__ == "__main__":
    main()
