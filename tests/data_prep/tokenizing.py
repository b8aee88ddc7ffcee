"""Material of the tests of tokenizing: small byte-level tokenizers, and what Megatron's preprocess_data.py writes, by its own parts."""

import json
import random

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers

from data_prep.corpus import build

CL100K = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
EOD = "<|end_of_text|>"
CONTROL = (EOD, "<|start_of_role|>", "<pad>")
NASTY = (
    "don't  stop\n\n\tthe 12345 \u00a0 end",
    "\u4e2d\u6587 \u0939\u093f\u0928\u094d\u0926\u0940 \u0627\u0644\u0639\u0631\u0628\u064a\u0629 \U0001f468\u200d\U0001f469",
    "e\u0301 \u212b \u1e9b\u0323 \ufb01 \ufeff \u2028 \x85 \x0b \x1c",
    "a" * 50,
    "new letters \ua7ce\ua7cf \U00016ea0\U00016ed3 \U000323b0 \U00033479 and \U0002ebf0",
    f"spells {EOD} and <|start_of_role|>user{EOD}",
    f"{EOD}",
    "<|end_of_tex",
    "private \ue000 \U000f0000, unassigned \u0378 \U000e0100",
)


def byte_level(folder, vocab_size=1500, *, pattern=CL100K, added=(), normalizer=None, bos=False):
    """A byte-level BPE tokenizer in `folder`, as H. F. libraries write it; returns its vocabulary's size."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if pattern is None:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(added),
        special_tokens=list(CONTROL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((d.text for d in build("package_code", 200_000)), trainer)
    for token in added:
        tokenizer.add_tokens([token if isinstance(token, AddedToken) else AddedToken(token, special=False)])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{CONTROL[1]} $A", special_tokens=[(CONTROL[1], tokenizer.token_to_id(CONTROL[1]))]
        )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOD, "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return tokenizer.get_vocab_size(with_added_tokens=True)


def texts(seed, count, words=(3, 200)):
    """Documents of many kinds; each begins with its number."""
    rng = random.Random(seed)
    vocabulary = [w for d in build("message_catalogues", 60_000) for w in d.text.split(" ")][:4000]
    found = []
    for number in range(count):
        body = " ".join(rng.choice(vocabulary) for _ in range(rng.randint(*words)))
        found.append(f"{number} {body} {rng.choice(NASTY) if rng.random() < 0.2 else ''}")
    return found


def jsonl(path, documents, **extra):
    """Write documents as JSON lines, every second one in ASCII."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = (json.dumps({"id": n, "text": text, **extra}, ensure_ascii=bool(n % 2)) for n, text in enumerate(documents))
    path.write_bytes(b"".join(row.encode() + b"\n" for row in rows))
    return path


def megatrons(prefix, documents, folder, append_eod=True):
    """What preprocess_data.py writes: AutoTokenizer's input_ids, its end-of-document id, and Megatron's builder; its two files' bytes.

    The tokens of its Encoder.encode, and its calls of IndexedDatasetBuilder (tools/preprocess_data.py).
    """
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(len(tokenizer)))
    for text in documents:
        ids = tokenizer(text).input_ids
        if ids and append_eod:
            ids.append(tokenizer.convert_tokens_to_ids(tokenizer.eos_token))
        builder.add_document(np.array(ids), [len(ids)] if ids else [])
    builder.finalize(f"{prefix}.idx")
    return pair(prefix)


def pair(prefix):
    return [prefix.with_name(prefix.name + suffix).read_bytes() for suffix in (".bin", ".idx")]
