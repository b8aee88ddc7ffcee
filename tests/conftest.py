"""What takes long begins first: with one file per process at a time, a long one that begins last runs alone."""

LONG = ("tests/slurm/", "tests/test_smoke.py", "tests/training/", "tests/launchers/", "tests/model/")
"""Beginnings of paths, longest first; `make test` prints the slowest tests."""


def pytest_collection_modifyitems(items):
    def rank(item):
        return next((number for number, path in enumerate(LONG) if item.nodeid.startswith(path)), len(LONG))

    items.sort(key=rank)
