r"""Fit, tune and score a posterior on several processes.

Any classification network of torchvision, on folders of images with one folder per class
(``torchvision.datasets.ImageFolder``):

    torchrun --nproc-per-node 8 examples/torchrun_fit.py --model resnet50 --weights DEFAULT \
        --train imagenet/train --validation imagenet/val --save posterior.pt

Every process runs the same program with the same arguments; the library shares the work out. Give
whole data sets: no ``DistributedSampler`` is needed, and none does harm.
"""

from __future__ import annotations

import argparse
import datetime
import os
from pathlib import Path

import torch
import torch.distributed
import torchvision
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from laplace_debiased import DebiasedLaplace, evaluate


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", default="resnet50", help="name of a torchvision network")
    parser.add_argument("--weights", help="of torchvision, as DEFAULT, or a file of a state dict")
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--validation", type=Path, required=True)
    parser.add_argument("--size", type=int, default=224, help="side of the images")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--last-layer", action="store_true", help="leave all other weights alone")
    parser.add_argument("--checkpoint", type=Path, help="go on from here after a crash")
    parser.add_argument("--save", type=Path)
    parser.add_argument("--time-out", type=float, default=30.0, help="minutes to wait for a rank")
    return parser.parse_args()


def network(options: argparse.Namespace, n_classes: int) -> torch.nn.Module:
    """The network, with the same weights on every rank."""
    file = options.weights is not None and Path(options.weights).exists()
    named = None if file else options.weights
    torch.manual_seed(0)  # without weights of its own, a network is the same on all ranks still
    sizes = {} if named else {"num_classes": n_classes}
    model = torchvision.models.get_model(options.model, weights=named, **sizes)
    if file:
        model.load_state_dict(torch.load(options.weights, map_location="cpu", weights_only=True))
    return model.eval()


def folder(options: argparse.Namespace, path: Path) -> DataLoader:
    steps = [v2.Resize(options.size), v2.CenterCrop(options.size), v2.PILToTensor()]
    statistics = v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    steps += [v2.ToDtype(torch.float32, scale=True), statistics]
    data = ImageFolder(str(path), v2.Compose(steps))
    return DataLoader(data, options.batch, num_workers=options.workers)


def main() -> None:
    options = arguments()
    gpus = torch.cuda.is_available()
    torch.distributed.init_process_group(
        "nccl" if gpus else "gloo", timeout=datetime.timedelta(minutes=options.time_out)
    )
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
    first = torch.distributed.get_rank() == 0
    train, validation = folder(options, options.train), folder(options, options.validation)
    model = network(options, len(train.dataset.classes)).to(device)

    weights = "last_layer" if options.last_layer else "all"
    la = DebiasedLaplace(model, "classification", weights)
    la.fit(train, n_samples=options.samples, progress_bar=True, checkpoint=options.checkpoint)
    la.optimize_prior_precision(val_loader=validation)
    scores = evaluate(la, validation)
    if options.save is not None:
        la.save(options.save)
    if first:
        print(la)
        print(scores)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
