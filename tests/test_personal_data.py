"""Personal data by kind and by hand: found, left alone, masked once, and as pseudonyms that only a key gives."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import plugins
from pipelines.cleaning import CleaningSettings, clean
from pipelines.errors import GristmillError
from pipelines.filters import Filter
from pipelines.personal_data import KEY_VARIABLE, KINDS, TOKEN, PersonalData, find, key_id, mask, pseudonym_key

KEY = "a key of the tests, no secret, 32+"
PSEUDONYMS = PersonalData(form="pseudonym", key_id=key_id(KEY))


def masked(text: str, **values: object) -> str:
    return mask(text, PersonalData.model_validate(values))[0]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("kelemen dot g at gnome dot hu wrote", "<EMAIL> wrote"),
        ("E-mail: ann AT example DOT co DOT uk.", "E-mail: <EMAIL>."),
        ("Larry <larry (at) example.org>", "Larry <<EMAIL>>"),
        ("daniel [at] example [dot] dk", "<EMAIL>"),
        ("..ann@example.com, 联系ann@example.com", "..<EMAIL>, 联系<EMAIL>"),
        ("added by 2601:406:C202:7591:82A:7DEE:F0F0:4077 (talk)", "added by <IP> (talk)"),
        ("2001:db8::1, fe80::5054:ff:fe9 and fd00::1", "<IP>, <IP> and <IP>"),
        ("IBAN DE89 3704 0044 0532 0130 00, or GB82WEST12345698765432.", "IBAN <IBAN>, or <IBAN>."),
        ("NO93 8601 1117 947", "<IBAN>"),
        ("NI number AB 12 34 56 C or JG103759A", "NI number <NATIONAL_ID> or <NATIONAL_ID>"),
        ("CPF 111.444.777-35", "CPF <NATIONAL_ID>"),
        ("id 11010519491231002X", "id <NATIONAL_ID>"),
        ("tel:+31641044153", "tel:<PHONE>"),
    ],
)
def test_what_is_found(text: str, wanted: str) -> None:
    assert masked(text) == wanted


@pytest.mark.parametrize(
    "text",
    [
        "look at example dot com",
        "the logo@2x.png of a country th[at] rich, [it] ha[s]",
        "std::vector, face::bad, 12:34:56, ::1, 00:1b:44:11:3a:b7",
        "DE89 3704 0044 0532 0130 01 has wrong check digits, XX89370400440532013000 no country",
        "part GB123456A and serial AB123456CD",
        "CPF 111.444.777-36 and 111.111.111-11",
        "110105194912310021 and 110105194913310025",
        "000-12-3456, 666-12-3456, 123-00-4567, 123-45-0000",
        "+4294967296, (-32768000, +32768000), +10011010010, +281474976710656",
        "New version from 3.6.2.0 to 3.6.2.1",
    ],
)
def test_what_is_left(text: str) -> None:
    assert mask(text, PersonalData()) == (text, {})


def test_each_kind_can_be_counted_or_left() -> None:
    text = "ann@example.com, 192.0.2.200, 192.0.2.201"
    assert mask(text, PersonalData(email="count", ip="mask")) == ("ann@example.com, <IP>, <IP>", {"emails_counted": 1, "ips_masked": 2})
    assert mask(text, PersonalData(email="off", ip="count")) == (text, {"ips_counted": 2})
    settings = CleaningSettings.model_validate({"personal_data": {"email": False}})  # as YAML reads the word off
    assert settings.personal_data.ways == {kind: "off" if kind == "email" else "mask" for kind in KINDS}
    assert set(CleaningSettings.model_validate({"personal_data": "count"}).personal_data.ways.values()) == {"count"}


def test_to_drop_is_for_recipes() -> None:
    with pytest.raises(GristmillError, match="drop is a decision: score the filter personal_data"):
        plugins.validate(CleaningSettings, {"personal_data": {"email": "drop"}}, where="cleaning")


ADDRESSES = [
    "ann@example.com",
    "ann at example dot com",
    "192.0.2.200",
    "2001:db8::1",
    "+49 30 901820",
    "4111 1111 1111 1111",
    "954-75-8691",
]
NUMBERS = ["GB82WEST12345698765432", "111.444.777-35", "11010519491231002X", "AB123456C", "(312) 555-0143", "10.0.0.1", "954-75-8691"]
JOINTS = ["", " ", ".", ",", "-", "+", "@", ":", "/", "<", ">", "\n", "version ", "host ", " to ", "from ", "a", "1", "(at)", " dot "]
TEXTS = st.lists(st.sampled_from([*ADDRESSES, *NUMBERS, *JOINTS]), max_size=14).map("".join)


@settings(max_examples=300, deadline=None)
@given(TEXTS)
def test_masking_again_changes_nothing(text: str) -> None:
    for values, key in ((PersonalData(), b""), (PSEUDONYMS, b"k" * 32)):
        once, counts = mask(text, values, key)
        assert mask(once, values, key) == (once, {})
        assert sum(counts.values()) == len(TOKEN.findall(once)) - len(TOKEN.findall(text)) or not counts


@settings(max_examples=200, deadline=None)
@given(TEXTS)
def test_what_is_found_stands_in_order_without_overlap(text: str) -> None:
    found = find(text)
    assert all(one.end <= other.start for one, other in itertools.pairwise(found))
    assert all(0 <= one.start < one.end <= len(text) and one.kind in KINDS for one in found)


def test_a_pseudonym_is_the_same_wherever_the_address_stands() -> None:
    text = "Ann@Example.com, ann@example.com, ann at example dot com; bob@example.com; 2001:db8::1, 2001:DB8:0:0::1"
    once, counts = mask(text, PSEUDONYMS, b"k" * 32)
    tokens = [match[0] for match in TOKEN.finditer(once)]
    assert counts == {"emails_masked": 4, "ips_masked": 2}
    assert len(set(tokens[:3])) == 1 and tokens[3] not in tokens[:3] and tokens[4] == tokens[5]
    assert mask(text, PSEUDONYMS, b"l" * 32)[0] != once
    assert clean("ann@example.com", CleaningSettings(personal_data=PSEUDONYMS), b"k" * 32)[0] == tokens[0]


def test_the_key_comes_from_the_environment_and_is_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    assert len(pseudonym_key(PSEUDONYMS)) == 32
    assert pseudonym_key(PersonalData()) == b""
    for value in ("short", "another key of the tests, as long as that"):
        monkeypatch.setenv(KEY_VARIABLE, value)
        with pytest.raises(GristmillError, match=KEY_VARIABLE) as raised:
            pseudonym_key(PSEUDONYMS)
        assert value not in str(raised.value)
    with pytest.raises(GristmillError, match="form pseudonym needs key_id"):
        plugins.validate(PersonalData, {"form": "pseudonym"}, where="cleaning")


def test_the_filter_counts_what_is_masked_and_what_is_not() -> None:
    plugin = plugins.build("filters", "personal_data")
    assert isinstance(plugin, Filter)
    text = "ann@example.com, <EMAIL>, <EMAIL:abcdefghijklmnop>, <PHONE>, 192.0.2.200"
    found = {rule: values.tolist() for rule, values in plugin.score([text, ""]).items()}
    assert found == {"emails": [3, 0], "ibans": [0, 0], "cards": [0, 0], "national_ids": [0, 0], "phones": [1, 0], "ips": [1, 0]}
