"""What runs inside a job: recipe to Megatron arguments, schedules, hand-off, CPU backend, pre-training."""
