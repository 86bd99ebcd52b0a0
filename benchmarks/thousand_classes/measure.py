"""What is measured of every network: seconds, peak memory, and speed against a forward pass."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset

from benchmarks.common.worker import measured
from benchmarks.common.workers import GIGABYTE
from benchmarks.thousand_classes.networks import IMAGENET
from laplace_debiased import DebiasedLaplace


@dataclass(frozen=True)
class Row:
    """One measured step.

    Attributes:
        network: which network, and which of its weights.
        step: what was done.
        seconds: elapsed.
        gigabytes: peak memory, 10⁹ bytes: resident on the CPU, allocated on a GPU.
        note: what came of it.
    """

    network: str
    step: str
    seconds: float
    gigabytes: float
    note: str = ""

    def cells(self) -> list[str]:
        """For a table."""
        seconds, gigabytes = f"{self.seconds:.1f}", f"{self.gigabytes:.2f}"
        return [self.network, self.step, seconds, gigabytes, self.note]


class Steps:
    """Runs steps one by one and keeps a row of each, printed as it comes.

    Args:
        network: what the rows call it.
        device: where it runs.
    """

    def __init__(self, network: str, device: torch.device) -> None:
        self.network, self.device, self.rows = network, device, []  # type: ignore[var-annotated]

    def run(self, step: str, function: Callable[[], Any], note: Callable[[Any], str] = str) -> Any:
        """Run a step; what it raises is its row, and None its value."""
        on_gpu, kept = self.device.type == "cuda", {}
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)

        def call() -> dict[str, Any]:
            kept["value"] = function()
            if on_gpu:
                torch.cuda.synchronize(self.device)
            return {}

        started = time.perf_counter()
        try:
            found = measured(call)
            said = note(kept["value"])
        except Exception as error:  # the other steps have something to say
            found = {"wall_s": time.perf_counter() - started, "rss_peak_bytes": 0}
            said = f"{type(error).__name__}: {str(error)[:160]}"
        peak = torch.cuda.max_memory_allocated(self.device) if on_gpu else found["rss_peak_bytes"]
        row = Row(self.network, step, found["wall_s"], peak / GIGABYTE, said)
        self.rows.append(row)
        print(" | ".join(row.cells()), flush=True)
        return kept.get("value")


def loader(data: Dataset, n: int | None = None, batch: int = 25) -> DataLoader:
    """Unshuffled, over the first n."""
    chosen = data if n is None else Subset(data, range(min(n, len(data))))  # type: ignore[arg-type]
    return DataLoader(chosen, batch_size=batch)


def image_steps(
    model: nn.Module,
    data: Dataset,
    subset: str,
    *,
    name: str,
    n_fit: int | None,
    n_tune: int,
    n_predict: int,
    n_data: int,
    device: torch.device,
) -> tuple[list[Row], Any]:
    """Fit, tune and predict; gives the rows and the posterior."""
    steps = Steps(f"{name}, {subset}", device)
    la = DebiasedLaplace(model, "classification", subset)
    budget: Any = "auto" if n_fit is None else n_fit
    steps.run(
        f"fit, n_samples={budget}",
        lambda: la.fit(loader(data), n_samples=budget, n_data=n_data),
        lambda _: f"covers {la.coverage.n_covered} parameters, {100 * la.coverage.share:.1f} %",
    )
    if la._fit is None:
        return steps.rows, la
    la.prior_precision = 1e4
    steps.run(
        f"tuning on {n_tune}",
        lambda: la.optimize_prior_precision(val_loader=loader(data, n_tune)),
        lambda _: _tuned(la),
    )
    x = torch.stack([data[index][0] for index in range(n_predict)]).to(device)
    for link in ("mc", "probit"):
        steps.run(f"la(x), {n_predict}, {link}", lambda link=link: la(x, link_approx=link), _shape)
    steps.run("outputs_report, 10", lambda: la.outputs_report(x[:10]))
    steps.run(
        f"function draws, 20 of {n_predict}",
        lambda: la.functional_samples(x, n_samples=20, generator=seeded(device)),
        _shape,
    )
    return steps.rows, la


def language_steps(
    model: nn.Module, data: Dataset, *, name: str, n_fit: int, n_predict: int, device: torch.device
) -> list[Row]:
    """Fit on sequences, predict the next token."""
    steps = Steps(name, device)
    la = DebiasedLaplace(model, "classification", prior_precision=100.0)
    steps.run(
        f"fit, {n_fit} sequences",
        lambda: la.fit(loader(data, n_fit, batch=4), n_samples=None, n_data=n_fit),
        lambda _: f"covers {la.coverage.n_covered} parameters, {100 * la.coverage.share:.1f} %",
    )
    if la._fit is None:
        return steps.rows
    batch = next(iter(loader(data, n_predict, batch=n_predict)))
    inputs = {k: v.to(device) for k, v in batch.items() if k != "labels"}
    steps.run(f"la(x), {n_predict}, last position", lambda: la(inputs, positions="last"), _shape)
    steps.run(
        "function draws, 10, last position",
        lambda: la.functional_samples(
            inputs, n_samples=10, generator=seeded(device), positions="last"
        ),
        _shape,
    )
    return steps.rows


def speed_steps(
    model: nn.Module, data: Dataset, *, name: str, n: int, device: torch.device
) -> list[Row]:
    """Samples per second of a fit and of predictions against a forward pass alone."""
    steps = Steps(f"{name}, speed", device)
    x = torch.stack([data[index][0] for index in range(n)]).to(device)
    seconds: dict[str, float] = {}

    def timed(step: str, function: Callable[[], Any]) -> None:
        started = time.perf_counter()

        def rate(_: Any) -> str:
            seconds[step] = time.perf_counter() - started
            times = seconds[step] / seconds["forward pass"]
            return f"{n / seconds[step]:.1f} samples/s, {times:.1f} × forward"

        steps.run(step, function, rate)

    def forward() -> None:
        with torch.no_grad():
            for part in x.split(16):
                model(part)

    forward()
    timed("forward pass", forward)
    la = DebiasedLaplace(model, "classification", sampling="uniform", prior_precision=1e4)
    timed("fit", lambda: la.fit(loader(data, n, batch=16), n_samples=None, n_data=IMAGENET))
    if la._fit is not None:
        timed("la(x)", lambda: la(x))
    return steps.rows


def seeded(device: torch.device) -> torch.Generator:
    """A generator of a fixed seed on the device."""
    return torch.Generator(device).manual_seed(0)


def _tuned(la: Any) -> str:
    found = la.tuning_result
    return (
        f"prior {found.prior_precision:.3g} ({found.link}), loss {found.loss:.4f}, MAP "
        f"{found.map_loss:.4f}, prior only {found.prior_only_loss:.4f}"
        f"{', on an edge' if found.on_edge else ''}"
    )


def _shape(value: Any) -> str:
    finite = bool(torch.isfinite(value).all())
    return f"{list(value.shape)}{'' if finite else ', not finite'}"
