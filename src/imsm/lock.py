"""Calls of one model wait for each other: what a call sets on its modules is not for another thread's."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch


class CallLock:
    """A re-entrant lock. A copy of it, and what is pickled, is another one."""

    def __init__(self) -> None:
        self.inner: Any = threading.RLock()

    @property
    def held(self) -> bool:
        """Whether the present thread has it."""
        return bool(self.inner._is_owned())

    def __reduce__(self) -> tuple[type[CallLock], tuple[()]]:
        return CallLock, ()


def in_turn(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of a model, such that of the threads that call it, or another such method, one is within at a time."""

    @functools.wraps(method)
    def waiting(self: Any, *args: Any, **kwargs: Any) -> Any:
        # Lock and graph do not go together; whoever compiles a whole forward orders its calls.
        if torch.compiler.is_compiling():
            return method(self, *args, **kwargs)
        with self.call_lock.inner:
            return method(self, *args, **kwargs)

    return waiting
