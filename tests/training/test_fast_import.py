"""What is left out of a training process is not there, and comes when it is asked for after all."""

import os
import subprocess
import sys

PROGRAM = """
import sys
from training.one_rank import import_megatron_on
import_megatron_on("cpu")
heavy = {"sympy", "torch._dynamo", "transformers", "torch._meta_registrations", "torch.fx.experimental.symbolic_shapes"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)

from torch.distributed.tensor._ops import _tensor_ops
assert "symbolic_shapes" not in _tensor_ops.statically_known_true.__code__.co_filename
assert _tensor_ops.statically_known_true(True) is True
from torch.fx.experimental import symbolic_shapes
assert symbolic_shapes.__file__ and "sympy" in sys.modules

import torch
import torch._meta_registrations
assert torch._meta_registrations.__file__
with torch.device("meta"):
    layer = torch.nn.Linear(3, 5)
    assert layer(torch.empty(2, 3)).shape == (2, 5)
    assert torch.nn.functional.scaled_dot_product_attention(*[torch.empty(1, 2, 4, 8)] * 3).shape == (1, 2, 4, 8)
"""


def test_what_is_left_out_can_be_imported_later() -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
