"""torch._dynamo, imported when something is compiled.

PyTorch's optimisers import it, which takes as long as importing PyTorch, to keep themselves out of
graphs. A stand-in does that much; whoever wants anything else of it gets the module.
"""

import sys
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any

import torch

DYNAMO = "torch._dynamo"


def import_dynamo_late() -> None:
    """From now on, unless it is there already. A process group is to be made before: it asks."""
    if DYNAMO not in sys.modules:
        package: Any = torch
        sys.modules[DYNAMO] = package._dynamo = _Later(DYNAMO)


class _Later(ModuleType):
    """What eager optimisers want of it; for the rest, itself."""

    @staticmethod
    def disable(function: Callable | None = None, *_: Any, **__: Any) -> Callable:
        return function or (lambda later: later)

    @staticmethod
    def graph_break(*_: Any, **__: Any) -> None:
        """There is no graph."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__path__":  # asked of every module, by `inspect`
            raise AttributeError(name)
        if sys.modules.get(DYNAMO) is self:
            package: Any = torch
            del sys.modules[DYNAMO], package._dynamo
        return getattr(import_module(DYNAMO), name)
