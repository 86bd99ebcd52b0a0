"""The examples run on two processes with small data."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parents[2]
N = {"train": 9, "validation": 7}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of two classes of noise."""
    folder, draws = tmp_path_factory.mktemp("images"), torch.Generator().manual_seed(0)
    for part, n in N.items():
        for name in ("cats", "dogs"):
            (folder / part / name).mkdir(parents=True)
            for index in range(n):
                pixels = torch.randint(0, 256, (32, 32, 3), generator=draws, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(folder / part / name / f"{index}.png")
    return folder


def launched(images: Path, program: str, *arguments: str) -> str:
    """What a program prints that torchrun starts twice."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = [
        "-W",
        "ignore",
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        str(port),
    ]
    data = ["--train", str(images / "train"), "--validation", str(images / "validation")]
    small = ["--model", "squeezenet1_1", "--size", "32", "--batch", "4", "--samples", "8"]
    script = str(ROOT / "examples" / program)
    done = subprocess.run(
        [sys.executable, *launch, script, *data, *small, *arguments],
        cwd=ROOT,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "ACCELERATE_USE_CPU": "true",
            "PYTHONPATH": ".",
        },
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_torchrun(images: Path, tmp_path: Path) -> None:
    saved = tmp_path / "la.pt"
    files = "--save", str(saved), "--checkpoint", str(tmp_path / "fit.pt")
    text = launched(images, "torchrun_fit.py", *files)
    assert text.count("DebiasedKronLaplace") == 1
    assert f"8 of N={2 * N['train']} samples" in text
    assert re.search(rf"n_samples +{2 * N['validation']} ", text)
    assert os.listdir(tmp_path) == ["la.pt"]
    assert torch.load(saved, weights_only=True)["posterior"] == "DebiasedKronLaplace"


def test_accelerate(images: Path) -> None:
    pytest.importorskip("accelerate")
    text = launched(images, "accelerate_fit.py")
    assert text.count("DebiasedKronLaplace") == 1
    assert f"8 of N={2 * N['train']} samples" in text
    assert re.search(rf"n_samples +{2 * N['validation']} ", text)
