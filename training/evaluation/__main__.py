"""The process that evaluates a model; `quarry eval` starts it.

python -m training.evaluation --request JSON     (fields of training.evaluation.request.Request)

Exit codes: 0 done; 1 measured, but Megatron's checkpoint and its export do not have the same held-out loss; 78 refused, with the reason.
"""

from __future__ import annotations

import argparse
import os
import sys

from data_prep.errors import DataError
from model.errors import ModelError
from recipes.schema import RecipeError
from training.evaluation.errors import EvaluationError
from training.evaluation.progress import Progress
from training.evaluation.request import Request
from training.exit_codes import FINISHED, REFUSED

DISAGREE = 1
INTERRUPTED = 130


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m training.evaluation", description=__doc__)
    parser.add_argument("--request", required=True, help="JSON")
    options = parser.parse_args(argv)
    # What is measured lies here; nothing is looked up on the way.
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from training.evaluation import table
    from training.evaluation.evaluate import evaluate

    try:
        request = Request.read(options.request)
        results = evaluate(request, Progress())
    except (EvaluationError, ModelError, DataError, RecipeError) as error:
        print(f"refused: {error}", file=sys.stderr, flush=True)
        return REFUSED
    except KeyboardInterrupt:
        print("interrupted; what is measured is kept, run the same command to go on", file=sys.stderr, flush=True)
        return INTERRUPTED
    table.show(results)
    print(f"results   {request.output}/results.json\ntables    {request.output}/results.md")
    agreement = (results["heldout"] or {}).get("agreement")
    if agreement is not None and not agreement["agrees"]:
        print(
            f"the export is not the model that Megatron has: held-out loss of {agreement['category']} differs by "
            f"{agreement['difference_nats']:.3g} nats (tolerance {agreement['tolerance_nats']:g}); do not publish it",
            file=sys.stderr,
        )
        return DISAGREE
    return FINISHED


if __name__ == "__main__":
    sys.exit(main())
