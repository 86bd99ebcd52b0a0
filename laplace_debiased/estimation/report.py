"""Where the time of a fit goes: shown while it runs, and kept as a value."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import Tensor
from tqdm import tqdm

from laplace_debiased.data.plan import CurvaturePlan
from laplace_debiased.data.pool import Score
from laplace_debiased.data.sources import Batch
from laplace_debiased.parallel.jobs import Job

POOL = "pool"
DECOMPOSITIONS = "decompositions"
_SHOWN_PARAMETERS = 5


@dataclass(frozen=True)
class FitReport:
    """Where the time of a fit went, in seconds of the wall clock.

    Attributes:
        seconds: the whole fit.
        stages: by stage, in order: choosing the samples with the "pool" scored, walks over them,
            "decompositions", and the "rest".
        decompositions: by parameter, of both factors and of all eigenbases. Empty for low rank.
        samples: by stage, how many samples passed through the network.
    """

    seconds: float
    stages: Mapping[str, float]
    decompositions: Mapping[str, float]
    samples: Mapping[str, int]

    def __repr__(self) -> str:
        lines = [f"{'stage':<36}{'seconds':>9}{'share':>8}"]
        for stage, seconds in self.stages.items():
            n = self.samples.get(stage)
            lines.append(self._line(stage if n is None else f"{stage} ({n:,} samples)", seconds))
            if stage == DECOMPOSITIONS:
                ranked = sorted(self.decompositions.items(), key=lambda entry: -entry[1])
                shown, others = ranked[:_SHOWN_PARAMETERS], ranked[_SHOWN_PARAMETERS:]
                lines += [self._line(f"  {name}", taken) for name, taken in shown]
                if others:
                    taken = sum(taken for _, taken in others)
                    lines.append(self._line(f"  {len(others)} others", taken))
        return "\n".join([*lines, self._line("fit", self.seconds)])

    def _line(self, name: str, seconds: float) -> str:
        share = seconds / self.seconds if self.seconds > 0 else 0.0
        return f"{name:<36}{seconds:>9.2f}{100 * share:>6.0f} %"


class FitClock:
    """Takes the times of one fit, and ``shows`` what it does if that is asked for."""

    def __init__(self, *, shows: bool) -> None:
        self._shows = shows
        self._start = time.perf_counter()
        self._stages: dict[str, float] = {}
        self._decompositions: dict[str, float] = {}
        self._samples: dict[str, int] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count what is done inside as part of a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._stages[name] = self._stages.get(name, 0.0) + time.perf_counter() - start

    def walk(self, plan: CurvaturePlan, stage: str) -> Iterator[Batch]:
        """Batches of a plan; what is done with them counts."""
        with self.stage(stage), self._bar(stage, total=len(plan)) as bar:
            for batch in plan.batches():
                self._samples[stage] = self._samples.get(stage, 0) + len(batch)
                yield batch
                bar.update()

    def decomposed(self, jobs: Iterable[Job]) -> Iterator[Job]:
        """Factors to decompose; what is done with each counts for its parameter."""
        with self.stage(DECOMPOSITIONS), self._bar(DECOMPOSITIONS) as bar:
            for job in jobs:
                bar.set_postfix_str(job.name)
                start = time.perf_counter()
                yield job
                seconds = time.perf_counter() - start
                self._decompositions[job.name] = self._decompositions.get(job.name, 0.0) + seconds
                bar.update()

    @contextmanager
    def scoring(self, score: Score) -> Iterator[Score]:
        """A score that counts the samples that it is asked for, while a plan is made."""
        with self.stage(POOL), self._bar(POOL, unit=" samples") as bar:

            def counted(inputs: Any, targets: Tensor) -> tuple[Tensor, Tensor]:
                found = score(inputs, targets)
                n = len(targets)
                self._samples[POOL] = self._samples.get(POOL, 0) + n
                bar.update(n)
                return found

            yield counted

    def _bar(self, stage: str, **options: Any) -> tqdm:
        return tqdm(desc=f"[{stage}]", disable=not self._shows, **options)

    def report(self) -> FitReport:
        """What was taken so far; printed where progress is shown."""
        seconds = time.perf_counter() - self._start
        stages = {**self._stages, "rest": max(0.0, seconds - sum(self._stages.values()))}
        report = FitReport(
            seconds,
            MappingProxyType(stages),
            MappingProxyType(dict(self._decompositions)),
            MappingProxyType(dict(self._samples)),
        )
        if self._shows:
            tqdm.write(repr(report), file=sys.stderr)
        return report
