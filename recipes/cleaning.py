"""What is filtered, deduplicated, masked and decontaminated before tokenizing; part of a resolved recipe (data.cleaning).

Steps of one document, in this order: the filters of its source's category (in the order of the fields of `Filters`), decontamination,
masking. What is left of all sources is deduplicated together, exactly and then by MinHash. Filters come first, so that the copy that
stays of several is one that passed its filters. A filter or step that is null is off.

Fields of the filters that datatrove has are called as datatrove's arguments are; shares are between 0 and 1 there and here.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from recipes.fields import NonNegativeInt, PositiveFloat, PositiveInt, Strict

Share = Annotated[float, Field(ge=0, le=1)]


class TextFilter(Strict):
    """Light checks for text of any kind."""

    min_characters: PositiveInt | None
    """Shorter documents go."""
    max_characters: PositiveInt | None
    """Longer ones too: dumps and logs, which also cost the other filters minutes each."""
    max_broken_share: Share | None
    """Of characters that only damaged text has: U+FFFD, private use, control characters other than white space."""


class LanguageFilter(Strict):
    """Language of a document by py3langid, whose model comes in its wheel."""

    keep: list[str]
    """Codes as py3langid gives them (ISO 639-1)."""
    min_probability: Share
    """Of the most likely language; documents below it go."""
    max_characters: PositiveInt
    """What is looked at: the document's first characters."""


class GopherRepetitionFilter(Strict):
    """Repetition inside a document (Rae et al. 2021, table A1)."""

    dup_line_frac: Share | None
    dup_para_frac: Share | None
    dup_line_char_frac: Share | None
    dup_para_char_frac: Share | None
    top_n_grams: dict[PositiveInt, Share]
    """n -> largest share of characters in the most frequent n-gram of words."""
    dup_n_grams: dict[PositiveInt, Share]
    """n -> largest share of characters in n-grams of words that occur before."""


class GopherQualityFilter(Strict):
    """Shape of a document of prose (Rae et al. 2021, section A1.1). Words are as data_prep/clean/words.py splits them."""

    min_doc_words: PositiveInt | None
    max_doc_words: PositiveInt | None
    min_avg_word_length: PositiveFloat | None
    max_avg_word_length: PositiveFloat | None
    max_symbol_word_ratio: Share | None
    """Of '#' and of ellipses to words."""
    max_bullet_lines_ratio: Share | None
    max_ellipsis_lines_ratio: Share | None
    max_non_alpha_words_ratio: Share | None
    """datatrove's name; it is the least share of words that hold a letter."""
    min_stop_words: PositiveInt | None
    """Different ones of the, be, to, of, and, that, have, with."""


class C4Filter(Strict):
    """Lines and documents that C4 removed (Raffel et al. 2020). It removes lines of documents that stay."""

    remove_citations: bool
    filter_no_terminal_punct: bool
    """Remove lines that do not end in terminal punctuation."""
    min_num_sentences: int
    """Of a document after its lines were removed; -1: any."""
    min_words_per_line: int
    """Lines below it are removed; -1: none."""
    max_word_length: int
    """Characters; lines with a longer word are removed; -1: none."""
    filter_lorem_ipsum: bool
    filter_javascript: bool
    """Remove lines that mention javascript."""
    filter_curly_bracket: bool
    """Remove documents with a '{'."""
    filter_policy: bool
    """Remove lines about cookies and terms of use."""


class FineWebFilter(Strict):
    """Heuristics that FineWeb found by ablation (Penedo et al. 2024, section 3.6)."""

    line_punct_thr: Share
    """Least share of lines that end in terminal punctuation."""
    line_punct_exclude_zero: bool
    """Keep documents where no line does."""
    short_line_thr: Share
    """Largest share of lines of at most short_line_length characters."""
    short_line_length: NonNegativeInt
    char_duplicates_ratio: Share
    """Largest share of characters in lines that occur before."""
    new_line_ratio: PositiveFloat
    """Largest number of newlines per word."""


class Classifier(Strict):
    """A fastText classifier in a file of the user's; nothing is downloaded."""

    path: str
    """Model file (.bin)."""
    label: str
    """Label whose score counts, without the prefix __label__."""
    min_score: Share
    """A document passes (quality) or belongs (category) above this score."""


class Interval(Strict):
    at_least: PositiveFloat
    at_most: PositiveFloat


class GneissWebFilter(Strict):
    """The ensemble of GneissWeb (arXiv 2502.14907): a document stays if quality and (readability or tokens per character).

    Parts that are not there (no classifier named, no tokenizer yet) are left out: quality passes, and of readability and tokens per
    character the one that is there decides. Without category classifiers every document counts as in a category, because the limits
    there are the wider ones.
    """

    quality: dict[str, Classifier]
    """Name -> classifier; one that passes is enough."""
    categories: dict[str, Classifier]
    """Name -> classifier of a topic (medicine, education, technology, science) whose texts are long-worded by nature."""
    max_readability: PositiveFloat
    """McAlpine EFLAW, (words + words of at most three letters) per sentence: below it a document outside all categories is readable."""
    max_readability_in_category: PositiveFloat
    tokens_per_character: Interval
    """By the recipe's tokenizer where data.tokenizer.path names one; for documents outside all categories."""
    tokens_per_character_in_category: Interval


