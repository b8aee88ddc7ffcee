"""The programs that benchmarks.data_prep measures beside Quarry and Megatron's tools, as short as a user would write them."""

from __future__ import annotations

import sys


def gigatoken(corpus: str, tokenizer_file: str) -> None:
    """Encode a JSON-lines file and keep the ids in memory: no output, no check of the input. The limit."""
    import gigatoken

    ids = gigatoken.Tokenizer(tokenizer_file).encode_files(gigatoken.JsonlFileSource([corpus]))
    print(len(ids), "documents")


def datatrove(folder: str, tokenizer_file: str, end: str, workers: str, output: str) -> None:
    """datatrove's writer of indexed data sets, one task per file of `folder`."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens.megatron_tokenizer import MegatronDocumentTokenizer

    LocalPipelineExecutor(
        pipeline=[
            JsonlReader(folder, glob_pattern="*.jsonl"),
            MegatronDocumentTokenizer(f"{output}/tokens", tokenizer_name_or_path=tokenizer_file, eos_token=end),
        ],
        tasks=int(workers),
        workers=int(workers),
        logging_dir=f"{output}/logs",
    ).run()


if __name__ == "__main__":
    {"gigatoken": gigatoken, "datatrove": datatrove}[sys.argv[1]](*sys.argv[2:])
