"""The one error that model/ raises for what a user can mend, importable without torch or Megatron."""


class ModelError(ValueError):
    """A model or checkpoint that cannot be built, read, converted or merged as asked.

    The message names the file or key, the value, what was expected and the remedy.
    """
