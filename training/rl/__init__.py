"""Reinforcement learning inside a Megatron job: on-policy GRPO with the DAPO loss."""
