"""Evaluation of a finished model: held-out loss twice, retrieval in long context, and benchmarks by lm-evaluation-harness."""
