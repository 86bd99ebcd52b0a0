"""Processes for tests: gloo over a file, forked from a server that has imported all there is.

A process group that waits in vain gives up after :data:`PATIENCE` seconds, and a crowd that has not
ended after its time-out is killed: no test can hang.
"""

from __future__ import annotations

import datetime
import io
import multiprocessing
import os
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

PATIENCE = 20.0
"""Seconds that a rank waits for another."""

Task = Callable[..., Any]


class Crowd:
    """The processes of one group at work.

    Args:
        world: how many.
        task: what each does: ``task(rank, *arguments)``; a function of a module.
        arguments: plain values and tensors.
    """

    def __init__(self, world: int, task: Task, *arguments: Any, patience: float = PATIENCE) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.parallel.cases"])
        self.folder = tempfile.TemporaryDirectory()
        meeting = str(Path(self.folder.name, "meeting"))
        self.pipes, self.processes = [], []
        for rank in range(world):
            here, there = context.Pipe(duplex=False)
            start = (there, meeting, rank, world, patience, task, arguments)
            self.processes.append(context.Process(target=_rank, args=start, daemon=True))
            self.pipes.append(here)
            self.processes[-1].start()
            there.close()

    def results(self, timeout: float = 150.0) -> list[Any]:
        """What every rank returned; the exception that it raised; None of one that was killed.

        Raises:
            TimeoutError: if one is still at work; all are killed then.
        """
        deadline = time.monotonic() + timeout
        try:
            found = []
            for pipe in self.pipes:
                if not pipe.poll(max(0.0, deadline - time.monotonic())):
                    raise TimeoutError(f"a rank is still at work after {timeout} s")
                try:
                    found.append(torch.load(io.BytesIO(pipe.recv_bytes()), weights_only=False))
                except EOFError:
                    found.append(None)
            return found
        finally:
            for process in self.processes:
                process.kill()
                process.join()
            self.folder.cleanup()


def run(world: int, task: Task, *arguments: Any, timeout: float = 150.0) -> list[Any]:
    """What every rank of a crowd returned.

    Raises:
        AssertionError: with its traceback, if one raised.
    """
    found = Crowd(world, task, *arguments).results(timeout)
    failed = [one for one in found if isinstance(one, Failure)]
    assert not failed, failed[0].traceback
    return found


class Failure:
    """An exception of a rank, in words.

    Args:
        error: the exception.
    """

    def __init__(self, error: BaseException) -> None:
        self.kind, self.message = type(error).__name__, str(error)
        self.traceback = "".join(traceback.format_exception(error))


def _rank(
    there: Connection,
    meeting: str,
    rank: int,
    world: int,
    patience: float,
    task: Task,
    arguments: tuple[Any, ...],
) -> None:
    import torch.distributed

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{meeting}",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=patience),
    )
    try:
        result: Any = task(rank, *arguments)
    except BaseException as error:
        result = Failure(error)
    box = io.BytesIO()
    torch.save(result, box)
    there.send_bytes(box.getvalue())
    there.close()
    os._exit(0)
