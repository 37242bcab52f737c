"""Labels for many structures, through an executor into a store."""

from __future__ import annotations

import logging
import math
import threading
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from ase import Atoms

from orbcalc.active.executor import Executor, open_executor
from orbcalc.config import DaskConfig, LabelConfig
from orbcalc.errors import LabelConflictError, LabelError
from orbcalc.labels.compute import label_kinds, label_provenance
from orbcalc.labels.label import Kind, Label, LabelStatus
from orbcalc.labels.process import WorkerProcess, label_structures
from orbcalc.labels.reference import (
    check_file_labels,
    contradiction,
    refuse_unlike_copies,
    wanted_quantities,
)
from orbcalc.labels.sources import look_over
from orbcalc.labels.store import FILE_KEYS, LABEL_KEYS, METHOD_KEYS, LabelStore
from orbcalc.structures import check_structure, structure_key, unique_structures

if TYPE_CHECKING:
    from distributed import Client

__all__ = [
    "LabelTask",
    "all_failed",
    "label",
    "label_chunk",
    "label_into_store",
    "refuse_all_failed",
    "relabelled",
    "worker_process",
]

logger = logging.getLogger(__name__)

#: Structures of a task at most, so that little is lost when a worker dies.
MAX_CHUNK = 64

#: So many labels do not all fail by themselves.
MANY = 10

LabelTask = tuple[list[Atoms], LabelConfig, tuple[Kind, ...]]
#: Receives the number of structures done, the number in all, and the labels just made.
Progress = Callable[[int, int, Sequence[Label]], None]

_local = threading.local()


def label(
    structures: Sequence[Atoms],
    reference: LabelConfig | str | None = None,
    *,
    client: Client | None = None,
    store: str | Path | None = None,
    progress: Progress | None = None,
) -> list[Atoms]:
    """Label structures and return them with their labels.

    Parameters
    ----------
    structures
        Molecules and crystals; ``info["charge"]`` and ``info["spin"]`` are read.
    reference
        The configuration of the labels, or the name of the reference calculator alone
        ("GFN2-xTB", "pyscf", "file", "package.module:Name").
    client
        Dask client whose workers compute; by default a LocalCluster for the time of the call.
    store
        Label store to add to (``.db`` or ``.aselmdb``); labels that are there are not computed
        again. By default a temporary one.
    progress
        Called as labels arrive.

    Returns
    -------
    list of Atoms
        Copies, in the given order, with these labels and no others. What failed has none;
        ``info["reference_status"]`` and ``info["charges_status"]`` say how each ended.

    Raises
    ------
    StructureError
        If a structure cannot be computed at all.
    LabelError
        If labels cannot be made or stored.
    """
    config = reference if isinstance(reference, LabelConfig) else _config(reference)
    for number, atoms in enumerate(structures):
        check_structure(atoms, f"structure {number}")
    config = look_over(structures, config)
    folder = nullcontext(None) if store is not None else TemporaryDirectory()
    with folder as path, open_executor(DaskConfig(model_workers=1), client=client) as executor:
        labels = LabelStore(store if store is not None else Path(str(path)) / "labels.db")
        label_into_store(executor, structures, config, labels, progress=progress)
        keys = [structure_key(atoms) for atoms in structures]
        stored = labels.labelled_atoms(keys)
        kinds = label_kinds(config)
        result = [relabelled(*pair, kinds) for pair in zip(structures, stored, strict=True)]
        for key, atoms in zip(keys, result, strict=True):
            for kind in kinds:
                atoms.info[f"{kind}_status"] = str(labels.status(key, kind) or "missing")
    return result


def relabelled(atoms: Atoms, stored: Atoms, kinds: Collection[Kind]) -> Atoms:
    """Return a copy of a structure with some labels of a stored one in the place of all its own."""
    copy: Atoms = atoms.copy()
    left_out = {key for (kind, _), (_, key) in FILE_KEYS.items() if kind not in kinds}
    left_out |= {key for kind, key in METHOD_KEYS.items() if kind not in kinds}
    for own, found in ((copy.info, stored.info), (copy.arrays, stored.arrays)):
        for name in LABEL_KEYS & own.keys():
            del own[name]
        own.update({name: found[name] for name in (LABEL_KEYS - left_out) & found.keys()})
    return copy


