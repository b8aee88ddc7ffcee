"""Numbers as people read them: tokens, durations and rates for the terminal and the report."""

from __future__ import annotations


def tokens(count: float | None) -> str:
    """1234567 -> 1.23M; None -> -"""
    if count is None:
        return "-"
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= limit * 0.9995:
            return f"{count / limit:.3g}{unit}"
    return f"{count:.0f}" if count >= 10 or count == int(count) else f"{count:.2g}"


def length(count: int) -> str:
    """Sequence lengths as they are called: 4096 -> 4K, 131072 -> 128K, 1000 -> 1000."""
    return f"{count // 1024}K" if count >= 2048 and count % 1024 == 0 else str(int(count))


def duration(seconds: float | None) -> str:
    """3725 -> 1:02:05; 4.2 -> 4.2 s; None -> -"""
    if seconds is None:
        return "-"
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    whole = round(seconds)
    days, rest = divmod(whole, 86400)
    hours, rest = divmod(rest, 3600)
    clock = f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours or days else f"{rest // 60}:{rest % 60:02}"
    return f"{days} d {clock}" if days else clock


def rate(tokens_per_second: float | None) -> str:
    return "-" if tokens_per_second is None else f"{tokens(tokens_per_second)}/s"


def percent(share: float | None) -> str:
    """0.4123 -> 41.2%; None -> -"""
    return "-" if share is None else f"{share:.1%}"


def loss(nats: float | None) -> str:
    """Nats per token."""
    return "-" if nats is None else f"{nats:.4f}"


def number(value: float) -> str:
    """Shortest readable form: 0.0003 -> 3e-4, 10000.0 -> 10000."""
    if value == 0:
        return "0"
    if abs(value) < 1e-3 or abs(value) >= 1e7:
        mantissa, exponent = f"{value:.3g}".split("e") if "e" in f"{value:.3g}" else f"{value:.2e}".split("e")
        mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
        return f"{mantissa}e{int(exponent)}"
    return f"{value:.6g}"
