"""Stand-in for Transformer Engine's FusedAdam where it is precision-aware: what it allocates, saves and takes back, not how it steps.

Written after Transformer Engine 2.17.1, pytorch/optimizers/fused_adam.py: `_initialize_state`, `get_unscaled_state`, `set_scaled_state`,
`load_state_dict`. Import it after Megatron.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import torch
from megatron.core import optimizer as optimizers
from megatron.core import utils
from megatron.core.optimizer import distrib_optimizer

from training import cpu_optimizer


class FusedAdam(cpu_optimizer.FusedAdam):
    def __init__(
        self,
        params: Any,
        *,
        master_weights: bool = False,
        master_weight_dtype: torch.dtype = torch.float32,
        exp_avg_dtype: torch.dtype = torch.float32,
        exp_avg_sq_dtype: torch.dtype = torch.float32,
        use_decoupled_grad: bool = False,
        store_param_remainders: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(params, **options)
        assert use_decoupled_grad == master_weights
        self.remainders = store_param_remainders and master_weights and master_weight_dtype == torch.float32
        self.dtypes = {"exp_avg": exp_avg_dtype, "exp_avg_sq": exp_avg_sq_dtype}
        if master_weights:
            self.dtypes["master_param"] = master_weight_dtype
        self.scales: dict[tuple[torch.Tensor, str], torch.Tensor] = {}

    def initialize_state(self, parameter: torch.Tensor) -> None:
        for name, dtype in self.dtypes.items():
            kept = torch.int16 if self.remainders and name == "master_param" else dtype
            self.state[parameter][name] = torch.zeros_like(parameter, dtype=kept)
            if dtype != torch.float32:
                self.scales[parameter, name] = torch.ones(1, dtype=torch.float32, device=parameter.device)

    def get_unscaled_state(self, parameter: torch.Tensor, name: str) -> torch.Tensor:
        state = self.state[parameter][name]
        if self.dtypes[name] == torch.float32:
            return state
        return state.float() * self.scales[parameter, name] if state.dtype == torch.float16 else state.float()

    def set_scaled_state(self, parameter: torch.Tensor, name: str, value: torch.Tensor) -> None:
        assert value.dtype == (torch.int16 if self.remainders and name == "master_param" else torch.float32)
        if name not in self.state[parameter]:
            self.initialize_state(parameter)
        state = self.state[parameter][name]
        if state.dtype == torch.float16:
            scale = self.scales[parameter, name]
            scale.copy_(value.abs().max() / (torch.finfo(torch.float16).max / 2))
            value = value / scale
        state.copy_(value)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        ordered = [p for group in self.param_groups for p in group["params"]]
        for index, values in state_dict["state"].items():
            self.state[ordered[index]] = {}
            for name, value in values.items():
                whole = value if self.remainders and name == "master_param" else value.float()
                self.set_scaled_state(ordered[index], name, whole)


def install() -> None:
    """For this process: Megatron, which has been imported without Transformer Engine, finds its optimizer."""
    for name in ("transformer_engine", "transformer_engine.pytorch", "transformer_engine.pytorch.optimizers"):
        sys.modules[name] = ModuleType(name)
    sys.modules["transformer_engine.pytorch.optimizers"].FusedAdam = FusedAdam
    optimizers.Adam = distrib_optimizer.Adam = FusedAdam
    utils._te_version = utils.PkgVersion("2.17.1")
