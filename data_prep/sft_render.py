"""Chat samples as token ids and the mask of what the assistant wrote, many at a time.

The text is what transformers' `apply_chat_template` renders from the tokenizer's own template, and ids and mask equal its
`return_assistant_tokens_mask` (a test holds them together). Two things are done otherwise: a batch is encoded by the `tokenizers`
library at once, and the mask is taken from the tokens' places in the text instead of asking for each character.

The mask comes from the template's `{% generation %}` tags; a template without them would give no loss at all and is refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.errors import DataError
from data_prep.files import digest_of, file_sha256
from data_prep.special_tokens import ROLES
from data_prep.text_files import Reason

GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Rendered:
    """tokens int32 [n]; learned uint8 [n], 1 where the assistant wrote the token."""

    tokens: np.ndarray
    learned: np.ndarray


class Renderer:
    """`folder`: what transformers.AutoTokenizer loads, with its chat template, or `template`, a Jinja file, in the place of that."""

    def __init__(self, folder: Path, template: Path | None = None) -> None:
        from transformers import AutoTokenizer
        from transformers.utils.chat_template_utils import render_jinja_template

        if not (folder / "tokenizer.json").is_file():  # a missing folder must not be looked up as a model's name on a hub
            raise DataError(f"{folder / 'tokenizer.json'}: no such file; name a folder that transformers' AutoTokenizer loads")
        loaded = AutoTokenizer.from_pretrained(folder)
        self._render = render_jinja_template
        self._tokenizer = loaded.backend_tokenizer
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._names = dict(loaded.special_tokens_map)
        self.vocab_size = self._tokenizer.get_vocab_size(with_added_tokens=True)
        self.pad_id: int = loaded.pad_token_id if loaded.pad_token_id is not None else loaded.eos_token_id
        self.special = frozenset(token.content for token in loaded.added_tokens_decoder.values() if token.special)
        if template is not None:
            try:
                self.template = template.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise DataError(f"{template}: the chat template cannot be read ({error}); give a Jinja file in UTF-8") from None
        elif loaded.chat_template is None:
            lacking = [name for name in ROLES if name not in self.special]
            raise DataError(
                f"{folder}: the tokenizer has no chat template"
                + (f" and no {' and '.join(lacking)} among its special tokens" if lacking else "")
                + "; take a tokenizer of at least 1,024 entries trained here, or name a template (chat_template)"
            )
        else:
            self.template = loaded.chat_template
        if not GENERATION_TAG.search(self.template):
            raise DataError(
                f"{template or folder}: the chat template has no {{% generation %}} tag around the assistant's text, so that nothing would "
                "be learned; put the tags in, or name a template that has them (chat_template)"
            )
        self.digest = digest_of(
            {"tokenizer": file_sha256(folder / "tokenizer.json"), "template": self.template, "names": self._names}
        )
        """Of all that decides the ids and the mask of a sample."""

    def text(self, sample: dict[str, Any]) -> tuple[str, list[tuple[int, int]]] | Reason:
        """The conversation as the model sees it, and [start, end) in characters of what the assistant wrote."""
        from jinja2 import TemplateError

        try:
            (text,), (spans,) = self._render(
                conversations=[[{k: v for k, v in message.items() if v is not None} for message in sample["messages"]]],
                tools=sample.get("tools"),
                documents=sample.get("documents"),
                chat_template=self.template,
                return_assistant_tokens_mask=True,
                **self._names,
            )
        except TemplateError as error:  # raise_exception in the template: a role or part that it has no place for
            return Reason("template refuses", str(error))
        return text, spans

    def render(self, samples: Sequence[dict[str, Any]]) -> list[Rendered | Reason]:
        """Each sample's tokens and mask, in order, or why the template does not take it."""
        texts = [self.text(sample) for sample in samples]
        good = [found for found in texts if not isinstance(found, Reason)]
        encodings = iter(self._tokenizer.encode_batch([text for text, _ in good], add_special_tokens=False))
        return [found if isinstance(found, Reason) else _masked(next(encodings), found[1]) for found in texts]


def _masked(encoding: Any, spans: list[tuple[int, int]]) -> Rendered:
    tokens = np.array(encoding.ids, dtype=np.int32)
    starts = np.array([start for start, _ in encoding.offsets], dtype=np.int64)
    learned = np.zeros(len(tokens), dtype=np.uint8)
    for begin, end in spans:
        learned[(starts >= begin) & (starts < end)] = 1
    return Rendered(tokens, learned)
