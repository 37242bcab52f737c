"""Where tasks run: the only module that knows Dask.

Two kinds of task go to two kinds of workers. *label* tasks run in processes that never load
torch, one thread each; *model* tasks (training, prediction, MD) in others, with a GPU where there
is one. Workers offer the resources ``LABEL`` and ``MODEL``; a cluster whose workers offer neither
is used without distinction.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, TypeVar
from uuid import uuid4

from distributed import Client, Nanny, Scheduler, SpecCluster, as_completed
from distributed.client import Future
from distributed.core import Status

from orbcalc.config import DaskConfig
from orbcalc.errors import (
    ConfigError,
    LabelConflictError,
    MissingLabelError,
    StructureError,
    WorkersLostError,
)

__all__ = ["Executor", "TaskKind", "open_executor"]

logger = logging.getLogger(__name__)

TaskKind = Literal["label", "model"]
Item = TypeVar("Item")

_RESOURCES: dict[TaskKind, str] = {"label": "LABEL", "model": "MODEL"}

#: Errors that would come again: a task that raises one is not tried again.
_FINAL = (ConfigError, StructureError, MissingLabelError, LabelConflictError)

#: How often to look for workers while tasks run.
LOOK_EVERY_S = 0.25

#: How long a scheduler may take to answer, and how often it is asked.
CONNECT_TIMEOUT_S, CONNECT_ATTEMPTS = 30.0, 3

#: When to look whether a worker that died is back: a little after SpecCluster gave it up.
REPLACE_AFTER_S = 16.0


class Executor:
    """Run functions on the workers of a Dask client.

    Parameters
    ----------
    client
        Of any cluster.
    retries
        How often a task that raised an error is tried again, unless that error is one of the
        configuration or the input. (How often one whose worker died is, Dask decides.)
    worker_timeout_s
        How long to wait, s, while no worker could run what is left to do.
    """

    def __init__(
        self, client: Client, *, retries: int = 2, worker_timeout_s: float = 600.0
    ) -> None:
        self.client = client
        self.retries = retries
        self.worker_timeout_s = worker_timeout_s

    def map(
        self,
        function: Callable[[Item], Any],
        items: Iterable[Item],
        kind: TaskKind,
        *,
        on_wait: Callable[[], None] | None = None,
    ) -> Iterator[tuple[Item, Any]]:
        """Run a function on every item and yield pairs as they finish, in any order.

        Items are drawn only as workers become free, so a generator can still adapt them.

        Parameters
        ----------
        function
            Importable on the workers.
        items
            Arguments, one for each task.
        kind
            Of worker.
        on_wait
            Called a few times a second while nothing finishes.

        Yields
        ------
        item, outcome
            The outcome is the result, or the exception that the task ended with.

        Raises
        ------
        WorkersLostError
            If there has been no worker for the tasks for too long.
        """
        resources = self._resources(kind)
        name = getattr(function, "func", function).__name__
        source = iter(items)
        running: dict[Future[Any], Item] = {}
        completed = as_completed([], loop=self.client.loop)
        last_fill = -math.inf

        def submit() -> bool:
            for item in source:
                future = self.client.submit(
                    partial(_attempt, function),
                    item,
                    key=f"{name}-{uuid4().hex}",  # Dask learns from the name how long tasks take
                    retries=self.retries,
                    resources=resources,
                )
                running[future] = item
                completed.add(future)
                return True
            return False

        def fill() -> None:
            # Workers may come while others work: a queue gives them one by one. To ask for them
            # after every task would be dear in a large cluster.
            nonlocal last_fill
            if time.monotonic() - last_fill < LOOK_EVERY_S:
                return
            last_fill = time.monotonic()
            while len(running) < 2 * self.n_workers(kind) and submit():
                pass

        try:
            fill()
            while running:
                future = self._next(completed, resources, fill, on_wait)
                item = running.pop(future)
                yield item, _outcome(future)
                future.release()
                # Only now, when the caller has kept the outcome: two tasks of each worker are all
                # that a kill can lose, and the next item is drawn with that outcome known.
                submit()
                fill()
        finally:
            self.client.cancel(list(running))

    def n_workers(self, kind: TaskKind) -> int:
        """Return how many tasks of a kind can run at once, at least one."""
        name = _RESOURCES[kind]
        workers = self._workers()
        offered = sum(int(worker["resources"].get(name, 0)) for worker in workers)
        return max(offered or sum(worker["nthreads"] for worker in workers), 1)

    def _resources(self, kind: TaskKind) -> dict[str, float]:
        name = _RESOURCES[kind]
        try:
            self.client.wait_for_workers(1, timeout=self.worker_timeout_s)
        except (TimeoutError, asyncio.TimeoutError) as error:  # one and the same from 3.11 on
            raise self._lost(name) from error
        if any(name in worker["resources"] for worker in self._workers()):
            return {name: 1.0}
        if any(worker["resources"] for worker in self._workers()):
            logger.warning("no worker offers %s yet: its tasks wait for one", name)
            return {name: 1.0}
        return {}

    def _next(
        self,
        completed: as_completed,
        resources: dict[str, float],
        fill: Callable[[], None],
        on_wait: Callable[[], None] | None,
    ) -> Future[Any]:
        """Wait for a task to finish, as long as there are workers that could do it."""
        last_seen = last_look = time.monotonic()
        while not completed.has_ready():
            time.sleep(0.05)
            now = time.monotonic()
            if now - last_look < LOOK_EVERY_S:
                continue
            last_look = now
            fill()
            if on_wait is not None:
                on_wait()
            if any(resources.keys() <= worker["resources"].keys() for worker in self._workers()):
                last_seen = now
            elif now - last_seen > self.worker_timeout_s:
                raise self._lost(", ".join(resources) or "any resource")
        future: Future[Any] = next(completed)
        return future

    def _lost(self, needed: str) -> WorkersLostError:
        return WorkersLostError(
            f"no Dask worker that offers {needed} for {self.worker_timeout_s:.0f} s. Start "
            f"workers (see workflows/README.md), then the same command again to go on."
        )

    def _workers(self) -> list[dict[str, Any]]:
        found = self.client.scheduler_info(n_workers=-1)
        if "workers" not in found:
            raise _disconnected()
        return list(found["workers"].values())


@contextmanager
def open_executor(
    config: DaskConfig, *, members: int = 1, device: str = "auto", client: Client | None = None
) -> Iterator[Executor]:
    """Open an executor on a client, on the scheduler of an address, or on a new LocalCluster.

    Parameters
    ----------
    config
        Address, or numbers of local workers.
    members
        Model tasks that may run at once.
    device
        Where they run: with "auto" and "cuda" new workers have a GPU each, as far as there are any.
    client
        Used as it is, and left open.

    Raises
    ------
    ConfigError
        If no scheduler answers at the address.
    """
    if client is not None:
        yield Executor(client, retries=config.retries, worker_timeout_s=config.worker_timeout_s)
        return
    if config.address is not None:
        with _connect(config.address) as remote:
            yield Executor(remote, retries=config.retries, worker_timeout_s=config.worker_timeout_s)
        return
    with (
        _local_cluster(config, members, device) as cluster,
        Client(cluster, set_as_default=False) as local,
    ):
        yield Executor(local, retries=config.retries, worker_timeout_s=config.worker_timeout_s)


def _connect(address: str) -> Client:
    for attempt in range(CONNECT_ATTEMPTS):
        time.sleep(min(attempt, 1))
        try:
            return Client(address, timeout=CONNECT_TIMEOUT_S, set_as_default=False)
        except AssertionError as error:  # of the client: a worker came while they shook hands
            logger.warning("connecting to %s failed: %r", address, error)
        except (OSError, ValueError) as error:
            raise ConfigError(f"no Dask scheduler answers at {address}: {error}") from error
    raise ConfigError(
        f"no Dask scheduler answers at {address}: connecting failed {CONNECT_ATTEMPTS} times"
    )


class _LocalWorkers(SpecCluster):
    """Workers of this machine; one that dies and does not come back is replaced.

    A Nanny starts its worker again, but not if that dies while it starts, and SpecCluster gives
    up a worker that is away for 15 s, as on a machine with much else to do: without this, tasks
    would wait for it for ever.
    """

    def _update_worker_status(self, op: str, msg: Any) -> None:
        super()._update_worker_status(op, msg)  # type: ignore[no-untyped-call]
        if op == "remove":
            asyncio.get_running_loop().call_later(REPLACE_AFTER_S, self._replace)

    def _replace(self) -> None:
        if self.status is Status.running:
            # Starts those that are no longer there.
            self.scale(len(self.worker_spec))  # type: ignore[no-untyped-call]


def _local_cluster(config: DaskConfig, members: int, device: str = "auto") -> SpecCluster:
    """Start label workers and model workers on this machine.

    A device of a name of its own ("cuda:1") is seen by all of the latter, one by default.
    Numeric libraries get one thread each (Dask's own default for Nanny processes), so that the
    workers do not fight for cores.
    """
    n_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    n_label = config.label_workers or n_cores or 1
    gpus = _gpu_names() if device in ("auto", "cuda") else []
    at_once = min(members, n_cores or 1) if device in ("auto", "cpu") else 1
    n_model = config.model_workers or len(gpus) or at_once
    workers: dict[str, Any] = {}
    for kind, count in (("label", n_label), ("model", n_model)):
        for number in range(count):
            env = {}
            if kind == "model" and gpus:
                env["CUDA_VISIBLE_DEVICES"] = gpus[number % len(gpus)]
            elif kind == "label":
                env["CUDA_VISIBLE_DEVICES"] = ""
            workers[f"{kind}-{number}"] = {
                "cls": Nanny,
                "options": {
                    "nthreads": 1,
                    "memory_limit": 0,
                    "resources": {_RESOURCES[kind]: 1},  # type: ignore[index]
                    "env": env,
                    "host": "127.0.0.1",
                    "dashboard": False,
                    # What fails in a task comes back as an exception. What else a worker logs is
                    # that a heartbeat failed, as the last one may when the cluster is closed.
                    "silence_logs": logging.CRITICAL,
                },
            }
    scheduler = {
        "cls": Scheduler,
        "options": {
            "host": "127.0.0.1",
            "port": 0,
            "dashboard": False,
            "dashboard_address": "127.0.0.1:0",  # else 8787, which another cluster may have
        },
    }
    return _LocalWorkers(  # type: ignore[no-untyped-call]
        workers=workers, scheduler=scheduler, silence_logs=logging.ERROR
    )


def _gpu_names() -> list[str]:
    """Return the GPUs that CUDA would show, without loading torch here."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name]
    try:
        return [str(n) for n in range(len(os.listdir("/proc/driver/nvidia/gpus")))]
    except OSError:
        return []


def _attempt(function: Callable[[Item], Any], item: Item) -> Any:
    """Run a task on a worker; what Dask should not try again is its result."""
    try:
        return function(item)
    except _FINAL as error:
        return error


def _outcome(future: Future[Any]) -> Any:
    if future.cancelled():  # by nobody here: the client does so when it loses its scheduler
        raise _disconnected()
    try:
        return future.result()
    except Exception as error:  # a task may fail with anything; the caller decides
        return error


def _disconnected() -> WorkersLostError:
    return WorkersLostError(
        "the connection to the Dask scheduler was lost. What was computed is kept: see that the "
        "scheduler runs, then start the same command again to go on."
    )
