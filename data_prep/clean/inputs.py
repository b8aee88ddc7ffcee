"""The text of a recipe's sources before cleaning: built-in corpora are made, files are found and digested."""

from __future__ import annotations

from pathlib import Path

from data_prep.clean.shards import SourceText
from data_prep.files import digest_of
from data_prep.progress import Progress
from data_prep.sources import Content, build_builtin, content_of
from recipes.schema import Recipe


def source_texts(recipe: Recipe, root: Path, progress: Progress) -> dict[str, SourceText]:
    """Of all sources that have text, not those that come tokenized. The caller holds the root's lock."""
    build_builtin(recipe, root, progress, {})
    contents = {
        name: content_of(root, name, source) for name, source in recipe.data.sources.items() if source.kind != "indexed"
    }
    return {name: text_of(recipe, name, content) for name, content in contents.items()}


def text_of(recipe: Recipe, name: str, content: Content) -> SourceText:
    """A source's content as cleaning takes it; the keys that tell files of a repository apart stay with their lines."""
    source = recipe.data.sources[name]
    return SourceText(
        files=content.paths,
        text_key=content.text_key,
        digest=digest_of(content.identity),
        carry=(source.repository_key, source.path_key) if source.concatenate is not None else (),
    )
