"""A thousand classes, and fifty thousand: seconds, memory, and what it is worth.

* EfficientNet-Lite0 (ImageNet weights, 4.65 M parameters, C = 1000), all weights and last layer:
  fit, tuning, prediction by both links, function draws; laplace-torch beside it with its limits.
* With ``--quality``: NLL, ECE, Brier on held-out images beside the MAP, temperature scaling, the
  prior alone and a last layer, chosen on one half of the images and scored on the other, both ways.
* GPT-2's size (124 M parameters, random weights, vocabulary 50,257): adapters of rank 8 by
  ``peft``, and the last block alone; fit on sequences, prediction of the last position.
* With ``--speed``: samples per second of fit and prediction against a forward pass, also of
  ResNet-50.

    python -m benchmarks.thousand_classes --images imagenet-samples.zip --quality
    python -m benchmarks.thousand_classes --parts speed --device cuda

The curvature (type 2) reads no labels; its samples are drawn from all the images at hand.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset, Subset

from benchmarks.common.tables import settings, table, write
from benchmarks.common.workers import GIGABYTE, Limits, NoResult, Worker
from benchmarks.thousand_classes.measure import (
    Row,
    image_steps,
    language_steps,
    loader,
    speed_steps,
)
from benchmarks.thousand_classes.networks import (
    IMAGENET,
    Sequences,
    efficientnet,
    gpt2,
    images,
    resnet50,
)
from laplace_debiased import DebiasedLaplace, compare

PARTS = ("images", "language", "speed", "laplace-torch", "quality")
TINY = {"n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": 1000, "n_positions": 64}


def image_rows(options: argparse.Namespace, device: torch.device) -> list[Row]:
    """EfficientNet-Lite0, all weights and last layer."""
    data = images(options.images, options.n_images, options.size)
    rows: list[Row] = []
    for subset, n_fit in (("last_layer", None), ("all", options.samples)):
        found, _ = image_steps(
            efficientnet().to(device),
            data,
            subset,
            name="EfficientNet-Lite0",
            n_fit=n_fit,
            n_tune=options.tune if subset == "all" else 2 * options.tune,
            n_predict=options.predict if subset == "all" else 2 * options.predict,
            n_data=IMAGENET,
            device=device,
        )
        rows += found
    return rows


def language_rows(options: argparse.Namespace, device: torch.device) -> list[Row]:
    """GPT-2's size with adapters, and its last block."""
    config: dict[str, Any] = TINY if options.tiny else {}
    vocabulary = config.get("vocab_size", 50_257)
    data = Sequences(options.sequences, 8 if options.tiny else 64, vocabulary)
    rows: list[Row] = []
    for part in ("lora", "block"):
        rows += language_steps(
            gpt2(part, **config).to(device),
            data,
            name=f"GPT-2, {part}",
            n_fit=options.sequences,
            n_predict=min(4, options.sequences),
            device=device,
        )
    return rows


def speed_rows(options: argparse.Namespace, device: torch.device) -> list[Row]:
    """Against a forward pass."""
    data = images(options.images, options.predict, options.size)
    rows: list[Row] = []
    for name, build in (("EfficientNet-Lite0", efficientnet), ("ResNet-50", resnet50)):
        model = build().to(device)
        rows += speed_steps(model, data, name=name, n=len(data), device=device)
    return rows


def reference_rows(options: argparse.Namespace, device: torch.device) -> list[Row]:
    """laplace-torch on the CPU, within limits."""
    limits = Limits(options.time_limit, options.memory_limit)
    rows: list[Row] = []
    for subset in ("last_layer", "all"):
        name = f"EfficientNet-Lite0, {subset}, laplace-torch"
        with Worker(
            "benchmarks.thousand_classes.reference:reference", options.threads, limits
        ) as w:
            for step, arguments in (("prepare", None), ("fit", {}), ("predict", {"n": 1})):
                try:
                    if arguments is None:
                        given = {"subset": subset, "n": options.samples, "size": options.size}
                        w.prepare(path=options.images and str(options.images), **given)
                        continue
                    found = w.call(step, **arguments)
                except NoResult as error:
                    rows.append(Row(name, step, float("nan"), float("nan"), str(error)[:160]))
                    break
                gigabytes = found.rss_peak_bytes / GIGABYTE
                rows.append(Row(name, step, found.wall_s, gigabytes, str(found.values)))
    for row in rows:
        print(" | ".join(row.cells()), flush=True)
    return rows


def quality(options: argparse.Namespace, device: torch.device) -> str:
    """Both halves of the images, chosen on one and scored on the other, all weights."""
    data = images(options.images, options.n_images, options.size)
    index = list(range(len(data)))
    halves = index[::2], index[1::2]
    la = DebiasedLaplace(
        efficientnet().to(device), "classification", n_outputs=options.quality_outputs
    )
    la.fit(loader(data), n_samples=options.samples, n_data=IMAGENET)  # one fit serves both
    tables = []
    for chosen, scored in (halves, halves[::-1]):
        val, test = (_part(data, part, options.quality_images) for part in (chosen, scored))
        la.optimize_prior_precision(val_loader=loader(val))
        found = compare(la, loader(val), loader(test), progress_bar=False)
        tables.append(found.table)
        print(found.table, flush=True)
    return "\n\n".join(tables)


def _part(data: Dataset, index: Sequence[int], n: int) -> Dataset:
    return Subset(data, list(index)[:n])


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of a run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.thousand_classes")
    parser.description = __doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS[:2]))
    parser.add_argument("--quality", action="store_true", help="with the part of the name")
    parser.add_argument("--speed", action="store_true", help="with the part of the name")
    parser.add_argument("--images", type=Path, help="archive of ImageNet images; noise without")
    parser.add_argument("--n-images", type=int, default=500)
    parser.add_argument("--size", type=int, default=224, help="side of the images")
    parser.add_argument("--samples", type=int, default=64, help="of a fit of all weights")
    parser.add_argument("--tune", type=int, default=50, help="images; twice as many, last layer")
    parser.add_argument("--predict", type=int, default=25, help="images; twice as many, last layer")
    parser.add_argument("--quality-images", type=int, default=250, help="of each half")
    parser.add_argument(
        "--quality-outputs", type=int, default=32, help="classes of each sample with a variance"
    )
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--tiny", action="store_true", help="a tiny language model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--time-limit", type=float, default=300.0, help="of laplace-torch, seconds")
    parser.add_argument("--memory-limit", type=float, default=12.0, help="of laplace-torch, GB")
    parser.add_argument("--output", type=Path, default=Path("benchmark-output"))
    options = parser.parse_args(arguments)
    options.parts += [part for part in ("quality", "speed") if getattr(options, part)]
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts that were asked for, and write their tables."""
    options = parsed(arguments)
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    runs = {
        "images": image_rows,
        "language": language_rows,
        "speed": speed_rows,
        "laplace-torch": reference_rows,
    }
    rows: list[Row] = []
    for part, run in runs.items():
        if part in options.parts:
            rows += run(options, device)
    head = ("network", "step", "seconds", "peak GB", "")
    text = "# A thousand classes, and fifty thousand\n\n" + table(head, [r.cells() for r in rows])
    if "quality" in options.parts:
        text += "\n\n" + quality(options, device)
    record = {**settings(options), "rows": [asdict(row) for row in rows]}
    record["options"]["images"] = None if options.images is None else options.images.name
    write(options.output, "thousand_classes", text, record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
