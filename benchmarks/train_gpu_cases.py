"""What benchmarks/train_gpu.py measures: models, cases, suites, and the recipe that a case trains."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import yaml

from recipes import flops
from recipes.compose import TREE, compose
from recipes.schema import Model, Recipe

STAGE = "foundation"
GRANITE, LLAMA, TINY = "granite_4_1_8b", "llama_3_8b", "tiny"
BF16 = "bf16"
FP8 = ("fp8_tensorwise", "fp8_delayed", "fp8_blockwise")
LENGTHS = (4096, 8192, 32768, 131072)
STACK_LAYERS = 8
"""Of Granite 8B: with fp32 masters and moments 2.0e9 parameters leave half of an H200 to activations."""
SMALL_STATE = {"precision_aware": True, "main_params_dtype": "fp16", "exp_avg_dtype": "bf16", "exp_avg_sq_dtype": "bf16"}
LLAMA_3_8B = {
    # meta-llama/Meta-Llama-3-8B, config.json: what NVIDIA's figure is of.
    "name": LLAMA,
    "num_layers": 32,
    "hidden_size": 4096,
    "ffn_hidden_size": 14336,
    "num_attention_heads": 32,
    "num_query_groups": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "tied_embeddings": False,
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "attention_multiplier": 128**-0.5,
    "logits_scaling": 1.0,
    "norm_epsilon": 1e-5,
    "init_std": 0.02,
    "mup_base_hidden_size": None,
    "released_rope_base": 5e5,
    "released_max_position_tokens": 8192,
    "published_parameters": 8030261248,
}


@cache
def _composed(precision: str) -> Recipe:
    return compose([f"precision={precision}"])


@dataclass(frozen=True, kw_only=True)
class Case:
    """One measured training loop on one GPU."""

    program: str
    """quarry; megatron (its stock model and defaults); hugging_face (transformers, torch.compile, sdpa, fused AdamW)."""
    model: str
    layers: int | None
    """None: the whole model."""
    precision: str
    seq_length_tokens: int
    micro_batches: int = 2
    """Sequences per step, one at a time."""
    warm_steps: int = 1
    steps: int = 2
    recompute: str = "none"
    loss_chunk_tokens: int | None = None
    small_state: bool = False
    """Gradients, Adam's moments and main weights in two bytes each, which is how a whole 8B fits on one H200; else fp32 throughout."""
    extra: tuple[str, ...] = ()
    """Further Megatron arguments, for trials."""

    @property
    def name(self) -> str:
        size = "whole" if self.layers is None else f"{self.layers} layers"
        parts = [self.program, self.model, size, self.precision, str(self.seq_length_tokens)]
        if self.recompute != "none":
            parts.append(f"recompute {self.recompute}")
        if self.loss_chunk_tokens:
            parts.append(f"loss chunks {self.loss_chunk_tokens}")
        parts += ["16-bit state"] if self.small_state else []
        return ", ".join((*parts, *self.extra))

    @property
    def tokens_per_step(self) -> int:
        return self.micro_batches * self.seq_length_tokens

    def shape(self) -> Model:
        values = LLAMA_3_8B if self.model == LLAMA else yaml.safe_load((TREE / "model" / f"{self.model}.yaml").read_text())
        model = Model.model_validate(values)
        return model if self.layers is None else model.model_copy(update={"num_layers": self.layers})

    def flops_per_token(self) -> int:
        """Causal attention as half of its square, the head once, recomputation not at all: NVIDIA's counting."""
        return flops.flops_per_token(self.shape(), self.seq_length_tokens)

    def recipe(self, gpu: str) -> Recipe:
        """The recipe of a phase whose arguments are this case's, for `gpu` (Cluster.gpu)."""
        base = _composed(self.precision)
        precision = base.phase[STAGE].precision
        whole = base.phase[STAGE]
        if self.layers is not None:
            # Of few layers the two at the ends would be most: what is measured is the layer that the whole model has 38 of.
            precision = precision.model_copy(update={"bf16_layers_at_start": 0, "bf16_layers_at_end": 0})
        optimizer = None
        if self.small_state:
            precision = precision.model_copy(update={"gradients_dtype": "bf16"})
            optimizer = base.optimizer.model_copy(update=SMALL_STATE)
        parallel = type(whole.parallel)(
            name="one_gpu", gpus=1, recompute=self.recompute, loss_chunk_tokens=self.loss_chunk_tokens
        )
        steps = self.warm_steps + self.steps + 1
        phase = whole.model_copy(
            update={
                "seq_length_tokens": self.seq_length_tokens,
                "global_batch_samples": self.micro_batches,
                "steps": steps,
                "tokens": steps * self.tokens_per_step,
                "precision": precision,
                "optimizer": optimizer,
                "parallel": parallel,
            }
        )
        cluster = base.cluster.model_copy(update={"gpu": gpu})
        return base.model_copy(update={"model": self.shape(), "stages": [STAGE], "phase": {STAGE: phase}, "cluster": cluster})

    def arguments(self, recipe: Recipe, folder: Path) -> list[str]:
        """Megatron's arguments: the recipe's own, or what a user writes who knows the model's shape and takes the defaults."""
        from training.arguments import compile_phase

        compiled = compile_phase(recipe, STAGE, folder)
        if self.program == "megatron":
            compiled = plain(compiled, recipe)
        # The recipe's own rate comes from training.scheduler, which is not measured here.
        return [*compiled, "--lr", "1e-5", *self.extra]

    def as_json(self) -> dict:
        return {**asdict(self), "extra": list(self.extra), "name": self.name}


