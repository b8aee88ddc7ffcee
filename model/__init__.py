"""Granite on Megatron-Core: configuration, builder, layer spec, Hugging Face conversion, checkpoint merge."""
