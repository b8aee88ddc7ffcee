"""Where training runs: the quarry command, the chain of stages, status and report. Never imports torch."""
