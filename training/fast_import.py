"""Start-up is most of a small run: this keeps out of a training process what it never uses, with no other effect on it.

Measured on 2 cores for a run of 20 steps with one checkpoint (Megatron-LM 0.19.2, torch 2.11.0): 12.2 s before, 3.9 s after, and then
another 1.4 s of CPU less by `without_unused_torch`.

    with fast_import.quick_imports(), fast_import.without_unused_torch():  # Python's cycle collector scans the growing heap: 0.4 s
        cpu_backend.install()                    # also keeps torch._dynamo out: 1.2 s
        import megatron.training
        # and training.token_ids instead of Megatron's tokenizers, which import transformers: 1.1 s
    fast_import.results_stay_in_process()        # unless checkpoints are saved asynchronously: 3.3 s
    ...
    fast_import.leave(0)                         # last statement of a rank; skips the tear-down of torch's modules: 0.6 s
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import logging
import os
import queue
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

_SHAPES = "torch.fx.experimental.symbolic_shapes"
_META_KERNELS = "torch._meta_registrations"


@contextlib.contextmanager
def quick_imports() -> Iterator[None]:
    """No garbage collection inside; what was made inside is exempt from collection afterwards, which also keeps pages shared
    between forked ranks."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()


@contextlib.contextmanager
def without_unused_torch() -> Iterator[None]:
    """Inside, torch is imported without symbolic shapes (which need sympy: 0.7 s) and without its Python kernels for meta tensors (0.5 s).

    For processes that compute on real CPU tensors. Both can be imported afterwards, where something wants them after all. Without effect
    when torch was imported before.
    """
    if "torch" in sys.modules:
        yield
        return
    stand_ins = {name: types.ModuleType(name) for name in (_SHAPES, _META_KERNELS)}
    stand_ins[_SHAPES].__getattr__ = _later(stand_ins[_SHAPES])  # type: ignore[method-assign]
    sys.modules.update(stand_ins)
    try:
        yield
    finally:
        for name, stand_in in stand_ins.items():
            if sys.modules.get(name) is stand_in:
                del sys.modules[name]
            package, _, attribute = name.rpartition(".")
            if vars(sys.modules.get(package, stand_in)).get(attribute) is stand_in:
                delattr(sys.modules[package], attribute)


def _later(stand_in: types.ModuleType) -> Callable[[str], Any]:
    """Names of a module that is imported when the first of its functions is called, or when anything but a function is asked for."""

    def real() -> types.ModuleType:
        if sys.modules.get(stand_in.__name__) is stand_in:
            del sys.modules[stand_in.__name__]
        return importlib.import_module(stand_in.__name__)

    def name_of(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if not name.islower():  # classes and constants
            return getattr(real(), name)

        def function(*arguments: Any, **options: Any) -> Any:
            return getattr(real(), name)(*arguments, **options)

        return function

    return name_of


def without_compiler() -> None:
    """Make `torch.compile` the identity before Megatron is imported, which applies it as a decorator: torch's compiler stays out (1.4 s).

    Only for processes that compute nothing on tensors, such as the one that builds index caches.
    """
    import torch

    def compile_nothing(model: Callable | None = None, **_: Any) -> Callable:
        return model if model is not None else lambda function: function

    torch.compile = compile_nothing


def results_stay_in_process() -> None:
    """Collect a synchronous checkpoint's write results in a queue of this process.

    Megatron collects them in a queue that lives in a process of its own, which it spawns at the first save and which imports the
    main module, and so Megatron, again. Only an asynchronous save, which writes from another process, needs that: do not call this then.
    Call it after `megatron.training` is imported.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    if filesystem_async._results_queue is None:
        filesystem_async._results_queue = queue.Queue()


def leave(code: int) -> NoReturn:
    """End the process now: flush and skip destructors and atexit handlers. Close writers and process groups before."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
