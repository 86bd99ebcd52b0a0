"""The measuring side: start workers, watch their memory and time, and say why one was stopped.

Torch is not imported here, so that the parent stays small beside its workers.
"""

from __future__ import annotations

import json
import math
import os
import select
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NoReturn

_POLL_SECONDS = 0.05
GIGABYTE = 10**9


@dataclass(frozen=True)
class Limits:
    """What one call may take.

    Attributes:
        seconds: of a call.
        gigabytes: resident memory of its process, 10⁹ bytes.
        prepare_seconds: of the start and preparation of a process.
    """

    seconds: float = 120.0
    gigabytes: float = 10.0
    prepare_seconds: float = 900.0


@dataclass(frozen=True)
class Measurement:
    """One call that returned.

    Attributes:
        values: what it returned.
        wall_s: elapsed seconds.
        cpu_s: seconds of all threads.
        rss_before_bytes: resident memory before.
        rss_peak_bytes: peak resident memory of the process during the call.
    """

    values: dict[str, Any]
    wall_s: float
    cpu_s: float
    rss_before_bytes: int
    rss_peak_bytes: int


class NoResult(RuntimeError):  # noqa: N818 - an outcome to be printed, not a fault
    """A call that gave no measurement; the message is what a table prints."""


@dataclass(eq=False)
class Worker:
    """A process that holds one prepared case; a context manager.

    Args:
        factory: "module:function", called in the process by :meth:`prepare`.
        threads: threads of torch, set through the environment.
        limits: of every call.
    """

    factory: str
    threads: int
    limits: Limits = field(default_factory=Limits)
    stopped: str | None = None
    """Why the process is gone, or None while it lives."""

    def __post_init__(self) -> None:
        environment = os.environ | dict.fromkeys(
            ("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(self.threads)
        )
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.common.worker", self.factory],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.communicate()

    def prepare(self, **arguments: Any) -> Measurement:
        """Build the case in the process."""
        return self._request("prepare", arguments, self.limits.prepare_seconds)

    def call(self, method: str, /, **arguments: Any) -> Measurement:
        """Run a method of the case.

        Raises:
            NoResult: if it raised, or was stopped at a limit, now or earlier.
        """
        return self._request(method, arguments, self.limits.seconds)

    def call_untimed(self, method: str, /, **arguments: Any) -> Measurement:
        """As :meth:`call`, with no limit of time."""
        return self._request(method, arguments, math.inf)

    def _request(self, method: str, arguments: dict[str, Any], seconds: float) -> Measurement:
        if self.stopped is not None:
            raise NoResult(self.stopped)
        requests, replies = self._process.stdin, self._process.stdout
        assert requests is not None
        assert replies is not None
        try:
            requests.write(json.dumps({"method": method, "arguments": arguments}) + "\n")
            requests.flush()
        except BrokenPipeError:
            self._stop(f"the process ended with status {self._process.wait()}")
        self._wait(replies, seconds)
        line = replies.readline()
        if not line:
            self._stop(f"the process ended with status {self._process.wait()}")
        reply = json.loads(line)
        if "error" in reply:
            raise NoResult(reply["error"])
        return Measurement(**reply)

    def _wait(self, replies: IO[str], seconds: float) -> None:
        """Until the reply arrives; stops the process at a limit."""
        deadline = time.monotonic() + seconds
        while not select.select([replies], [], [], _POLL_SECONDS)[0]:
            if self._resident_bytes() > self.limits.gigabytes * GIGABYTE:
                self._stop(f"out of memory (> {self.limits.gigabytes:g} GB)")
            if time.monotonic() > deadline:
                self._stop(f"no result in {seconds:g} s")

    def _resident_bytes(self) -> int:
        try:
            pages = int(Path(f"/proc/{self._process.pid}/statm").read_text().split()[1])
        except (FileNotFoundError, ProcessLookupError, IndexError):
            return 0  # it has just ended: the reply's end of file tells
        return pages * os.sysconf("SC_PAGE_SIZE")

    def _stop(self, reason: str) -> NoReturn:
        self._process.kill()
        self._process.wait()
        self.stopped = reason
        raise NoResult(reason)
