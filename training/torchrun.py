"""torchrun for the ranks of one node, with two differences: their exit codes come through, and a request to stop leaves them time.

    python -m training.torchrun --stage-dir runs/x/stages/a [--grace-seconds 585] -- TORCHRUN_ARGUMENTS...

torchrun ends with 1 whatever a rank ended with; this ends with the most specific code of all ranks (training/rank_end.py), 128 + n for
signal n. On SIGTERM torch's agent kills what still runs 30 s later, for which it has no option, and ends with 1 even where every rank saved
and left: here the agent does not hear SIGTERM, SIGINT and SIGHUP. They are passed on to the ranks once, as SIGTERM; the ranks save and end
with 0, and so does this. Ranks that still run after the grace are killed; without a grace nothing kills them but who started this.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import sys
import time
from pathlib import Path
from types import FrameType

import psutil

from training import rank_end, stacks
from training.rank_end import RankEnd

REQUESTS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
OTHER_NODES_SECONDS = 3.0
"""How long a better cause is waited for from other nodes, whose files come through a network file system."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m training.torchrun", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stage-dir", type=Path, required=True, help="the ranks leave in it how they ended")
    parser.add_argument(
        "--grace-seconds", type=float, help="between a request to stop and the end of ranks that did not (default: no end)"
    )
    parser.add_argument("torchrun", nargs=argparse.REMAINDER, metavar="-- ARGUMENT", help="arguments of torchrun")
    options = parser.parse_args(argv)
    stacks.on_request()
    requests = Requests(options.grace_seconds)
    requests.install()

    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    words = options.torchrun[1:] if options.torchrun[:1] == ["--"] else options.torchrun
    arguments = run.parse_args(["--signals-to-handle", "SIGQUIT", *words])
    if arguments.node_rank == 0:
        rank_end.clear(options.stage_dir)  # no rank of any node starts before this node's agent is there
    try:
        run.run(arguments)
        return 0
    except ChildFailedError as error:
        failures = {rank: failure.exitcode for rank, failure in error.failures.items()}
    return ended(options.stage_dir, failures, several_nodes=arguments.nnodes != "1")


def ended(stage_dir: Path, failures: dict[int, int], *, several_nodes: bool) -> int:
    """The exit code for ranks of this node that ended with `failures` (rank -> code), by what all ranks have left."""
    now, host = time.time(), socket.gethostname()
    own = [RankEnd(rank=rank, exit_code=code, reason="", time=now, host=host) for rank, code in failures.items()]
    for end in own:
        if end.exit_code < 0:  # it could not say so itself, and other nodes want to know
            with contextlib.suppress(OSError):
                end.write(stage_dir / rank_end.FOLDER)
    deadline = time.monotonic() + (OTHER_NODES_SECONDS if several_nodes else 0.0)
    while True:
        left = rank_end.read_all(stage_dir)
        cause = rank_end.cause([*left, *(end for end in own if end.rank not in {one.rank for one in left})])
        assert cause is not None, "torchrun failed without a failure"
        specific = rank_end.specificity(cause.exit_code) < len(rank_end.MOST_SPECIFIC_FIRST)
        if specific or time.monotonic() >= deadline:
            break
        time.sleep(0.1)
    others = len({end.rank for end in (*left, *own)} - {cause.rank})
    print(f"{cause} on {cause.host}" + (f"; {others} more after it" if others else ""), file=sys.stderr, flush=True)
    return cause.exit_code if cause.exit_code > 0 else 128 - cause.exit_code


class Requests:
    """Passes the first request to stop on to the ranks, and ends them after the grace."""

    def __init__(self, grace_seconds: float | None) -> None:
        self.grace_seconds = grace_seconds
        self._passed_on = False

    def install(self) -> None:
        for number in REQUESTS:
            signal.signal(number, self._pass_on)
        signal.signal(signal.SIGALRM, self._kill)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        ranks = psutil.Process().children()
        if not ranks:
            sys.exit(128 + number)  # before the first rank was made, or after the last has ended
        if self._passed_on:
            return
        self._passed_on = True
        if self.grace_seconds is not None:
            signal.setitimer(signal.ITIMER_REAL, self.grace_seconds)
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank.pid, signal.SIGTERM)

    def _kill(self, number: int, frame: FrameType | None) -> None:
        ranks = psutil.Process().children()
        print(
            f"{len(ranks)} ranks did not end within {self.grace_seconds:g} s of the request to stop; killing them",
            file=sys.stderr,
            flush=True,
        )
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank.pid, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
