"""Rewards that misbehave in every way that one can, and one that does not."""

import itertools
import os
import signal
import time
from collections import deque

from training.rewards import Options, Reward, RewardError, Sample, Score


class ShortOptions(Options):
    time_limit_seconds: float = 20.0
    refuse: bool = False


class Behave(Reward):
    """Does what the completion says."""

    options_type = ShortOptions
    options: ShortOptions

    def prepare(self) -> None:
        if self.options.refuse:
            raise RewardError("reward 'Behave' lacks a spoon; bring one")

    def score(self, sample: Sample) -> Score:
        order, _, argument = sample.completion.partition(" ")
        if order == "value":
            return Score(value=float(argument))
        if order == "slow":
            time.sleep(float(argument))
            return Score(value=1.0)
        if order == "crash":
            raise KeyError(argument)
        if order == "sleep":
            try:
                time.sleep(60)
            except Exception:  # a library that catches everything must not catch the time-out
                time.sleep(60)
        if order == "hang":
            deque(itertools.repeat(0), maxlen=0)  # for ever inside one C function that looks at no signal
        if order == "exit":
            os._exit(3)
        if order == "kill":
            os.kill(os.getpid(), signal.SIGSEGV)
        if order == "memory":
            return Score(value=float(len(bytearray(1 << 40)) > 0))
        if order == "nothing":
            return None
        if order == "print":
            print("junk on standard output")
            os.write(1, b"more junk\n")
            return Score(value=0.5)
        raise AssertionError(order)
