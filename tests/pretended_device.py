"""A device that is none: its tensors lie in the memory of the CPU and refuse those that are there.

Tests of what runs on a GPU, where there is none: an operation on tensors of both devices is an
error, as CUDA would have it, and every result has the values of the CPU. It calls itself "meta",
the one device beside the CPU that every build of torch knows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("meta")
aten = torch.ops.aten

#: Operations that take tensors of two devices.
_TRANSFERS = (aten._to_copy.default, aten.copy_.default)
#: Operations whose indices may lie on the CPU.
_INDEXED = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)


class Remote(torch.Tensor):
    """A tensor of the pretended device."""

    own: torch.Tensor

    @staticmethod
    def __new__(cls, own: torch.Tensor) -> Remote:
        """Hide a tensor of the CPU."""
        remote: Remote = torch.Tensor._make_wrapper_subclass(
            cls,
            own.shape,
            strides=own.stride(),
            storage_offset=own.storage_offset(),
            dtype=own.dtype,
            device=DEVICE,
        )
        remote.own = own
        return remote

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation that has such a tensor among its arguments."""
        return _run(func, args, kwargs or {})


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    is_remote = any(isinstance(tensor, Remote) for tensor in tensors)
    if is_remote and func not in _TRANSFERS:
        judged = [args[0], *args[2:3]] if func in _INDEXED else tensors
        strangers = [tensor for tensor in judged if not isinstance(tensor, Remote)]
        if any(tensor.dim() > 0 for tensor in strangers):  # numbers may come from the CPU
            raise RuntimeError(f"{func}: tensors of two devices: {[type(t) for t in tensors]}")
    if func is aten.copy_.default:
        is_remote = isinstance(args[0], Remote)
    elif kwargs.get("device") is not None:
        is_remote = torch.device(kwargs["device"]) == DEVICE
        kwargs = {**kwargs, "device": torch.device("cpu")}
    remotes = {id(tensor.own): tensor for tensor in tensors if isinstance(tensor, Remote)}

    def bare(leaf: Any) -> Any:
        return leaf.own if isinstance(leaf, Remote) else leaf

    def hidden(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or not is_remote:
            return leaf
        known = remotes.get(id(leaf))  # if it was changed in place
        return Remote(leaf) if known is None else known

    return tree_map(hidden, func(*tree_map(bare, args), **tree_map(bare, kwargs)))


class _Operations(TorchDispatchMode):
    """Operations without a tensor of the device, which may make one."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Makers(TorchFunctionMode):
    """What torch does without an operation that a dispatch mode would see."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        options = dict(kwargs or {})
        if func is torch.Tensor.tolist and isinstance(args[0], Remote):
            return args[0].detach().own.tolist()
        if func is torch.Tensor.new_tensor:
            options = {"dtype": args[0].dtype, "device": args[0].device, **options}
            func, args = torch.tensor, args[1:]
        if func in (torch.tensor, torch.as_tensor) and not isinstance(args[0], Remote):
            device = options.pop("device", None)
            return func(*args, **options).to(device)
        return func(*args, **options)


@contextmanager
def pretended_device() -> Iterator[str]:
    """Make the device, and give its name."""
    with _Operations(), _Makers():
        yield str(DEVICE)
