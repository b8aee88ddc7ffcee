"""Everything that the stages of a curriculum read, in the order in which it is needed: what `quarry prep` and the data job do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from data_prep.cache_job import build_caches
from data_prep.errors import DataError
from data_prep.prepare import prepare
from data_prep.progress import Progress
from data_prep.rl_prompts import prepare_prompts
from data_prep.sources import threads
from data_prep.text_files import expand
from recipes.schema import Recipe


def prepare_everything(recipe: Recipe, *, last: str | None = None, progress: Progress) -> None:
    """The phases' data and index caches, then what SFT and reinforcement learning read; what is up to date is left alone.

    `last`: the last stage that is to run now; of the stages behind it only the phases' data are prepared, because phases share their
    sources. None: all stages. DataError for anything that a person has to decide; files that are missing are found before work begins.
    """
    check_files(recipe, last)
    prepare(recipe, progress=progress)
    build_caches(recipe, progress=progress)
    root = Path(recipe.data.root)
    for stage in _asked(recipe, last):
        if stage in recipe.sft:
            from data_prep.sft import prepare_sft, tokenizer_of

            prepare_sft(recipe.sft[stage], stage, root, tokenizer_of(root), workers=threads(), progress=progress)
        elif stage in recipe.grpo:
            paths = prepare_prompts(recipe.grpo[stage], stage, root)
            progress.message(f"prompts '{stage}': {', '.join(map(str, paths))}")


def check_files(recipe: Recipe, last: str | None = None) -> None:
    """DataError naming every file of post-training stages that is not there, one a line, with what else can be done."""
    problems = list(_missing(recipe, last))
    if problems:
        pre_training = [stage for stage in recipe.stages if stage in recipe.phase or stage in recipe.merge]
        if pre_training:
            problems.append(f"or leave post-training for later: quarry launch ... --to {pre_training[-1]}")
        raise DataError("\n".join(problems))


def _missing(recipe: Recipe, last: str | None) -> Iterator[str]:
    for stage in _asked(recipe, last):
        if stage in recipe.sft:
            wanted = {f"sft.{stage}.sources.{name}.paths": source.paths for name, source in recipe.sft[stage].sources.items()}
        elif stage in recipe.grpo:
            wanted = {f"grpo.{stage}.prompts": recipe.grpo[stage].prompts}
        else:
            continue
        for key, patterns in wanted.items():
            try:
                expand(patterns, key)
            except DataError as error:
                yield str(error)


def _asked(recipe: Recipe, last: str | None) -> list[str]:
    return recipe.stages if last is None else recipe.stages[: recipe.stages.index(last) + 1]
