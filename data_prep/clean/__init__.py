"""From text as it is found to text that is trained on: filters, decontamination, masking, deduplication, and what each of them did."""

from __future__ import annotations

from data_prep.clean.check import check
from data_prep.clean.cleaner import clean
from data_prep.clean.records import CleanRecord
from data_prep.clean.shards import SourceText

__all__ = ["CleanRecord", "SourceText", "check", "clean"]
