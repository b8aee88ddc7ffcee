"""Unmodified Megatron trains on a machine without a GPU because this presents `torch.cuda` as the CPU, under gloo.

Megatron-LM 0.19.2 creates tensors on "cuda", reads CUDA memory statistics and draws from CUDA generators unconditionally. Each of
these names is bound here to its CPU meaning, so that the real training loop, and no imitation of it, runs in tests and smoke runs.

    from training import cpu_backend
    cpu_backend.install()                # before anything imports megatron
    import megatron.training

`install` may be called again (it does nothing then), and before the process forks into ranks: nothing in it depends on the rank, and
no thread is started. It refuses when CUDA is really present, and when megatron was imported already: `torch.compile` is applied
as a decorator while megatron is imported.

Plain replacement of functions is used and no TorchFunctionMode: a mode is not active inside nested backward passes, which activation
recomputation uses.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import gc
import os
import sys
import time
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.utils._device

MEMORY_BYTES = 8 << 30
"""What the pretended device reports as its memory; Megatron prints it and decides nothing by it."""

_FACTORIES = [
    "tensor",
    "as_tensor",
    "empty",
    "zeros",
    "ones",
    "full",
    "rand",
    "randn",
    "randint",
    "randperm",
    "arange",
    "linspace",
    "eye",
    "empty_strided",
    "scalar_tensor",
    "empty_like",
    "zeros_like",
    "ones_like",
    "full_like",
    "rand_like",
    "randn_like",
]
_TENSOR_FACTORIES = ["new_tensor", "new_empty", "new_zeros", "new_ones", "new_full"]


def install() -> None:
    """Bind `torch.cuda` and every spelling of a CUDA device to the CPU, then the four places of Megatron that need more.

    Raises RuntimeError when a GPU is present, or when megatron was imported before.
    """
    if installed():
        return
    if torch.cuda.is_available():
        raise RuntimeError(
            "training.cpu_backend: this machine has a CUDA device; set cluster.gpu to what it is, or hide it "
            "with CUDA_VISIBLE_DEVICES=''"
        )
    if "megatron.core" in sys.modules:
        raise RuntimeError("training.cpu_backend: megatron is imported already; call install() before the first import of it")
    _patch_compile()
    _patch_cuda()
    _patch_tensors()
    torch.cuda.is_cpu_backend = True
    _patch_megatron()


def installed() -> bool:
    return getattr(torch.cuda, "is_cpu_backend", False)


def to_cpu(device: Any) -> Any:
    """`device` with any spelling of a CUDA device (string, torch.device, index) replaced by the CPU."""
    if isinstance(device, torch.device):
        return torch.device("cpu") if device.type == "cuda" else device
    if isinstance(device, str):
        return "cpu" if device.startswith("cuda") else device
    if isinstance(device, int) and not isinstance(device, bool):
        return torch.device("cpu")
    return device


def _on_cpu(function: Callable) -> Callable:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("device") is not None:
            kwargs["device"] = to_cpu(kwargs["device"])
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return function(*args, **kwargs)

    return wrapper


def _const(value: Any) -> Callable:
    """A new function each time: dynamo's trace rules refuse one function object under two names of torch.cuda."""
    return lambda *args, **kwargs: value


def _patch_compile() -> None:
    """`torch.compile` is the identity: compiling for the CPU would import inductor and start a C++ compiler.

    As nothing is compiled, nothing need be hidden from the compiler either: functions that torch has decorated with
    `_disable_dynamo` would import torch._dynamo (1.2 s) at their first call, the optimizer's constructor among them.
    """

    def compile_nothing(model: Callable | None = None, **_: Any) -> Callable:
        return model if model is not None else lambda function: function

    def disable_nothing(fn: Callable | None = None, recursive: bool = True) -> Callable:
        return fn if fn is not None else lambda function: function

    torch.compile = compile_nothing
    lazy = torch._compile._disable_dynamo(lambda: None).__code__  # what every decorated function runs
    for function in gc.get_objects():
        if type(function) is types.FunctionType and function.__code__ is lazy:
            function.__wrapped__.__dynamo_disable = function.__wrapped__  # where torch caches the function to call
    torch._disable_dynamo = torch._compile._disable_dynamo = disable_nothing