def plain(compiled: list[str], recipe: Recipe) -> list[str]:
    """Of the recipe's arguments those that say what is trained, without those that say how fast.

    Left out: muP and Granite's multipliers, which the stock model does not need to run; the distributed optimizer; the fused cross
    entropy; garbage collection by hand. FP8 by `--fp8-format` is delayed scaling with an amax history of one step.
    """
    dropped = {
        "--use-mup": 0,
        "--mup-base-hidden-size": 1,
        "--mup-embedding-mult": 1,
        "--mup-output-mult": 1,
        "--use-distributed-optimizer": 0,
        "--cross-entropy-loss-fusion": 0,
        "--cross-entropy-fusion-impl": 1,
        "--manual-gc": 0,
        "--manual-gc-interval": 1,
        "--fp8-recipe": 1,
        "--fp8-amax-history-len": 1,
        "--fp8-amax-compute-algo": 1,
        "--dist-ckpt-optim-fully-reshardable": 0,
    }
    out, words = [], list(compiled)
    while words:
        word = words.pop(0)
        if word in dropped:
            del words[: dropped[word]]
        else:
            out.append(word)
    if recipe.phase[STAGE].precision.fp8 not in (None, "delayed"):
        out += ["--fp8-recipe", str(recipe.phase[STAGE].precision.fp8)]
    return out


def _stack(program: str, precision: str, length: int, **settings: object) -> Case:
    layers, micro_batches, steps = STACK_LAYERS, 4, 3
    if length == 32768:
        micro_batches, steps = 2, 2
    elif length == 131072:
        # Logits of 131072 tokens are 26 GB in bf16 and 53 GB in fp32: whoever has no chunked loss cannot hold them.
        layers, micro_batches, steps = 4, 1, 1
        settings = {"loss_chunk_tokens": 8192 if program == "quarry" else None} | settings
    return Case(
        program=program,
        model=GRANITE,
        layers=layers,
        precision=precision,
        seq_length_tokens=length,
        micro_batches=micro_batches,
        steps=steps,
        **settings,
    )


def suite(name: str) -> list[Case]:
    """Cases of one of SUITES, those that matter most first; one that two suites have comes once."""
    cases: dict[str, Case] = {}
    for case in SUITES[name]():
        cases.setdefault(case.name, case)
    return list(cases.values())


def _tiny() -> list[Case]:
    def of(program: str, precision: str = BF16, **settings: object) -> Case:
        return Case(program=program, model=TINY, layers=2, precision=precision, seq_length_tokens=64, steps=1, **settings)

    return [of("quarry"), of("quarry", recompute="full", loss_chunk_tokens=32), of("megatron"), of("hugging_face")]


def _whole() -> list[Case]:
    """The bars: a global batch of 128 sequences on 8 GPUs is 16 of each, as NVIDIA's published runs have it."""
    same = {
        "program": "quarry",
        "layers": None,
        "seq_length_tokens": 8192,
        "micro_batches": 16,
        "steps": 2,
        "small_state": True,
    }
    # FP8 copies of the weights leave no room for the logits of 8192 tokens; bf16 has chunks too, to be comparable.
    granite = same | {"model": GRANITE, "loss_chunk_tokens": 2048}
    return [
        Case(precision=BF16, **granite),
        Case(precision="fp8_tensorwise", **granite),
        Case(model=LLAMA, precision="fp8_tensorwise", **same),
        Case(precision="fp8_delayed", **granite),
        Case(model=LLAMA, precision=BF16, **same),
        Case(precision="fp8_blockwise", **granite),
    ]


def _stacks() -> list[Case]:
    return [_stack("quarry", precision, length) for length in LENGTHS for precision in (BF16, *FP8)]


def _peers() -> list[Case]:
    megatron = [_stack("megatron", precision, length) for length in LENGTHS for precision in (BF16, "fp8_delayed")]
    return megatron + [_stack("hugging_face", BF16, length) for length in LENGTHS]


def _memory() -> list[Case]:
    """What activations take, by recomputation and by layers: differences of two depths are what a layer costs."""
    return [
        Case(
            program="quarry",
            model=GRANITE,
            layers=layers,
            precision=precision,
            seq_length_tokens=length,
            recompute=recompute,
            steps=1,
        )
        for precision in (BF16, "fp8_tensorwise")
        for length in (4096, 8192)
        for layers, recompute in ((4, "none"), (8, "none"), (8, "selective"), (8, "full"))
    ]


SUITES = {
    "tiny": _tiny,
    "whole": _whole,
    "stacks": _stacks,
    "peers": _peers,
    "memory": _memory,
    "all": lambda: [*_whole(), *_stacks(), *_peers(), *_memory()],
}
