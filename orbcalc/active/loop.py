"""The active-learning loop: one round at a time, everything it needs to know on disk.

A round::

    pool      structures from files, and from MD with the committee of the last round; all of
              them get cheap labels if these are asked for
    audit     a uniform sample of the unlabelled is labelled, part by part until it decides, and
              compared with the predictions that this committee made before; the certificate
              follows from that, and ends the run
    batch     otherwise the hardest structures are labelled too
    train     and a new committee is trained on everything labelled so far, with the cheap
              labels of the whole pool if they are asked for

The first round has neither a committee nor an audit. Where few energies are to be learned above
cheap labels of the whole pool, features are learned from these first: then its batch is what
tells most about the pool, not a random one, and training means to fit a process.

At the end, every structure of the pool has a label or a prediction of the released model in one
file (:mod:`orbcalc.active.output`).

Every step (:mod:`orbcalc.active.round`) writes its result to the run folder and is skipped where
that exists, so *resume* and *run* are the same code: a run that was killed anywhere goes on by
being started again, computes no stored label twice, and makes the same decisions.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import orbcalc
from orbcalc.active.certificate import Certificate, Look
from orbcalc.active.decisions import reason_to_end
from orbcalc.active.executor import Executor, open_executor
from orbcalc.active.folder import RunFolder
from orbcalc.active.inputs import Inputs, read_inputs
from orbcalc.active.output import write_output
from orbcalc.active.quantities import QUANTITIES
from orbcalc.active.round import Notify, Round
from orbcalc.config import RunConfig, resolve_paths
from orbcalc.files import read_json, replace_file
from orbcalc.labels.store import LabelStore

if TYPE_CHECKING:
    from distributed import Client

__all__ = ["ActiveLearning", "run"]

logger = logging.getLogger(__name__)


def run(
    config: RunConfig, *, client: Client | None = None, notify: Notify | None = None
) -> Certificate:
    """Run the loop to its end, or go on with it.

    Parameters
    ----------
    config
        See `RunConfig`; the folder it names holds everything that is known about the run.
    client
        Dask client; by default what ``config.dask`` says.
    notify
        Receives every event, and the progress of labels and training.

    Returns
    -------
    Certificate
        Certified or not; `Certificate.reason` says why the run ended.

    Raises
    ------
    ConfigError
        If the folder holds another run or one of files that have changed, if another process is
        at work in it, or the configuration cannot work.
    OrbcalcError
        If labels or models cannot be made at all; the folder stays resumable.
    """
    folder = RunFolder(config.output)
    with folder.locked():
        return _run(resolve_paths(config, Path.cwd()), folder, client, notify)


def _run(
    config: RunConfig, folder: RunFolder, client: Client | None, notify: Notify | None
) -> Certificate:
    folder.prepare(config)
    done = None
    if folder.certificate.exists():
        done = Certificate.from_json(folder.certificate.read_text(encoding="utf-8"))
        if not done.certified and _limits_were_raised(done, config, folder):
            # They speak of an end that is none any more; the certificate is what tells of an end.
            folder.results.unlink(missing_ok=True)
            folder.certificate.unlink()
            done = None
        elif folder.results.exists():
            return done
    # Before any worker is started: they may be dear to get.
    inputs = None if folder.round(0).pool.exists() else read_inputs(config, folder)
    with open_executor(
        config.dask, members=config.committee, device=config.device, client=client
    ) as executor:
        learning = ActiveLearning(config, folder, executor, notify, inputs=inputs)
        return learning.run() if done is None else learning.finish(done)


class ActiveLearning:
    """The loop on an executor; see the module for the anatomy of a round.

    ``inputs`` are read when they are needed, unless they are given.
    """

    def __init__(
        self,
        config: RunConfig,
        folder: RunFolder,
        executor: Executor,
        notify: Notify | None = None,
        *,
        inputs: Inputs | None = None,
    ) -> None:
        self.config, self.folder, self.executor = config, folder, executor
        self.notify: Notify = notify or (lambda record: None)
        self.store = LabelStore(folder.labels)
        self._inputs = inputs

    def run(self) -> Certificate:
        """Do rounds until one of them ends the run."""
        number = 0
        while (certificate := self.step(number)) is None:
            number += 1
        certificate.write(self.folder.certificate)
        return self.finish(certificate)

    def finish(self, certificate: Certificate) -> Certificate:
        """Write the output of a run that ended with a certificate; see `output.write_output`."""
        sources = write_output(self.executor, self.folder, self.store, certificate, self.config)
        record = self.folder.event(
            "finished",
            reason=certificate.reason,
            statement=certificate.statement,
            sources=sources,
        )
        logger.info("%s", record)
        self.notify(record)
        return certificate

    def step(self, number: int) -> Certificate | None:
        """Do one round, or what is left of it; returns a certificate if the run ends here."""
        this = Round(number, self.config, self.folder, self.store, self.executor, self.notify)
        if this.is_done:
            return None
        pool = this.grow_pool(self._inputs)
        self._inputs = None  # they are in the folder now
        this.label_pool(pool)
        this.learn_features(pool)
        selection = this.select(pool)
        look = None
        if number > 0:
            look = this.look(selection, pool)
            md, rules = self.config.pool.md, self.config.certificate
            grows = md is not None and number + 1 < md.rounds
            reason = reason_to_end(look, self.config.stop, rules, grows=grows)
            if reason is not None:
                return self._release(reason, [*self._earlier_looks(number), look], pool)
        this.select_batch(selection, pool)
        this.label("batch", [pool[key] for key in selection["batch"]])
        this.train(pool)
        this.finish(pool, look)
        return None

    def _earlier_looks(self, number: int) -> list[Look]:
        summaries = [read_json(self.folder.round(k).summary) for k in range(1, number)]
        return [Look(**summary["look"]) for summary in summaries]

    def _release(self, reason: str, looks: Sequence[Look], pool: Iterable[str]) -> Certificate:
        """Release the model of the last look, and say what is known about it."""
        keys = sorted(pool)
        data = self.folder.round(looks[-1].look - 1).model.read_bytes()
        replace_file(self.folder.model, data)
        options = self.config.certificate
        quantity = QUANTITIES[options.quantity]
        return Certificate(
            reason=reason,
            looks=tuple(looks),
            tolerance=options.tolerance,
            quantity=f"{quantity.name}, {quantity.unit.removesuffix('/atom')}",
            gamma=options.accuracy,
            delta=options.delta,
            seed=self.config.seed,
            n_pool=len(keys),
            pool_hash=hashlib.sha256("".join(keys).encode()).hexdigest()[:16],
            model_hash=hashlib.sha256(data).hexdigest()[:16],
            version=orbcalc.__version__,
            mean_error=options.mean_error,
        )


def _limits_were_raised(done: Certificate, config: RunConfig, folder: RunFolder) -> bool:
    """Tell whether a run that ended without a certificate may now go on."""
    stop = config.stop
    if done.reason == "max_rounds":
        return len(done.looks) < stop.max_rounds
    if done.reason == "max_labels":
        return (
            stop.max_labels is None
            or len(LabelStore(folder.labels).keys("reference")) < stop.max_labels
        )
    return False