class _Stream:
    """A CUDA stream whose work is always done."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.device = torch.device("cpu")
        self.cuda_stream = 0

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *exception: object) -> bool:
        return False

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def record_event(self, event: Any = None) -> _Event:
        event = event or _Event()
        event.record()
        return event

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return (0, 0)


class _Event:
    """A CUDA event; times are those of the host."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._seconds = time.perf_counter()

    def record(self, stream: Any = None) -> None:
        self._seconds = time.perf_counter()

    def elapsed_time(self, end: _Event) -> float:
        """Milliseconds from this event to `end`."""
        return (end._seconds - self._seconds) * 1e3

    def query(self) -> bool:
        return True

    def wait(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...


def _patch_cuda() -> None:
    stream = _Stream()
    properties = types.SimpleNamespace(
        name="cpu presented as cuda", major=0, minor=0, total_memory=MEMORY_BYTES, multi_processor_count=1, warp_size=32
    )
    replacements: dict[str, Any] = {
        name: _const(None)
        for name in (
            "set_device",
            "synchronize",
            "empty_cache",
            "ipc_collect",
            "init",
            "_lazy_init",
            "set_stream",
            "reset_peak_memory_stats",
            "reset_max_memory_allocated",
            "manual_seed_all",
        )
    }
    # The current device is the index 0 and no torch.device: callers write torch.device("cuda", current_device()).
    replacements |= {
        name: _const(0)
        for name in (
            "current_device",
            "memory_allocated",
            "max_memory_allocated",
            "memory_reserved",
            "max_memory_reserved",
            "device_memory_used",
            "utilization",
        )
    }
    replacements |= {
        "is_available": _const(True),
        "is_initialized": _const(True),
        "_is_in_bad_fork": _const(False),
        # At least 1: with 0, Megatron skips the process groups and the seeds. Asked at each call, since ranks are forked.
        "device_count": lambda: int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        "is_current_stream_capturing": _const(False),
        "_lazy_call": lambda function, **_: function(),
        "Stream": _Stream,
        "Event": _Event,
        "current_stream": lambda *_, **__: stream,
        "default_stream": lambda *_, **__: stream,
        "stream": lambda *_, **__: contextlib.nullcontext(),
        "device": lambda *_: contextlib.nullcontext(),
        "get_device_properties": lambda *_: properties,
        "get_device_name": lambda *_: properties.name,
        "get_device_capability": _const((0, 0)),
        "memory_stats": lambda *_: collections.defaultdict(int),
        "mem_get_info": _const((MEMORY_BYTES, MEMORY_BYTES)),
        "manual_seed": torch.default_generator.manual_seed,
        "default_generators": (torch.default_generator,),
        "get_rng_state": lambda *_, **__: torch.get_rng_state(),
        "set_rng_state": lambda state, *_, **__: torch.set_rng_state(state),
    }
    for name, value in replacements.items():
        setattr(torch.cuda, name, value)
    # Megatron's RNG tracker takes these from the submodule.
    torch.cuda.random.get_rng_state = replacements["get_rng_state"]
    torch.cuda.random.set_rng_state = replacements["set_rng_state"]
    torch.cuda.nvtx.range_push, torch.cuda.nvtx.range_pop = _const(None), _const(None)
    torch.accelerator.is_available = _const(False)  # else a DataLoader starts a thread that pins memory
    generator = torch.Generator
    torch.Generator = type(
        "Generator", (generator,), {"__new__": lambda cls, device="cpu": generator.__new__(cls, to_cpu(device))}
    )


def _patch_tensors() -> None:
    # torch caches the set of factories that `with torch.device(...)` redirects. It must hold the originals, which the replacements
    # call; otherwise such a block would do nothing from here on, and a model built on the meta device would be allocated.
    torch.utils._device._device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    for name in _TENSOR_FACTORIES:
        setattr(torch.Tensor, name, _on_cpu(getattr(torch.Tensor, name)))
    load, to, type_ = torch.load, torch.Tensor.to, torch.Tensor.type

    @functools.wraps(load)
    def load_on_cpu(f: Any, map_location: Any = None, *args: Any, **kwargs: Any) -> Any:
        return load(f, to_cpu(map_location), *args, **kwargs)

    @functools.wraps(to)
    def to_on_cpu(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs.get("device") is not None:
            kwargs["device"] = to_cpu(kwargs["device"])
        return to(self, to_cpu(args[0]), *args[1:], **kwargs) if args else to(self, **kwargs)

    def type_as_cuda(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        # Megatron's optimizer takes a parameter only if its type is one of torch.cuda.*Tensor.
        if dtype is not None:
            return type_(self, dtype, *args, **kwargs)
        return type_(self).replace("torch.", "torch.cuda.")

    torch.load = load_on_cpu
    torch.Tensor.to = to_on_cpu
    torch.Tensor.type = type_as_cuda
    torch.Tensor.cuda = lambda self, *_, **__: self
    torch.Tensor.pin_memory = lambda self, *_, **__: self
    torch.Tensor.record_stream = lambda self, *_: None


def _patch_megatron() -> None:
    import megatron.core.datasets.utils as dataset_utils
    import megatron.core.inference.communication_utils as inference_communication
    import megatron.training.training as megatron_training

    # The wheel has the compiled index builders and no Makefile: Megatron's own compile step would end rank 0.
    dataset_utils.compile_helpers = _const(None)
    # The warm-up of fused kernels draws from the generator that initialises the weights, so that tensor parallelism would
    # change them; there is nothing to warm up here.
    megatron_training.set_jit_fusion_options = _const(None)
    inference_communication._is_cuda = _const(None)  # asserts tensor.is_cuda
    from training import cpu_rope  # imports Megatron

    cpu_rope.install()
