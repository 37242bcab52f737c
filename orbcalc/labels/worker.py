"""The child process of :class:`orbcalc.labels.process.WorkerProcess`.

It answers requests ``(function, list of argument tuples)`` with one ``(ok, result or exception,
traceback)`` for each tuple, over an inherited pipe. Standard output is not part of the protocol:
calculators may print.
"""

from __future__ import annotations

import importlib
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from multiprocessing.connection import Connection
from typing import Any

__all__ = ["main"]

#: How often the worker looks whether its parent is alive.
WATCH_INTERVAL_S = 0.5


def main() -> None:
    """Serve requests until the pipe closes; ``argv``: descriptor of the pipe, pid of the parent."""
    descriptor, parent = int(sys.argv[1]), int(sys.argv[2])
    os.set_inheritable(descriptor, False)  # programs that calculators start must not hold it open
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()
    connection = Connection(descriptor)
    connection.send(os.getpid())
    while True:
        try:
            function, tuples = connection.recv()
        except EOFError:
            return
        for arguments in tuples:
            connection.send_bytes(_answer(function, arguments))


def _answer(function: str, arguments: tuple[Any, ...]) -> bytes:
    try:
        module, _, name = function.partition(":")
        result = getattr(importlib.import_module(module), name)(*arguments)
        return pickle.dumps((True, result, ""))
    except Exception as error:
        text = traceback.format_exc()
        try:
            answer = pickle.dumps((False, error, text))
            pickle.loads(answer)  # some exceptions can be written, but not read
        except Exception:
            answer = pickle.dumps((False, RuntimeError(repr(error)), text))
        return answer


def _watch(parent: int) -> None:
    """End this process and its children when the parent is gone, even in mid-calculation."""
    while os.getppid() == parent:
        time.sleep(WATCH_INTERVAL_S)
    os.killpg(os.getpgrp(), signal.SIGKILL)
