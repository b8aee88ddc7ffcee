"""Start-up is most of a small run: this keeps out of a training process what it never uses, with no other effect on it.

Measured on 2 cores for a run of 20 steps with one checkpoint (Megatron-LM 0.19.2, torch 2.11.0): 12.2 s before, 3.9 s after.

    with fast_import.quick_imports():            # Python's cycle collector scans the growing heap over and over: 0.4 s
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
import logging
import os
import queue
import sys
from collections.abc import Callable, Iterator
from typing import Any, NoReturn


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
