"""A reward that fails for every text that begins with an even digit."""

from training.rewards import Options, Reward, Sample, Score


class Sometimes(Reward):
    options_type = Options

    def score(self, sample: Sample) -> Score:
        if sample.completion[:1] in tuple("02468"):
            raise OSError("not this one")
        return Score(value=len(sample.completion) / 100)
