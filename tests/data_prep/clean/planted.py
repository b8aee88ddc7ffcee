"""Recipes over small sources with text that a test plants, and what cleaning made of them."""

import copy
import gzip
import json
import random
from functools import cache
from pathlib import Path

import zstandard

from data_prep.clean import SourceText, clean
from data_prep.files import file_sha256
from data_prep.progress import Silent
from recipes.compose import compose
from tests.data_prep import helpers

LETTERS = random.Random(5)
WORDS = ["".join(LETTERS.choice("abcdefghijklmnoprstuvw") for _ in range(LETTERS.randint(3, 9))) for _ in range(5000)]
CATEGORY = {"web_a": "web", "web_b": "web", "best": "web_hq", "code_a": "code", "math_a": "math"}


@cache
def _published():
    return compose(["curriculum=smoke"]).data.cleaning.model_dump(mode="json")


@cache
def _full_run():
    return compose([]).data.cleaning.model_dump(mode="json")


def cleaning(**changed):
    """The smoke corpus's cleaning without filters, benchmarks and masking; keys of `changed` replace its own."""
    base = copy.deepcopy(_published())
    base["filters"] = {category: {} for category in base["filters"]}
    base["decontamination"] = None
    base["masking"] = None
    base["near_duplicates"]["exempt"] = {}
    return base | changed


def near(**changed):
    return copy.deepcopy(_published()["near_duplicates"]) | {"exempt": {}} | changed


def recipe(folder, texts, **changed):
    """A recipe whose sources are the keys of `texts`, as `write` leaves them; `changed` goes to `cleaning`."""
    sources = {
        name: {"category": CATEGORY[name], "kind": "files", "paths": [str(folder / "raw" / f"{name}*.jsonl")]} for name in texts
    }
    return helpers.recipe(folder, sources=sources, cleaning=cleaning(**changed))


def write(folder, texts):
    """texts: source -> texts, or source -> list of files' texts; one JSON-lines file each, ids that say where a document stood."""
    (folder / "raw").mkdir(parents=True, exist_ok=True)
    for name, files in texts.items():
        files = [files] if not files or isinstance(files[0], str) else files
        for number, lines in enumerate(files):
            rows = [json.dumps({"id": f"{name}/{number}/{i}", "text": text}) for i, text in enumerate(lines)]
            (folder / "raw" / f"{name}_{number}.jsonl").write_text("".join(row + "\n" for row in rows))


def inputs(folder, made):
    """SourceText of each source, by the content of its files."""
    found = {}
    for name, source in made.data.sources.items():
        paths = sorted(path for pattern in source.paths for path in Path(pattern).parent.glob(Path(pattern).name))
        digest = helpers.hashlib.sha256(json.dumps([[p.name, file_sha256(p)] for p in paths]).encode()).hexdigest()
        carry = (source.repository_key, source.path_key) if source.concatenate else ()
        found[name] = SourceText(tuple(paths), source.text_key, digest, carry)
    return found


def run(folder, made, workers=1):
    """Clean; returns the records."""
    return clean(made, folder / "data", inputs(folder, made), Silent(), workers)


def cleaned(folder, texts, workers=1, **changed):
    """Write, clean; returns (recipe, records)."""
    write(folder, texts)
    made = recipe(folder, texts, **changed)
    return made, run(folder, made, workers)


def kept(folder, records):
    """Source -> entries of the documents that stay, in order."""
    return {
        name: [json.loads(line) for file in record.files for line in (folder / "data" / file.path).read_text().splitlines()]
        for name, record in records.items()
    }


def kept_ids(folder, records):
    return {entry["id"] for entries in kept(folder, records).values() for entry in entries}


def removed(folder, records):
    """Source -> entries of what was removed, in order: by filters and the like, then by deduplication."""
    found = {}
    for name, record in records.items():
        found[name] = []
        for file in record.files:
            for path in (file.filtered, file.duplicates):
                with zstandard.open(folder / "data" / path, "rb") as f:
                    found[name] += [json.loads(line) for line in f.read().splitlines()]
    return found


def sentence(rng, words=30):
    return " ".join(rng.choice(WORDS) for _ in range(words))


def pack(path):
    """Replace a file by its gzip."""
    with gzip.open(f"{path}.gz", "wb") as f:
        f.write(path.read_bytes())
    path.unlink()


PROSE = (
    "The harbour was quiet when the first boats came back from the night's work. Their crews had seen nothing but fog, and the "
    "lamps along the quay were still burning. An old man, who had spent most of his life repairing nets, counted them as they "
    "arrived and wrote the numbers into a small book.\n"
    "Nobody asked him why he did that. Some thought it was a habit that he could not give up, others that he waited for one "
    "boat in particular. When the last of them was tied to its post, he closed the book and walked slowly up the hill to the "
    "house with the green door.\n"
    "In the afternoon the wind turned, and with it came the smell of rain. Children ran down to the water to look at the "
    "catch before it was sold, and to be told stories that their parents would not have believed.\n"
)
CODE = '''"""Words of a text."""

import re


def words(text, pattern=re.compile(r"[a-z]+")):
    """All words of `text` in lower case, in order."""
    found = []
    for match in pattern.finditer(text.lower()):
        found.append(match.group())
    return found
'''
GERMAN = (
    "Der Hafen war still, als die ersten Boote von der Arbeit der Nacht zurückkamen. Die Mannschaften hatten nichts als Nebel "
    "gesehen, und die Lampen am Kai brannten noch. Ein alter Mann zählte sie und schrieb die Zahlen in ein kleines Buch."
)


def published(**changed):
    """The filters of a full run, a benchmark of our own and masking."""
    base = copy.deepcopy(_full_run())
    base["decontamination"] = None
    return base | {"name": "test"} | changed


def mixed(seed=0):
    """Text for every step: prose that passes, victims, copies, personal data, in three sources."""
    rng = random.Random(seed)
    paragraphs = PROSE.splitlines()

    def prose(number):
        lines = [f"{line} Number {number} {sentence(rng, 12)}." for line in paragraphs]
        return "\n".join(lines)

    good = [prose(i) for i in range(8)]
    return {
        "web_a": [
            [*good[:4], GERMAN * 3, "buy now " * 100 + PROSE, good[0], "short"],
            [good[5] + "\nMail me at jane@uni-x.de today.\n"],
        ],
        "web_b": [good[4], good[0], good[1].replace("Number 1", "Number one"), good[5] + " Lorem ipsum dolor sit amet."],
        "code_a": [CODE, CODE + "# other\n", "# DO NOT EDIT\n" + CODE * 2, CODE],
    }
