"""Runs cases of benchmarks/train_gpu.py one after another in one process and writes a JSON line for each as it ends.

    python -m benchmarks.train_gpu_worker --cases cases.json --results results.jsonl [--profiles FOLDER] [--matmul]

A case that does not fit is written as such, and the next begins; a process that dies leaves the lines of what has ended.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import socket
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.train_gpu_cases import STAGE, Case

PROFILE_ROWS = 60


def on_gpu() -> bool:
    """A real one: the CPU backend calls itself CUDA."""
    return torch.cuda.is_available() and not getattr(torch.cuda, "is_cpu_backend", False)


def synchronize() -> None:
    if on_gpu():
        torch.cuda.synchronize()


def allocated() -> int:
    return torch.cuda.memory_allocated() if on_gpu() else 0


def peak(reset: bool = False) -> int:
    if not on_gpu():
        return 0
    value = torch.cuda.max_memory_allocated()
    if reset:
        torch.cuda.reset_peak_memory_stats()
    return value


# --- the ceiling -------------------------------------------------------------------------------


def matmul_peaks() -> dict[str, float]:
    """TFLOP/s of large products of random matrices, the best of a few shapes: `bf16` and, on a GPU that has it, `fp8` (E4M3, one scale)."""
    device = "cuda" if on_gpu() else "cpu"
    shapes = [(8192, 8192, 8192), (8192, 25600, 4096), (16384, 8192, 8192)] if on_gpu() else [(256, 256, 256)]
    best = {"bf16": 0.0}
    for m, n, k in shapes:
        a = torch.randn(m, k, device=device, dtype=torch.bfloat16)
        b = torch.randn(n, k, device=device, dtype=torch.bfloat16)
        best["bf16"] = max(best["bf16"], _rate(lambda a=a, b=b: a @ b.t(), 2 * m * n * k))
        if on_gpu() and torch.cuda.get_device_capability() >= (8, 9):
            a8, b8, one = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn), torch.ones((), device=device)

            def fp8(a8: torch.Tensor = a8, b8: torch.Tensor = b8, one: torch.Tensor = one) -> torch.Tensor:
                return torch._scaled_mm(a8, b8.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)

            best["fp8"] = max(best.get("fp8", 0.0), _rate(fp8, 2 * m * n * k))
    return best


def _rate(product: Callable[[], Any], flops: int, repeats: int = 20) -> float:
    """Median TFLOP/s of runs of `repeats` products each."""
    for _ in range(5):
        product()
    seconds = []
    for _ in range(5):
        synchronize()
        began = time.perf_counter()
        for _ in range(repeats):
            product()
        synchronize()
        seconds.append((time.perf_counter() - began) / repeats)
    return flops / statistics.median(seconds) / 1e12


# --- Megatron ----------------------------------------------------------------------------------


def batches(case: Case, vocab_size: int, device: str) -> Iterator[dict[str, torch.Tensor]]:
    """Random tokens that lie on the device already: the loader is measured elsewhere."""
    length = case.seq_length_tokens
    generator = torch.Generator().manual_seed(7)
    drawn = [torch.randint(0, vocab_size, (1, length + 1), generator=generator).to(device) for _ in range(4)]
    mask = torch.ones(1, length, device=device)
    positions = torch.arange(length, device=device)[None]
    while True:
        for ids in drawn:
            yield {
                "tokens": ids[:, :-1].contiguous(),
                "labels": ids[:, 1:].contiguous(),
                "loss_mask": mask,
                "position_ids": positions,
            }


def run_megatron(case: Case, folder: Path, profiles: Path | None) -> dict[str, Any]:
    """Quarry's model under the recipe's arguments, or Megatron's under its defaults, in Megatron's own train_step."""
    from training import one_rank

    recipe = case.recipe("h200" if on_gpu() else "cpu")
    one_rank.import_megatron(recipe)
    import megatron.training.training as upstream

    arguments = case.arguments(recipe, folder)
    try:
        args = one_rank.parse_arguments("pretrain", arguments, eod_id=0, stage_dir=None)  # random tokens, no documents
        one_rank.initialize(args)
        provider = stock_model if case.program == "megatron" else one_rank.phase_model(recipe, STAGE, args)
        return _train(case, provider, profiles) | {"arguments": arguments}
    finally:
        upstream.destroy_global_state()


def _train(case: Case, provider: Callable[..., Any], profiles: Path | None) -> dict[str, Any]:
    """In a function of its own, so that model and optimizer are gone when it returns."""
    import megatron.training.training as upstream
    from megatron.core.enums import ModelType
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.rerun_state_machine import RerunDataIterator
    from megatron.core.utils import get_model_config

    from training.forward import forward_step

    memory = {"before": allocated()}
    model, optimizer, scheduler = upstream.setup_model_and_optimizer(ModelType.encoder_or_decoder, model_provider_func=provider)
    memory["model_gradients_masters"] = allocated() - memory["before"]
    config = get_model_config(model[0])
    config.grad_scale_func = optimizer.scale_loss
    config.finalize_model_grads_func = upstream.finalize_model_grads
    for chunk in model:
        chunk.train()
    watch(upstream.unwrap_model(model)[0], optimizer, memory)
    data = RerunDataIterator(batches(case, case.shape().vocab_size, "cuda" if on_gpu() else "cpu"))
    schedule = get_forward_backward_func()
    losses: list[Any] = []

    def step() -> None:
        reduced = upstream.train_step(forward_step, data, model, optimizer, scheduler, config, schedule, iteration=len(losses))[
            0
        ]
        losses.append(reduced["lm loss"])

    result = timed(case, step, profiles)
    parameters = memory.pop("parameters")
    return result | {"losses": [float(loss) for loss in losses], "parameters": parameters, "memory_bytes": memory}


def watch(net: Any, optimizer: Any, memory: dict[str, int]) -> None:
    """Fill `memory` (bytes) while steps run; every step writes over what the one before has left, so that caches are filled by then.

    layers: what the layers keep for the backward pass of one micro batch. forward_end: all that is allocated when the last layer has run.
    peak_forward_backward, peak_optimizer: the most that was allocated, everything counted.
    """
    memory["parameters"] = sum(p.numel() for p in net.parameters())
    memory["parameter_tensors"] = sum(p.numel() * p.element_size() for p in net.parameters())
    began = {}

    def before(*_: Any) -> None:
        began["layers"] = allocated()

    def after(*_: Any) -> None:
        memory["layers"] = allocated() - began["layers"]
        memory["forward_end"] = allocated()

    net.decoder.register_forward_pre_hook(before)
    net.decoder.register_forward_hook(after)
    step = optimizer.step

    def watched() -> Any:
        memory["peak_forward_backward"] = peak(reset=True)
        memory["gradients_and_weights_and_state"] = allocated()
        done = step()
        memory["peak_optimizer"] = peak(reset=True)
        memory["after_step"] = allocated()
        return done

    optimizer.step = watched


def stock_model(
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    config: Any = None,
    pg_collection: Any = None,
) -> Any:
    """Megatron's GPT of the same shape, as its pretrain_gpt.py builds it."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_layer_local_spec,
        get_gpt_layer_with_transformer_engine_spec,
    )
    from megatron.training import get_args
    from megatron.training.argument_utils import core_transformer_config_from_args

    args = get_args()
    made = config or core_transformer_config_from_args(args)
    if args.transformer_impl == "transformer_engine":
        spec = get_gpt_layer_with_transformer_engine_spec()
    else:
        spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    return GPTModel(
        made,
        spec,
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.seq_length,
        pre_process=pre_process,
        post_process=post_process,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type="rope",
        rotary_base=args.rotary_base,
        vp_stage=vp_stage,
        pg_collection=pg_collection,
    )


