"""Words that a shell, sbatch, pyxis or Docker's mounts would read as something else than a word."""

HOSTILE = (
    "a b",
    "a;b",
    "a'b",
    'a"b',
    "$(touch x)",
    "`id`",
    "a\nb",
    "a|b",
    "a&b",
    "a>b",
    "a*",
    "a\\b",
    "${HOME}",
    "a,b",
    "~",
    "#a",
    "",
)
