"""What to train: a Hydra tree of YAML, a typed schema, a linter and a planner. Imports nothing else of Quarry."""
