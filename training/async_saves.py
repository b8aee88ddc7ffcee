"""Megatron-Core's asynchronous checkpoint writer, made fit for ranks on the CPU and for ranks that are killed.

A process beside each rank writes the rank's files, and the rank's main process finishes the checkpoint (metadata, tracker) at a later step,
when all ranks' writers are done. Megatron starts the writer from a fork server, where `torch.cuda` has no device; on the CPU it is forked from
the rank itself, before it has process groups or threads.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import signal
from multiprocessing.managers import SyncManager
from typing import Any

PR_SET_PDEATHSIG = 1


def install() -> None:
    """For ranks on the CPU backend, before Megatron is initialised. May be called again."""
    import megatron.training.initialize as initialize
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

    if getattr(PersistentAsyncCaller, "is_forked", False):
        return
    PersistentAsyncCaller.is_forked = True
    start, loop = initialize.init_persistent_async_worker, PersistentAsyncCaller.async_loop

    def forked(rank: int, mp_mode: str = "fork") -> None:
        if filesystem_async._results_queue is None:
            manager = SyncManager(ctx=multiprocessing.get_context("fork"))
            manager.start(initializer=_end_with_the_rank)
            filesystem_async._results_queue = manager.Queue()
            PersistentAsyncCaller.results_manager = manager  # ends when nothing refers to it
        start(rank, "fork")

    def ends_with_its_rank(*args: Any) -> None:
        _end_with_the_rank()
        loop(*args)

    initialize.init_persistent_async_worker = forked
    PersistentAsyncCaller.async_loop = staticmethod(ends_with_its_rank)


def _end_with_the_rank() -> None:
    """In a child of a rank: a writer that outlived a killed rank could write into a checkpoint of the rank that comes next.

    A stage that is asked to stop, by a signal to all its processes, saves first.
    """
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl failed")
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
