"""From raw text to tokenized, verified data sets: one view per phase of the curriculum.

`prepare` is the whole of it; its steps, in order, and the modules that do them:

    text          sources, corpus/, text_files, overlap            what each source holds, as documents
    cleaning      clean/                                           filters, decontamination, masking, duplicates, funnel
    repositories  concatenate, dependency_order                    one document per repository
    tokenizer     tokenizer_step, tokenizer, tokenizer_training, special_tokens, chat_template, hf_tokenizer, fertility
    tokens        tokenize_files <- shards, merge <- blocks <- encoders, encoder_choice <- gigatoken_engine, small_reference,
                  equality, sample_check, token_table, cuts, tokenizer_facts
    held out      split, heldout
    plan, views   shares, deal, plan, views; preview, estimate     percent -> samples -> documents -> pointers; the dry run
    index caches  cache_job, index_caches                          built by training.index_cache in a job of its own
    verification  verify, verification, verify_root, verify_reading, verify_cache

Beside it: judge/, which decides what is fine-tuned on (`quarry judge`).

Under all of them: files (whole or absent), indexed and columns (Megatron's format), manifest and records, progress, optional, errors.
"""