def label_into_store(
    executor: Executor,
    structures: Sequence[Atoms],
    config: LabelConfig,
    store: LabelStore,
    *,
    kinds: tuple[Kind, ...] | None = None,
    retry_failed: bool = False,
    progress: Progress | None = None,
    on_wait: Callable[[], None] | None = None,
) -> Counter[str]:
    """Compute the labels that a store does not have, and store each as it arrives.

    Parameters
    ----------
    executor
        Its label workers are used.
    structures, config
        What to label, and how.
    store
        Where labels are kept.
    kinds
        By default those of the configuration.
    retry_failed
        Try again what failed before; otherwise failures in the store count as done.
    progress, on_wait
        Called as labels arrive, and while none does.

    Returns
    -------
    Counter
        Of the statuses of the new labels.

    Raises
    ------
    LabelConflictError
        If the store holds labels of another method, program or settings, whether or not one is
        missing; of another version only when the first new one comes.
    LabelError
        If labels cannot be made: a wrong calculator, a full disk.
    """
    kinds = kinds or label_kinds(config)
    if "reference" in kinds and config.reference.calculator == "file":
        check_file_labels(structures, config)
        _refuse_contradictions(structures, config, store)
    for kind in kinds:
        _refuse_other_method(kind, config, store)
    groups = _missing(structures, kinds, config, store, retry_failed)
    n_missing, done = sum(len(group) for group in groups.values()), 0
    statuses: Counter[str] = Counter()
    for needed, group in groups.items():
        chunks = _Chunks(group, config.chunk_s, executor.n_workers("label"))
        tasks = _tasks(chunks, config, needed)
        for (chunk, _, _), outcome in executor.map(label_chunk, tasks, "label", on_wait=on_wait):
            if isinstance(outcome, Exception):
                outcome = _lost_labels(chunk, needed, config, outcome)
            store.add_many(zip(chunk, outcome, strict=True))
            new = [item for labels in outcome for item in labels]
            statuses.update(str(item.status) for item in new)
            done += len(chunk)
            chunks.learn(outcome)
            if progress is not None:
                progress(done, n_missing, new)
    return statuses


def all_failed(store: LabelStore, keys: Sequence[str]) -> bool:
    """Tell whether many reference labels were made, and none came out well."""
    statuses = {store.status(key, "reference") for key in keys}
    return len(keys) >= MANY and statuses.isdisjoint({None, LabelStatus.ok})


def refuse_all_failed(store: LabelStore, keys: Sequence[str]) -> None:
    """Raise where it is not the structures that are wrong, but the calculator.

    Raises
    ------
    LabelError
        With the message of the first label.
    """
    if all_failed(store, keys):
        first = store.get(keys[0], "reference")
        assert first is not None
        raise LabelError(
            f"none of {len(keys)} reference labels came out well; the first: {first.status}, "
            f"{first.message}. Mend what is wrong with {first.provenance}, then start the same "
            f"command again, which tries them again."
        )


def _missing(
    structures: Sequence[Atoms],
    kinds: tuple[Kind, ...],
    config: LabelConfig,
    store: LabelStore,
    retry_failed: bool,
) -> dict[tuple[Kind, ...], list[Atoms]]:
    """Group structures by the labels that they lack, or that lack what is asked for now."""
    groups: dict[tuple[Kind, ...], list[Atoms]] = {}
    for key, atoms in unique_structures(structures).items():
        needed = tuple(
            kind for kind in kinds if _is_missing(key, atoms, kind, config, store, retry_failed)
        )
        if needed:
            groups.setdefault(needed, []).append(atoms)
    return groups


def _is_missing(
    key: str,
    atoms: Atoms,
    kind: Kind,
    config: LabelConfig,
    store: LabelStore,
    retry_failed: bool,
) -> bool:
    status = store.status(key, kind)
    if status != LabelStatus.ok:
        return status is None or retry_failed
    return kind != "charges" and not store.has(key, kind, wanted_quantities(atoms, config))


