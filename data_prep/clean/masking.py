"""Personal data in text: addresses and numbers are replaced by ones that are reserved for examples.

datatrove's formatter with patterns of ours. Its own replacements go round a list, so that a text would depend on the documents before
it and equal documents would differ; its pattern for addresses takes quadratic time on long encoded data, and that for IP addresses
takes parts of longer numbers.
"""

from __future__ import annotations

from datatrove.pipeline.formatters.pii import PIIFormatter, PIIReplacer, public_ip_validator

from recipes.cleaning import Masking

EMAIL, IP_ADDRESS, PHONE_NUMBER = "email@example.com", "192.0.2.1", "+1 202 555 0100"
"""Reserved for examples: RFC 2606, RFC 5737, and the North American numbers 555-01XX. Masking a masked text changes nothing."""

EMAIL_PATTERN = (
    r"(?<![A-Za-z0-9._%+\-])[A-Za-z0-9][A-Za-z0-9._%+\-]{0,63}@"
    r"(?:[A-Za-z0-9](?:[A-Za-z0-9\-]{0,61}[A-Za-z0-9])?\.){1,8}[A-Za-z]{2,24}(?![A-Za-z0-9\-(])"
)
"""At most 64 characters before the @ (RFC 5321) keep it linear; an opening bracket behind it is a call in code, as in x@y.mean(...)."""
IP_PATTERN = r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?![\w]|\.\d)"
PHONE_PATTERN = (
    r"(?<![\w.+])(?:\+\d{1,3}[ .\-/]?(?:\(\d{1,4}\)[ .\-/]?)?\d{1,4}(?:[ .\-/]?\d{2,4}){1,4}"
    r"|\(?[2-9]\d{2}\)?[ .\-][2-9]\d{2}[ .\-]\d{4})(?![\w]|[.\-]\d)"
)
PHONE_DIGITS = range(8, 16)
"""International numbers have at most 15 digits (E.164); fewer than 8 are too often something else."""
RESERVED_DOMAINS = ("example.com", "example.org", "example.net", ".example", ".invalid", ".test", ".localhost")


def is_personal(address: str) -> bool:
    """Whether an e-mail address can be somebody's: not one for examples, not the user of a repository's URL."""
    return not address.lower().endswith(RESERVED_DOMAINS) and not address.startswith("git@")


def is_phone_number(number: str) -> bool:
    return number != PHONE_NUMBER and sum(c.isdigit() for c in number) in PHONE_DIGITS


class Mask(PIIFormatter):
    """`kinds` after `format`: what was replaced in the last text."""

    def __init__(self, config: Masking):
        super().__init__(remove_emails=config.emails, remove_ips=config.ip_addresses)
        self.config = config
        self.emails_replacer = PIIReplacer(EMAIL_PATTERN, EMAIL, validator=is_personal)
        self.ip_replacer = PIIReplacer(IP_PATTERN, IP_ADDRESS, validator=public_ip_validator)
        self.phone_replacer = PIIReplacer(PHONE_PATTERN, PHONE_NUMBER, validator=is_phone_number)
        self.kinds: list[str] = []

    def format(self, text: str) -> str:
        self.kinds = []
        for kind, wanted, possible, replacer in (
            ("email", self.config.emails, "@" in text, self.emails_replacer),
            ("ip_address", self.config.ip_addresses, "." in text, self.ip_replacer),
            ("phone_number", self.config.phone_numbers, True, self.phone_replacer),
        ):
            if wanted and possible:
                masked = replacer.replace(text)
                if masked != text:
                    self.kinds.append(kind)
                    text = masked
        return text
