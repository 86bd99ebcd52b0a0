"""The end of a training script with Accelerate: a posterior of the network that it has trained.

    accelerate launch --num_processes 8 examples/accelerate_fit.py --train train --validation val

Hand over what ``prepare`` gave: the network is unwrapped, and loaders are read whole (Accelerate
repeats samples so that all processes have as many, and these must not count twice).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torchvision
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from laplace_debiased import DebiasedLaplace, evaluate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--validation", type=Path, required=True)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--samples", type=int, default=256)
    options = parser.parse_args()

    accelerator = Accelerator()
    side = (options.size, options.size)
    images = v2.Compose([v2.Resize(side), v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)])
    train = DataLoader(ImageFolder(str(options.train), images), options.batch, shuffle=True)
    validation = DataLoader(ImageFolder(str(options.validation), images), options.batch)
    torch.manual_seed(0)
    model = torchvision.models.get_model(options.model, num_classes=len(train.dataset.classes))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model, optimizer, train, validation = accelerator.prepare(model, optimizer, train, validation)

    model.train()
    for _ in range(options.epochs):
        for x, y in train:
            optimizer.zero_grad()
            accelerator.backward(nn.functional.cross_entropy(model(x), y))
            optimizer.step()

    # DDP keeps parameters alike, but every rank has running statistics of its own batches.
    plain = accelerator.unwrap_model(model)
    for buffer in plain.buffers():
        if accelerator.num_processes > 1:
            torch.distributed.broadcast(buffer, src=0)
    la = DebiasedLaplace(model.eval(), "classification")
    la.fit(train, n_samples=options.samples)
    la.optimize_prior_precision(val_loader=validation)
    scores = evaluate(la, validation)
    if accelerator.is_main_process:
        print(la)
        print(scores)
    accelerator.end_training()


if __name__ == "__main__":
    main()
