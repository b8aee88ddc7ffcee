"""Fits the constants of recipes/throughput.py on published runs and says how well runs that were left out are predicted.

Rows: docs/measurements/published_throughput.yaml. Errors are predicted over published speed, less one. Two leave-one-out errors are given:
by row, which is flattering because most rows have siblings of another scale or release, and by group (a model, GPU, precision and
period), which is what a plan for another model meets.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import yaml

from recipes.flops import attention_flops_per_token_squared, flops_per_token
from recipes.gpus import GPUS
from recipes.job_options import Parallel, Precision
from recipes.schema import Model
from recipes.throughput import CONSTANTS, Constants, Job, step_time

DATA = Path(__file__).resolve().parent.parent / "docs" / "measurements" / "published_throughput.yaml"
PRIOR = Constants(
    matmul_bf16=0.75,  # [assumed: cuBLAS at the sizes of an 8B comes to 70-80% of the H100's peak, which its power limits]
    matmul_fp8_hopper=0.65,  # [assumed: as bf16, less for scaling]
    matmul_fp8_blackwell=0.65,  # [assumed: as on Hopper]
    attention_hopper=0.55,  # [assumed: FlashAttention-3 reports 600-650 TFLOP/s forward and 550 backward for long causal sequences]
    attention_hopper_2024=0.40,  # [assumed: FlashAttention-2 and early cuDNN kernels]
    attention_blackwell=0.45,  # [assumed: softmax and exponentials did not grow with the tensor cores]
    memory=0.75,  # [assumed: fused elementwise kernels]
    links=0.75,  # [assumed: NCCL's bus bandwidth for large messages]
    contention=0.3,  # [assumed: NCCL's kernels take some of the SMs and of the memory's bandwidth]
    tensor_hidden=0.6,  # [assumed: of four collectives a direction, those beside the larger products]
)
"""Where the fit starts, and what it is pulled to where the rows say little."""
PRIOR_SPREAD, ROW_SPREAD = 0.15, 0.03
"""Standard deviations, of the logarithms, with which prior and rows are weighed [assumed: NVIDIA's releases differ by 3%]."""
LIMITS = (0.05, 0.98)
EPILOG = """example:
  python -m benchmarks.planner --markdown /tmp/planner.md
"""


@dataclass(frozen=True)
class Row:
    """One published run."""

    id: str
    group: str
    job: Job
    tokens_per_second_per_gpu: float
    source: str
    fitted: bool = True


FP32_GRADIENTS = ("dgxc-24.11", "nemo-24.07")
"""Sources, beside rows with kernels of 2024, whose gradients are taken to be in fp32 [assumed: the default of that time]. Later ones reduce and
keep them in bf16 [assumed: NeMo 2's and Megatron-Bridge's speed recipes set grad_reduce_in_fp32=False; the memory in a log of DGXC 25.04
says so, too (docs/planning.md)]."""
PRECISIONS = {
    "bf16": Precision(name="bf16", dtype="bf16"),
    "fp8": Precision(name="fp8", dtype="bf16", fp8="tensorwise"),
    "mxfp8": Precision(name="mxfp8", dtype="bf16", fp8="mxfp8"),
}


def model_of(name: str, shape: dict[str, int]) -> Model:
    """A Llama as this repository describes models; what does not change its speed has the value that changes nothing."""
    neutral = {name: 1.0 for name in ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")}
    rest = {"norm_epsilon": 1e-5, "init_std": 0.02, "released_rope_base": 5e5, "released_max_position_tokens": 8192}
    none = {"mup_base_hidden_size": None, "published_parameters": None}
    return Model.model_validate({"name": name, "head_dim": 128, "tied_embeddings": False, **shape, **neutral, **rest, **none})


def read_rows(file: Path = DATA) -> list[Row]:
    """The rows of the file. Raises KeyError, ValueError or ValidationError for one that is not as its head says."""
    raw = yaml.safe_load(file.read_text(encoding="utf-8"))
    models = {name: model_of(name, shape) for name, shape in raw["models"].items()}
    return [_row(entry, models, raw["sources"]) for entry in raw["rows"]]


def _row(entry: dict, models: dict[str, Model], sources: dict[str, str]) -> Row:
    gradients = "fp32" if entry.get("kernels_of_2024") or entry["source"] in FP32_GRADIENTS else "bf16"
    parallel = Parallel(
        name=entry["id"],
        gpus=entry["gpus"],
        tensor=entry["tensor"],
        pipeline=entry["pipeline"],
        virtual_pipeline=entry.get("virtual"),
        context=entry["context"],
        sequence_parallel=entry["tensor"] > 1,
        micro_batch_samples=entry["micro"],
        overlap_grad_reduce=True,
        overlap_param_gather=True,
    )
    job = Job(
        model=models[entry["model"]],
        parallel=parallel,
        precision=PRECISIONS[entry["precision"]].model_copy(update={"gradients_dtype": gradients}),
        seq_length_tokens=entry["seq"],
        global_batch_samples=entry["batch"],
        gpu=GPUS[entry["gpu"]],
        tensor_overlap=entry.get("tensor_overlap", False),
        kernels_of_2024=entry.get("kernels_of_2024", False),
    )
    speed = entry.get("tokens_per_second_per_gpu")
    if speed is None:
        counted = flops_per_token(job.model, job.seq_length_tokens)
        if entry["counting"] != "whole square":
            raise ValueError(f"{entry['id']}: counting is {entry['counting']!r}; known: 'whole square'")
        counted += attention_flops_per_token_squared(job.model) * job.seq_length_tokens
        speed = entry["tflops_per_gpu"] * 1e12 / counted
    return Row(entry["id"], entry["group"], job, float(speed), sources[entry["source"]], fitted=entry["precision"] != "mxfp8")


def predicted(row: Row, constants: Constants) -> float:
    return step_time(row.job, constants).tokens_per_second_per_gpu


def error(row: Row, constants: Constants) -> float:
    """Predicted over published, less one."""
    return predicted(row, constants) / row.tokens_per_second_per_gpu - 1


def fit(rows: Sequence[Row], prior: Constants = PRIOR) -> Constants:
    """Constants with the least weighted squares of logarithmic errors, groups counting alike, pulled to `prior`: deterministic."""
    sizes = Counter(row.group for row in rows)
    weights = np.array([1 / (ROW_SPREAD * sizes[row.group] ** 0.5) for row in rows])
    names = [f.name for f in fields(Constants)]
    start = np.log([getattr(prior, name) for name in names])

    def residuals(point: np.ndarray) -> np.ndarray:
        constants = Constants(**dict(zip(names, map(float, np.exp(point)), strict=True)))
        of_rows = [np.log(predicted(row, constants) / row.tokens_per_second_per_gpu) for row in rows]
        return np.concatenate([weights * np.array(of_rows), (point - start) / PRIOR_SPREAD])

    point = _least_squares(residuals, start, np.log(LIMITS[0]), np.log(LIMITS[1]))
    return Constants(**{name: round(float(value), 4) for name, value in zip(names, np.exp(point), strict=True)})


def _least_squares(function: Callable[[np.ndarray], np.ndarray], point: np.ndarray, low: float, high: float) -> np.ndarray:
    """Levenberg-Marquardt within a box, derivatives by differences."""
    damping, now = 1e-2, function(point)
    for _ in range(60):
        jacobian = np.stack([(function(point + step) - now) / 1e-5 for step in np.eye(len(point)) * 1e-5], axis=1)
        square = jacobian.T @ jacobian
        move = np.linalg.solve(square + damping * np.diag(np.diag(square)), -jacobian.T @ now)
        trial = np.clip(point + move, low, high)
        then = function(trial)
        if then @ then < now @ now:
            moved = np.abs(trial - point).max()
            point, now, damping = trial, then, damping / 3
            if moved < 1e-6:
                break
        else:
            damping *= 4
            if damping > 1e8:
                break
    return point


def left_out(rows: Sequence[Row], key: Callable[[Row], str]) -> dict[str, float]:
    """Row id -> error with constants that were fitted without all rows of the same key."""
    errors = {}
    for value in dict.fromkeys(key(row) for row in rows):
        constants = fit([row for row in rows if key(row) != value])
        errors |= {row.id: error(row, constants) for row in rows if key(row) == value}
    return errors


def summary(errors: Sequence[float]) -> str:
    sizes = sorted(abs(e) for e in errors)
    return f"mean {statistics.mean(sizes):.1%}, median {statistics.median(sizes):.1%}, largest {sizes[-1]:.1%}"


def report(rows: Sequence[Row]) -> str:
    """The section of docs/benchmarks.md, as Markdown."""
    fitted = [row for row in rows if row.fitted]
    constants = fit(fitted)
    by_row, by_group = left_out(fitted, lambda row: row.id), left_out(fitted, lambda row: row.group)
    lines = ["| constant | fitted | started from |", "|---|---|---|"]
    lines += [f"| {name} | {value:.3f} | {getattr(PRIOR, name):.2f} |" for name, value in asdict(constants).items()]
    lines += ["", "| errors of tokens/s/GPU | |", "|---|---|"]
    lines += [f"| {len(fitted)} rows, fitted | {summary([error(r, constants) for r in fitted])} |"]
    lines += [f"| each row left out | {summary(list(by_row.values()))} |"]
    lines += [f"| each of {len({r.group for r in fitted})} groups left out | {summary(list(by_group.values()))} |"]
    head = "| model | GPU | precision | length | layout | tokens/s/GPU | predicted | error | row left out | group left out |"
    lines += ["", head, "|---|---|---|---|---|---|---|---|---|---|"]
    for row in rows:
        job, layout = row.job, row.job.parallel
        sizes = f"TP{layout.tensor} PP{layout.pipeline}" + (f"x{layout.virtual_pipeline}" if layout.virtual_pipeline else "")
        sizes += f" CP{layout.context} DP{layout.data}"
        outside = [f"{e[row.id]:+.1%}" if row.fitted else "not fitted" for e in (by_row, by_group)]
        cells = [
            job.model.name,
            f"{layout.gpus} {job.gpu.name}",
            job.precision.name,
            f"{job.seq_length_tokens // 1024}K",
            sizes,
        ]
        cells += [f"{row.tokens_per_second_per_gpu:,.0f}", f"{predicted(row, constants):,.0f}", f"{error(row, constants):+.1%}"]
        lines.append(f"| {' | '.join([*cells, *outside])} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.planner",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rows", type=Path, default=DATA, metavar="FILE", help="published runs (default: %(default)s)")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables there, too")
    args = parser.parse_args(argv)
    rows = read_rows(args.rows)
    text = report(rows)
    print(text)
    constants = fit([row for row in rows if row.fitted])
    if constants != CONSTANTS:
        print(f"recipes/throughput.py holds other constants; to take these over: CONSTANTS = {constants}")
    if args.markdown:
        args.markdown.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
