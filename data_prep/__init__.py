"""From raw text to tokenized, verified data sets: one view per phase of the curriculum."""
