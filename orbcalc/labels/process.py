"""Labels from a process of its own: torch-free, one thread, killed when it takes too long."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import IO, Any

from ase import Atoms

from orbcalc.config import LabelConfig
from orbcalc.errors import LabelError
from orbcalc.labels.compute import label_kinds, label_provenance
from orbcalc.labels.label import Kind, Label, LabelStatus
from orbcalc.structures import structure_key

__all__ = [
    "WorkerCrashed",
    "WorkerProcess",
    "WorkerTimeout",
    "label_structure",
    "label_structures",
]

#: The child gets our module path as an argument: in PYTHONPATH it would reach other programs.
BOOTSTRAP = (
    "import json, sys; sys.path[:] = json.loads(sys.argv.pop()); "
    "from orbcalc.labels.worker import main; main()"
)
THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)
START_TIMEOUT_S = 120.0


class WorkerTimeout(LabelError, TimeoutError):  # noqa: N818  (a state of the worker)
    """A call took longer than allowed; the worker was killed."""


class WorkerCrashed(LabelError):  # noqa: N818
    """The worker died in a call: a signal, an exit, out of memory."""


class WorkerProcess:
    """A persistent child process that runs functions, for one caller at a time.

    It is started by the first call, and started anew after a timeout or a crash. It ends with
    :meth:`close`, and by itself when this process ends in whatever way. Functions are named
    ``"module:function"``; arguments and results are pickled between parent and child, which
    trust each other.

    Parameters
    ----------
    threads
        Threads of numerical libraries in the child.

    Examples
    --------
    >>> with WorkerProcess() as worker:
    ...     worker.call("math:hypot", 3.0, 4.0, timeout_s=60.0)
    5.0
    """

    def __init__(self, threads: int = 1) -> None:
        self._threads = threads
        self._owner = os.getpid()
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection[Any, Any] | None = None
        self._stderr: IO[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """Process id of the child, None while there is none."""
        return self._process.pid if self._process is not None else None

    def call(self, function: str, *arguments: Any, timeout_s: float) -> Any:
        """Run one function and return its result.

        Raises
        ------
        WorkerTimeout, WorkerCrashed
            If it does not come to an end.
        LabelError
            If the worker cannot be started.
        Exception
            Whatever the function raises.
        """
        (outcome,) = self.map(function, [arguments], timeout_s=timeout_s)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def map(
        self,
        function: str,
        tuples: Iterable[tuple[Any, ...]],
        *,
        timeout_s: float,
        setup: tuple[str, tuple[Any, ...]] | None = None,
    ) -> Iterator[Any]:
        """Run a function for each tuple of arguments, in order.

        Results come one by one; for a call that fails, the exception is the result. A timeout
        (seconds, of each call) or a crash costs only the call that it happens in.

        ``setup`` names a function and its arguments, to be run first, and again in the process
        that follows a timeout or crash. What it imports does not count as time of the calls.

        Raises
        ------
        LabelError
            If the worker cannot be started, or dies in the setup.
        Exception
            Whatever the setup raises.
        """
        waiting = deque(tuples)
        try:
            while waiting:
                self._start()
                if setup is not None:
                    self._set_up(*setup)
                try:
                    self._send((function, list(waiting)))
                    while waiting:
                        outcome = self._receive_answer(timeout_s)
                        waiting.popleft()
                        yield outcome
                except (WorkerTimeout, WorkerCrashed) as error:
                    waiting.popleft()
                    yield error
        finally:
            if waiting:  # the caller has gone: nobody will read the rest
                self._kill()

    def close(self) -> None:
        """End the child; another call would start a new one."""
        if os.getpid() != self._owner:
            return  # a forked copy of this object does not own the child
        if self._connection is not None:
            self._connection.close()
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=2)
        self._kill()

    def __reduce__(self) -> tuple[type[WorkerProcess], tuple[int]]:
        """Copy what describes the worker: a copy starts a child of its own."""
        return WorkerProcess, (self._threads,)

    def __enter__(self) -> WorkerProcess:
        """Start nothing yet: the first call does."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the child."""
        self.close()

    def __del__(self) -> None:
        """End the child of an object that nobody closed."""
        self.close()

    def _start(self) -> None:
        if self._process is not None and self._process.poll() is None:
            return
        self._kill()
        self._stderr = tempfile.TemporaryFile("a+b")  # noqa: SIM115  (closed by _kill)
        self._connection, child_end = Pipe()
        variables = dict.fromkeys(THREAD_VARIABLES, str(self._threads))
        descriptor = child_end.fileno()
        arguments = [str(descriptor), str(os.getpid()), json.dumps(sys.path)]
        self._process = subprocess.Popen(
            [sys.executable, "-c", BOOTSTRAP, *arguments],
            pass_fds=(descriptor,),
            env={**os.environ, **variables},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._stderr,
            start_new_session=True,  # a group of its own: calculators' programs die with it
        )
        child_end.close()
        try:
            self._receive(START_TIMEOUT_S)
        except (WorkerTimeout, WorkerCrashed) as error:
            raise LabelError(f"the label worker does not start: {error}") from error

    def _set_up(self, function: str, arguments: tuple[Any, ...]) -> None:
        try:
            self._send((function, [arguments]))
            outcome = self._receive_answer(START_TIMEOUT_S)
        except (WorkerTimeout, WorkerCrashed) as error:
            raise LabelError(f"the label worker fails in {function}: {error}") from error
        if isinstance(outcome, Exception):
            raise outcome

    def _send(self, request: Any) -> None:
        assert self._connection is not None
        assert self._stderr is not None
        self._stderr.truncate(0)  # it should tell of this request only
        try:
            self._connection.send(request)
        except OSError as error:
            raise self._crashed() from error

    def _receive_answer(self, timeout_s: float) -> Any:
        succeeded, result, traceback = pickle.loads(self._receive(timeout_s))
        if not succeeded:
            result.__cause__ = RuntimeError(f"in the worker process:\n{traceback}")
        return result

    def _receive(self, timeout_s: float) -> bytes:
        assert self._connection is not None
        try:
            if self._connection.poll(timeout_s):
                return self._connection.recv_bytes()
        except (EOFError, OSError) as error:
            raise self._crashed() from error
        self._kill()
        raise WorkerTimeout(f"no result after {timeout_s:g} s; the worker was killed")

    def _crashed(self) -> WorkerCrashed:
        assert self._process is not None
        assert self._stderr is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=1)  # its end of the pipe closes a moment before it ends
        code = self._process.poll()
        self._stderr.seek(max(0, os.fstat(self._stderr.fileno()).st_size - 2000))
        told = self._stderr.read().decode(errors="replace").strip()
        self._kill()
        how = f"exit code {code}"
        if code is not None and code < 0:
            how = f"signal {signal.Signals(-code).name}"
        return WorkerCrashed(f"the worker died ({how}){': ' if told else ''}{told}")

    def _kill(self) -> None:
        """Kill the child with all that it started, and forget it."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        for resource in (self._connection, self._stderr):
            if resource is not None:
                resource.close()
        self._process = self._connection = self._stderr = None


def label_structure(
    process: WorkerProcess, atoms: Atoms, config: LabelConfig, kinds: Sequence[Kind] | None = None
) -> list[Label]:
    """Label one structure in a worker; see :func:`label_structures`."""
    (labels,) = label_structures(process, [atoms], config, kinds)
    return labels


def label_structures(
    process: WorkerProcess,
    structures: Sequence[Atoms],
    config: LabelConfig,
    kinds: Sequence[Kind] | None = None,
) -> Iterator[list[Label]]:
    """Label structures in a worker, one after the other, and yield the labels of each.

    Timeouts (``config.timeout_s`` for each label, without imports) and crashes become a status.
    ``kinds`` are those of the configuration by default.

    Raises
    ------
    StructureError, ConfigError, LabelError
        As :func:`orbcalc.labels.compute.compute_label`; also if the worker does not start.
    """
    kinds = tuple(kinds if kinds is not None else label_kinds(config))
    plain = [atoms.copy() for atoms in structures]  # without calculators, which do not travel
    outcomes = process.map(
        "orbcalc.labels.compute:compute_label",
        ((atoms, kind, config) for atoms in plain for kind in kinds),
        timeout_s=config.timeout_s,
        setup=("orbcalc.labels.compute:prepare", (kinds, config)),
    )
    with contextlib.closing(outcomes):  # type: ignore[type-var]  # it is a generator
        for atoms in plain:
            yield [_as_label(next(outcomes), atoms, kind, config) for kind in kinds]


def _as_label(outcome: Any, atoms: Atoms, kind: Kind, config: LabelConfig) -> Label:
    if isinstance(outcome, WorkerTimeout):
        status, wall_time_s = LabelStatus.timeout, config.timeout_s
    elif isinstance(outcome, WorkerCrashed):
        status, wall_time_s = LabelStatus.crashed, 0.0
    elif isinstance(outcome, Exception):
        raise outcome
    else:
        assert isinstance(outcome, Label)
        return outcome
    provenance = label_provenance(kind, config)
    key = structure_key(atoms)
    return Label(key, kind, status, provenance, {}, wall_time_s, str(outcome))
