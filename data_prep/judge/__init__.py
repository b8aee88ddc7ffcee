"""Curation of samples for supervised fine-tuning: deterministic rules, then an LLM judge behind any OpenAI-compatible endpoint.

config      rules and rubrics: YAML files, typed          samples     reading, repairs, types
rules       one sample at a time                          duplicates  leakage of benchmarks, near duplicates
planning    first pass: rules over the input              prompt      rubric and fenced sample, the answer's schema
client      one request                                   asking      concurrency, pace, retries, patience
verdict     an answer, checked; the verdict, computed     cache       judgements on disk
estimate    tokens, cost and time                         writing     last pass: four files and the audit
records     what is left beside them                      agreement   calibration against people's labels
curate      the whole of it                               local_server  a small model, served here, to try the path with
"""
