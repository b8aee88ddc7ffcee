"""What the tests of verification share: damage done to prepared data, and findings looked up."""

import json

import numpy as np

from data_prep.files import digest_of, record_file, write_json
from data_prep.index_caches import IndexCache, cache_path
from data_prep.indexed import Index, bin_path, idx_path
from data_prep.manifest import MixtureManifest, mixture_path
from data_prep.merge import file_xxh3
from data_prep.plain_files import with_digest


def files_of(findings):
    return {finding.file for finding in findings}


def finding(findings, file, what=""):
    """The one finding of `file` whose description holds `what`."""
    found = [f for f in findings if f.file == file and what in f.what]
    assert len(found) == 1, findings
    assert found[0].remedy
    return found[0]


def flip(path, position, mask=1):
    content = bytearray(path.read_bytes())
    content[position] ^= mask
    path.write_bytes(bytes(content))


def manifest(root, phase="first"):
    return MixtureManifest.read(mixture_path(root, phase))


def sign_again(path, change):
    """Change a signed JSON file and make its digest fit: a lie that only the files can show."""
    values = json.loads(path.read_text())
    change(values)
    del values["digest"]
    write_json(path, {**values, "digest": digest_of(values)})


def record_again(root, name):
    """All records of a source's tokens, and of the views on them, fitted to the .bin and .idx as they are now."""
    source, heldout, tokens = (root / folder / stem for folder, stem in (
        ("tokenized", name), ("tokenized", f"{name}.heldout"), ("tokens", name)))  # fmt: skip
    index, whole = Index.read(idx_path(source)), Index.read(idx_path(tokens))
    files = {key: record_file(path).model_dump() for key, path in (("bin", bin_path(source)), ("idx", idx_path(source)))}
    files |= {"heldout_bin": files["bin"], "heldout_idx": record_file(idx_path(heldout)).model_dump()}
    write_again(source.with_suffix(".json"), documents=index.documents, tokens=index.tokens, **files)
    written = {suffix: {"bytes": path.stat().st_size, "xxh3": file_xxh3(path)} for suffix, path in (
        ("bin", bin_path(tokens)), ("idx", idx_path(tokens)))}  # fmt: skip
    write_again(tokens.with_suffix(".json"), documents=whole.documents, tokens=whole.tokens, **written)
    for folder in (root / "views").iterdir():
        if (folder / f"{name}.idx").exists():
            view = {"bin": files["bin"], "idx": record_file(folder / f"{name}.idx").model_dump()}
            sign_again(folder / "manifest.json", lambda m, view=view: m["sources"][name].update(view))


def write_again(path, **values):
    changed = {**json.loads(path.read_text()), **values}
    signed = changed.pop("digest", None) is not None
    write_json(path, with_digest(changed) if signed else changed)


def cache(root, phase="first"):
    folder = cache_path(root, manifest(root, phase))
    return folder, IndexCache.read(folder / "record.json")


def pair(folder, texts, vocab=1000, **record):
    from data_prep.indexed import Writer

    folder.mkdir(exist_ok=True)
    with Writer(folder / "own", vocab) as writer:
        for tokens in texts:
            writer.add(np.array(tokens))
    if record:
        files = {name: record_file(folder / f"own.{name}").model_dump() for name in ("bin", "idx")}
        counts = {"documents": len(texts), "tokens": sum(map(len, texts)), "max_token_id": max(map(max, texts))}
        values = {"format": "quarry.tokens/1", "dtype": "uint16", **counts, **files, **record}
        write_json(folder / "own.json", values)
    return folder / "own"
