"""What is masked, and what only looks like it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.clean.masking import EMAIL, IP_ADDRESS, PHONE_NUMBER, Mask
from recipes.cleaning import Masking

ALL = Masking(emails=True, ip_addresses=True, phone_numbers=True, exempt={})


@pytest.mark.parametrize(
    ("text", "masked", "kinds"),
    [
        ("write to jane.doe+x@mail.uni-x.de.", f"write to {EMAIL}.", ["email"]),
        ("<a_b%c@x.co.uk>,q@y.org", f"<{EMAIL}>,{EMAIL}", ["email"]),
        ("from 8.8.4.4 to 130.89.1.2:80", f"from {IP_ADDRESS} to {IP_ADDRESS}:80", ["ip_address"]),
        ("call +49 (30) 1234 5678 now", f"call {PHONE_NUMBER} now", ["phone_number"]),
        ("(212) 555-2368 or 212.555.2368", f"{PHONE_NUMBER} or {PHONE_NUMBER}", ["phone_number"]),
        ("a@b.io at 9.9.9.9", f"{EMAIL} at {IP_ADDRESS}", ["email", "ip_address"]),
    ],
)
def test_masked(text, masked, kinds):
    mask = Mask(ALL)
    assert (mask.format(text), mask.kinds) == (masked, kinds)
    assert (mask.format(masked), mask.kinds) == (masked, [])


@pytest.mark.parametrize(
    "text",
    [
        "me@example.com, x@host.invalid",  # reserved for examples
        "git@github.com:owner/name.git",  # a repository's address
        "y = x@w.mean(axis=0)",  # a matrix product and a call
        "@decorator.name\ndef f(): ...",
        "127.0.0.1 192.168.1.4 10.0.0.1",  # private
        "version 1.2.3.4.5 and 2021.10.1.2b",
        "999.1.1.1",
        "1234567890 2024-11-24 12:30:15",
        "+1 202 555 0100",
        "pi is 3.14159 26535",
    ],
)
def test_left_alone(text):
    mask = Mask(ALL)
    assert (mask.format(text), mask.kinds) == (text, [])


def test_each_kind_is_an_option():
    text = "a@b.io 8.8.8.8 (212) 555-2368"
    for kind in ("emails", "ip_addresses", "phone_numbers"):
        only = Masking(**{k: k == kind for k in ("emails", "ip_addresses", "phone_numbers")}, exempt={})
        mask = Mask(only)
        assert mask.format(text).split(" ", 2)[0] == (EMAIL if kind == "emails" else "a@b.io")
        assert len(mask.kinds) == 1


@given(st.text(alphabet="ab1.@-+ ()2569", max_size=60))
def test_masking_again_changes_nothing_and_no_text_depends_on_the_one_before(text):
    mask = Mask(ALL)
    once = mask.format(text)
    assert mask.format(once) == once
    assert Mask(ALL).format(text) == once


def test_long_encoded_data_is_no_trouble():
    # datatrove's own pattern takes minutes for this one, squared in its length.
    text = "data:" + "abc/def+" * 100_000 + " x@y.org"
    assert Mask(ALL).format(text).endswith(f" {EMAIL}")
