"""`mace_run_train` with an end after a given time.

MACE ends a training by its number of epochs only. Its own loop is run here, from its own command
line, and left between two epochs, when the checkpoint of the last one is on disk.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mace.tools
import numpy as np
import torch
from mace.cli import run_train
from mace.tools import CheckpointState

__all__ = ["measure", "train"]

#: The module; `mace.tools.train` is the function of that name.
_loop: Any = sys.modules["mace.tools.train"]

#: Cost of an evaluation in the validation, in steps of training.
_VALIDATION = 0.5


class _Left(Exception):  # noqa: N818  (no error: the way out of MACE's loop)
    pass


class _Clock:
    """Counts epochs and steps of MACE's loop, and leaves it when it has had enough."""

    def __init__(self, seconds: float, max_steps: int | None = None) -> None:
        self.end = time.monotonic() + seconds
        self.max_steps = max_steps
        self.epochs: list[int] = []
        self.steps: list[float] = []
        self.setting: dict[str, Any] = {}
        self.complete = False

    def train(self, **setting: Any) -> None:
        self.setting = setting
        try:
            self.own_train(**setting)
            self.complete = True
        except _Left:
            pass
        # What `mace_run_train` does after its loop takes long and is not needed.
        raise _Left

    def train_one_epoch(self, **setting: Any) -> None:
        if self.epochs and time.monotonic() > self.end:
            raise _Left
        self.own_epoch(**setting)
        self.epochs.append(setting["epoch"])

    def take_step(self, **setting: Any) -> Any:
        start = time.perf_counter()
        result = self.own_step(**setting)
        self.steps.append(time.perf_counter() - start)
        if len(self.steps) == self.max_steps:
            raise _Left
        return result

    @contextmanager
    def watching(self) -> Iterator[None]:
        self.own_train, self.own_epoch = mace.tools.train, _loop.train_one_epoch
        self.own_step = _loop.take_step
        mace.tools.train, _loop.train_one_epoch = self.train, self.train_one_epoch
        _loop.take_step = self.take_step
        try:
            yield
        except _Left:
            pass
        finally:
            mace.tools.train, _loop.train_one_epoch = self.own_train, self.own_epoch
            _loop.take_step = self.own_step


def train(arguments: list[str], seconds: float, path: str) -> dict[str, Any]:
    """Train, or go on training, and save the best model.

    Parameters
    ----------
    arguments
        Of `mace_run_train`.
    seconds
        After which no epoch is begun; at least one is made.
    path
        Where the model is written: the best of the second stage, before that of the first.
    """
    start = time.monotonic()
    clock = _Clock(seconds)
    options = mace.tools.build_default_arg_parser().parse_args(arguments)
    with clock.watching():
        run_train.run(options)
    setting = clock.setting
    state = CheckpointState(setting["model"], setting["optimizer"], setting["lr_scheduler"])
    second_stage = any(Path(options.checkpoints_dir).glob("*_swa.pt"))
    setting["checkpoint_handler"].load_latest(state, swa=second_stage, device=setting["device"])
    torch.save(setting["model"], path)
    return {
        "seconds": time.monotonic() - start,
        "epochs": len(clock.epochs),
        "at_epoch": clock.epochs[-1] + 1 if clock.epochs else setting["start_epoch"],
        "complete": clock.complete,
    }


def measure(arguments: list[str], steps: int) -> float:
    """Return the seconds that an epoch takes, from a few steps of it."""
    clock = _Clock(float("inf"), steps)
    with clock.watching():
        run_train.run(mace.tools.build_default_arg_parser().parse_args(arguments))
    n_valid = sum(len(loader) for loader in clock.setting["valid_loaders"].values())
    n_batches = len(clock.setting["train_loader"])
    return float(np.median(clock.steps[1:])) * (n_batches + _VALIDATION * n_valid)