# --- transformers ------------------------------------------------------------------------------


def run_hugging_face(case: Case, folder: Path, profiles: Path | None) -> dict[str, Any]:
    """transformers' own model in bf16, compiled, with torch's attention and fused AdamW whose state is bf16, too."""
    from transformers import GraniteConfig, GraniteForCausalLM

    shape = case.shape()
    device = "cuda" if on_gpu() else "cpu"
    config = GraniteConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.ffn_hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_query_groups,
        max_position_embeddings=case.seq_length_tokens,
        rms_norm_eps=shape.norm_epsilon,
        tie_word_embeddings=shape.tied_embeddings,
        embedding_multiplier=shape.embedding_multiplier,
        residual_multiplier=shape.residual_multiplier,
        attention_multiplier=shape.attention_multiplier,
        logits_scaling=shape.logits_scaling,
        initializer_range=shape.init_std / 16,  # muP's, of the inner matrices; logits of random weights stay small
        use_cache=False,
        attn_implementation="sdpa",
        dtype=torch.bfloat16,
    )
    with torch.device(device):
        model = GraniteForCausalLM(config).to(torch.bfloat16)
    model.train()
    memory = {"parameter_tensors": sum(p.numel() * p.element_size() for p in model.parameters())}
    # Compiling for the CPU takes longer than a test may, and nobody trains there.
    forward = torch.compile(model) if on_gpu() else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=on_gpu())
    data = batches(case, shape.vocab_size, device)
    losses = []

    def step() -> None:
        total = 0.0
        for _ in range(case.micro_batches):
            batch = next(data)
            # transformers shifts labels itself.
            loss = forward(input_ids=batch["tokens"], labels=batch["tokens"]).loss / case.micro_batches
            loss.backward()
            total = total + loss.detach()
        memory["peak_forward_backward"] = peak(reset=True)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        memory["peak_optimizer"] = peak(reset=True)
        losses.append(total)

    result = timed(case, step, profiles)
    return result | {"losses": [float(x) for x in losses], "parameters": model.num_parameters(), "memory_bytes": memory}