def _refuse_other_method(kind: Kind, config: LabelConfig, store: LabelStore) -> None:
    """Refuse a store whose labels are not those asked for, before any is computed or taken."""
    known = store.provenance(kind)
    if known is None:
        return
    try:
        asked = label_provenance(kind, config)
    except LabelError:  # the program is there on the workers only, and so its version in any case
        return
    store.refuse_other(kind, replace(asked, version=known.version))


def _refuse_contradictions(
    structures: Sequence[Atoms], config: LabelConfig, store: LabelStore
) -> None:
    """Refuse labels from files that contradict each other, or what the store took from files."""
    unique = refuse_unlike_copies(structures, config)
    keys = [key for key in unique if store.has(key, "reference")]
    for key, stored in zip(keys, store.labelled_atoms(keys), strict=True):
        name = contradiction(stored, unique[key], wanted_quantities(unique[key], config))
        if name is not None:
            raise LabelConflictError(
                f"{stored.get_chemical_formula()} ({key[:12]}) has another label ({name}) "
                f"than in {store.path}, where it was stored before. Use another store, or "
                f"the labels of before."
            )


def _tasks(
    chunks: Iterable[list[Atoms]], config: LabelConfig, kinds: tuple[Kind, ...]
) -> Iterator[LabelTask]:
    for chunk in chunks:
        yield chunk, config, kinds


def label_chunk(task: LabelTask) -> list[list[Label]]:
    """Label some structures on a worker, in its torch-free child process."""
    structures, config, kinds = task
    return list(label_structures(worker_process(), structures, config, kinds))


def worker_process() -> WorkerProcess:
    """Return the child process of this thread, which outlives tasks."""
    if not hasattr(_local, "process"):
        _local.process = WorkerProcess()
    process: WorkerProcess = _local.process
    return process


class _Chunks:
    """Divide structures into tasks of about equal time, learning the time as labels arrive."""

    def __init__(self, structures: list[Atoms], chunk_s: float, n_workers: int) -> None:
        self._waiting = deque(structures)
        self._chunk_s, self._n_workers = chunk_s, n_workers
        self._seconds = math.inf  # for a structure

    def __iter__(self) -> Iterator[list[Atoms]]:
        while self._waiting:
            # At the end every worker should still have something to do.
            fair = len(self._waiting) // (2 * self._n_workers)
            size = min(fair, MAX_CHUNK, int(self._chunk_s / self._seconds))
            yield [self._waiting.popleft() for _ in range(max(size, 1))]

    def learn(self, labels: Sequence[Sequence[Label]]) -> None:
        """Take note of how long each structure of a task took; failures say nothing of that."""
        times = [
            sum(item.wall_time_s for item in own)
            for own in labels
            if all(item.status in (LabelStatus.ok, LabelStatus.timeout) for item in own)
        ]
        if times:
            mean = max(sum(times) / len(times), 1e-6)
            known = math.isfinite(self._seconds)
            self._seconds = 0.7 * self._seconds + 0.3 * mean if known else mean


def _lost_labels(
    chunk: Sequence[Atoms], kinds: Sequence[Kind], config: LabelConfig, error: Exception
) -> list[list[Label]]:
    """Record the labels of a task whose worker died again and again; raise anything else."""
    if type(error).__name__ != "KilledWorker":
        raise (
            error
            if isinstance(error, LabelError | ValueError)
            else LabelError(f"labelling failed: {error!r}")
        ) from error
    logger.error("a label worker died: %s", error)
    return [
        [
            Label(
                structure_key(atoms),
                kind,
                LabelStatus.crashed,
                label_provenance(kind, config),
                message=f"the worker died: {error}",
            )
            for kind in kinds
        ]
        for atoms in chunk
    ]


def _config(reference: str | None) -> LabelConfig:
    data: dict[str, Any] = {} if reference is None else {"reference": {"calculator": reference}}
    return LabelConfig.model_validate(data)