class CodeFilter(Strict):
    """Shape of a source file (StarCoder's and Granite's heuristics)."""

    max_line_characters: PositiveInt | None
    max_mean_line_characters: PositiveFloat | None
    min_alphanumeric_share: Share | None
    """Of all characters: letters and digits."""
    min_alphabetic_share: Share | None
    """Of all characters that are no white space: letters."""
    autogenerated_lines: NonNegativeInt
    """First lines searched for marks of generated files ('do not edit', 'auto-generated'); 0: not searched."""
    max_encoded_share: Share | None
    """Of characters in runs of base64 or of hexadecimal bytes (data in the shape of code)."""
    remove_xml: bool
    """Remove documents with an XML header in their first 100 characters."""


class Filters(Strict):
    """The filters of one category, in their order: those that cost little and remove much first."""

    text: TextFilter | None = None
    language: LanguageFilter | None = None
    code: CodeFilter | None = None
    gopher_quality: GopherQualityFilter | None = None
    gopher_repetition: GopherRepetitionFilter | None = None
    c4: C4Filter | None = None
    fineweb: FineWebFilter | None = None
    gneissweb: GneissWebFilter | None = None


class Benchmark(Strict):
    """Items that training data must not hold."""

    paths: list[str]
    """JSON-lines files or glob patterns; recipes:NAME is a file of the recipes tree that comes with Quarry."""
    keys: list[str]
    """Keys whose texts (or lists of texts) are an item's, each matched on its own."""
    id_key: str | None = None
    """Key that names an item in reports; None: file and line."""


class Decontamination(Strict):
    """Documents that share a run of words with an item of a benchmark go, whole."""

    ngram_words: PositiveInt
    """Length of the run. Words are compared in lower case, without punctuation and accents; numbers count."""
    min_item_words: PositiveInt
    """A text of fewer than ngram_words words is matched as a whole down to this length; shorter ones are not (and reported)."""
    benchmarks: dict[str, Benchmark]
    """Name -> benchmark; one that is null is left out."""

    @field_validator("benchmarks", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        return {name: b for name, b in value.items() if b is not None} if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _lengths(self) -> Decontamination:
        if self.min_item_words > self.ngram_words:
            raise ValueError(f"min_item_words is {self.min_item_words}, more than ngram_words ({self.ngram_words}); lower it")
        return self


class Masking(Strict):
    """Personal data is replaced in the text."""

    emails: bool
    ip_addresses: bool
    """Public IPv4 addresses; private and reserved ones are nobody's."""
    phone_numbers: bool
    """International (+49 ...) and North American numbers; it also takes some numbers that are none."""
    exempt: dict[str, str]
    """Category -> why nothing is masked there."""


class ExactDuplicates(Strict):
    """Of documents with the same text one stays, across all sources."""

    ignore_whitespace: bool
    """Texts that differ only in white space count as the same."""


class NearDuplicates(Strict):
    """Of documents that share most n-grams of words one stays, across all sources (MinHash with banding).

    With b buckets of r hashes, two documents of Jaccard similarity s (of their sets of n-grams) meet with probability
    1 - (1 - s^r)^b, which is steepest near (1/b)^(1/r). Documents that meet, directly or through others, are one cluster, and one
    document of a cluster stays.
    """

    ngram_words: PositiveInt
    """Documents with fewer words have no n-gram and are not compared."""
    buckets: PositiveInt
    hashes_per_bucket: PositiveInt
    normalise_numbers: bool
    """All numbers count as the same word."""
    seed: NonNegativeInt
    exempt: dict[str, str]
    """Category -> why its documents are not compared, with each other or with others."""

    @property
    def threshold(self) -> float:
        """Jaccard similarity around which detection turns from unlikely to likely: (1/buckets)^(1/hashes_per_bucket)."""
        return (1 / self.buckets) ** (1 / self.hashes_per_bucket)

    def detection_probability(self, similarity: float) -> float:
        """Probability that two documents of this Jaccard similarity meet in a bucket (Leskovec et al., Mining of Massive Datasets, 3.4)."""
        return 1 - (1 - similarity**self.hashes_per_bucket) ** self.buckets


class Cleaning(Strict):
    """The cleaning of all sources of a data set."""

    name: str
    priority: list[str]
    """Every category of the sources, best first: of several equal or similar documents the one stays whose source's category stands
    first here; then by the order of the sources in the recipe, of the files of a source (by name), of the lines of a file."""
    filters: dict[str, Filters]
    """Category -> its filters; every category of the sources has an entry ({}: none)."""
    decontamination: Decontamination | None
    masking: Masking | None
    exact_duplicates: ExactDuplicates | None
    near_duplicates: NearDuplicates | None

    def steps(self) -> list[str]:
        """Names of all steps in their order; a source has some of them."""
        return [*Filters.model_fields, "decontamination", "masking", "exact_duplicates", "near_duplicates"]