# --- timing ------------------------------------------------------------------------------------


def timed(case: Case, step: Callable[[], None], profiles: Path | None) -> dict[str, Any]:
    """Seconds of each of the case's steps, after its warm-up; the profile is of one step more."""
    began = time.perf_counter()
    for _ in range(case.warm_steps):
        step()
    synchronize()
    warm = time.perf_counter() - began
    seconds = []
    for _ in range(case.steps):
        began = time.perf_counter()
        step()
        synchronize()
        seconds.append(time.perf_counter() - began)
    if profiles is not None and on_gpu():
        profile(case, step, profiles)
    return {"warm_up_seconds": warm, "step_seconds": seconds}


def profile(case: Case, step: Callable[[], None], folder: Path) -> None:
    """A table of the kernels of one step, by time on the GPU, and how long the CPU took to launch them."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    synchronize()
    with profiler(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        began = time.perf_counter()
        step()
        launched = time.perf_counter() - began
        synchronize()
        whole = time.perf_counter() - began
    kernels: dict[str, list[float]] = {}
    for event in seen.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            kernels.setdefault(event.name, []).append(event.time_range.elapsed_us())
    busy = sum(sum(times) for times in kernels.values())
    lines = [f"{case.name}: CPU {launched * 1e3:.1f} ms, whole {whole * 1e3:.1f} ms, GPU busy {busy / 1e3:.1f} ms"]
    lines += [
        f"{sum(times) / 1e3:9.2f} ms {100 * sum(times) / busy:5.1f}% {len(times):6d} x {sum(times) / len(times):9.1f} us  {name[:150]}"
        for name, times in sorted(kernels.items(), key=lambda item: -sum(item[1]))[:PROFILE_ROWS]
    ]
    table = seen.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=70)
    folder.mkdir(parents=True, exist_ok=True)
    name = "".join(c if c.isalnum() else "_" for c in case.name)
    (folder / f"{name}.txt").write_text("\n".join(lines) + "\n\n" + table + "\n")


RUNNERS = {"quarry": run_megatron, "megatron": run_megatron, "hugging_face": run_hugging_face}


def free() -> None:
    gc.collect()
    if on_gpu():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def one(case: Case, folder: Path, profiles: Path | None) -> dict[str, Any]:
    """The case's result, or why there is none: memory that does not suffice is a finding, anything else a failure."""
    free()
    began = time.perf_counter()
    try:
        result = RUNNERS[case.program](case, folder, profiles) | {"outcome": "measured"}
    except torch.OutOfMemoryError as error:
        result = {"outcome": "out of memory", "reason": str(error).splitlines()[0]}
    except Exception as error:
        traceback.print_exc()
        result = {"outcome": "failed", "reason": f"{type(error).__name__}: {error}"}
    return {"case": case.as_json(), "seconds": time.perf_counter() - began, **result}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_gpu_worker", description=__doc__)
    parser.add_argument("--cases", type=Path, required=True)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--profiles", type=Path)
    parser.add_argument("--matmul", action="store_true", help="first the peak of matrix products")
    options = parser.parse_args(argv)
    with socket.socket() as free_port:
        free_port.bind(("127.0.0.1", 0))
        port = free_port.getsockname()[1]
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # as training.stage sets it
    with open(options.results, "a", encoding="utf-8") as out, tempfile.TemporaryDirectory() as folder:
        if options.matmul:
            out.write(json.dumps({"matmul_tflops": matmul_peaks()}) + "\n")
            out.flush()
        for values in json.loads(options.cases.read_text()):
            values.pop("name")
            case = Case(**values | {"extra": tuple(values["extra"])})
            print(f"== {case.name}", file=sys.stderr, flush=True)
            out.write(json.dumps(one(case, Path(folder), options.profiles)) + "\n")
            out.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
