"""The measured side: a process that prepares one case and runs it on request.

Started as ``python -m benchmarks.common.worker module:factory``; :mod:`benchmarks.common.workers`
is the other side. Requests and replies are lines of JSON. The factory is called with the arguments
of the request "prepare" and gives an object whose methods the later requests name; each returns a
dictionary of plain values.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def resident_bytes(field: str) -> int:
    """Resident memory now (``VmRSS``) or its peak (``VmHWM``), in bytes.

    ``ru_maxrss`` of a started process begins at its parent's size; ``VmHWM`` is the process's own.
    """
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{_STATUS} has no field {field}.")


def _reset_peak() -> None:
    """Let the peak count from now on, where the kernel allows it; else it stays the process's."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return


def measured(function: Callable[..., dict[str, Any]], /, **arguments: Any) -> dict[str, Any]:
    """Call a function and report time and memory beside its values.

    Returns:
        ``values``, ``wall_s``, ``cpu_s`` (of all threads), ``rss_before_bytes`` and
        ``rss_peak_bytes``.
    """
    gc.collect()
    _reset_peak()
    before = resident_bytes("VmRSS")
    wall, cpu = time.perf_counter(), time.process_time()
    values = function(**arguments)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {
        "values": values,
        "wall_s": wall,
        "cpu_s": cpu,
        "rss_before_bytes": before,
        "rss_peak_bytes": resident_bytes("VmHWM"),
    }


def serve(factory: Callable[..., Any], requests: TextIO, replies: TextIO) -> None:
    """Answer requests until "quit" or the end of the stream."""
    subject: Any = None

    def prepare(**arguments: Any) -> dict[str, Any]:
        nonlocal subject
        subject = factory(**arguments)
        return {}

    for line in requests:
        request = json.loads(line)
        method = request["method"]
        if method == "quit":
            return
        try:
            function = prepare if method == "prepare" else getattr(subject, method)
            reply = measured(function, **request["arguments"])
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        replies.write(json.dumps(reply, default=_plain) + "\n")
        replies.flush()


def _plain(value: Any) -> Any:
    """Tensors as nested lists; done after the measurement."""
    return value.tolist()


def main() -> None:
    """Serve on the standard streams; what libraries print goes to standard error."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    module, _, name = sys.argv[1].partition(":")
    factory = getattr(importlib.import_module(module), name)
    gc.collect()
    gc.freeze()  # the libraries' own objects need no walk before every call
    serve(factory, sys.stdin, replies)


if __name__ == "__main__":
    main()
