"""Personal data: addresses and numbers that point at a person, found by their written form and their check digits, and masked.

The patterns find the common written forms, not every one. A mask is a tag (``<EMAIL>``), or a pseudonym
(``<EMAIL:kbpdaf...>``): the same address gives the same letters wherever it stands, and who has no key cannot go back, nor try
addresses. Masking what is masked changes nothing.

National ids: US social security and taxpayer numbers (with hyphens), UK national insurance numbers, and, with check digits,
Brazilian CPF (with its points) and Chinese resident identity numbers (GB 11643, with a date of birth). More: add a pattern
and its test to `_NUMBER` and `_is_national_id`.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from ipaddress import IPv6Address, IPv6Network
from typing import Annotated, Literal, NamedTuple

from pydantic import BeforeValidator, model_validator

from pipelines.errors import GristmillError
from pipelines.plugins import Settings

KINDS = ("email", "iban", "card", "national_id", "phone", "ip")
KEY_VARIABLE = "GRISTMILL_PSEUDONYM_KEY"
MIN_KEY_CHARACTERS = 32
TOKEN = re.compile(rf"<({'|'.join(kind.upper() for kind in KINDS)})(?::[a-p]{{16}})?>")
"""A mask in either form. Its letters are hexadecimal digits written a to p, so that no pattern finds a number in it."""


def _way(value: object) -> object:
    """Return what is done with a kind: YAML reads the word off as false."""
    if value == "drop":
        raise ValueError("drop is a decision: score the filter personal_data and give its rule a threshold in a recipe")
    return "off" if value is False else value


Way = Annotated[Literal["off", "count", "mask"], BeforeValidator(_way)]


class PersonalData(Settings):
    """What is done with each kind: ``off``, ``count`` what is found and leave it, or ``mask`` it."""

    email: Way = "mask"
    """E-mail addresses, also written ``name at host dot org`` and ``name [at] host.org``."""
    iban: Way = "mask"
    """International bank account numbers: length by country, check digits (ISO 13616)."""
    card: Way = "mask"
    """Payment cards: issuer's digits and check digit (ISO/IEC 7812)."""
    national_id: Way = "mask"
    """National ids of the kinds that the module names."""
    phone: Way = "mask"
    """Phone numbers with a country code, and those of North America."""
    ip: Way = "mask"
    """IPv4 and IPv6 addresses, but loopback, unspecified and netmask addresses, which point at nobody."""
    form: Literal["tag", "pseudonym"] = "tag"
    """How a mask is written. A pseudonym needs `key_id`, and the key in the environment (GRISTMILL_PSEUDONYM_KEY)."""
    key_id: str | None = None
    """Which key: another key gives other text, so the key's id is part of what the text is made from. The key itself is not."""

    @model_validator(mode="after")
    def _names_its_key(self) -> PersonalData:
        if self.form == "pseudonym" and self.key_id is None:
            raise ValueError(f"form pseudonym needs key_id; {_remedy()}")
        return self

    @property
    def ways(self) -> dict[str, str]:
        """Kind to what is done with it."""
        return {kind: getattr(self, kind) for kind in KINDS}


class Found(NamedTuple):
    """Where personal data stands in a text."""

    start: int
    end: int
    kind: str
    value: str
    """In the form in which two ways to write the same are equal."""


def pseudonym_key(settings: PersonalData) -> bytes:
    """Return what is made of the key that `settings` need from the environment; nothing where they need none.

    Raises:
        GristmillError: there is no key, a short one, or another one. The message has the key's id, never the key.
    """
    if settings.form == "tag" or "mask" not in settings.ways.values():
        return b""
    key = os.environ.get(KEY_VARIABLE, "")
    if len(key) < MIN_KEY_CHARACTERS:
        raise GristmillError(
            f"{KEY_VARIABLE} has {len(key)} characters; pseudonyms need a key of at least {MIN_KEY_CHARACTERS}; {_remedy()}"
        )
    if key_id(key) != settings.key_id:
        raise GristmillError(f"{KEY_VARIABLE} has id {key_id(key)!r}, personal_data.key_id is {settings.key_id!r}; give the key or the id")
    return hashlib.blake2b(key.encode(), digest_size=32, person=b"gristmill-key").digest()


def key_id(key: str) -> str:
    """Return the id of a key: 8 hexadecimal digits of a hash (BLAKE2b) from which the key cannot be had, if it is random."""
    return hashlib.blake2b(key.encode(), digest_size=4, person=b"gristmill-key-id").hexdigest()


def _remedy() -> str:
    return (
        f"put a random key into {KEY_VARIABLE} and its id into personal_data.key_id "
        "(python -c 'import os; from pipelines.personal_data import *; print(key_id(os.environ[KEY_VARIABLE]))')"
    )


def mask(text: str, settings: PersonalData, key: bytes = b"") -> tuple[str, dict[str, int]]:
    """Return `text` with what is to be masked replaced, and counts: ``emails_masked``, ``phones_counted`` and so on, zeros left out."""
    counts: dict[str, int] = {}
    ways = settings.ways
    while masked := [found for found in find(text) if ways[found.kind] == "mask"]:
        pieces, end = [], 0
        for found in masked:
            pieces += [text[end : found.start], token(found, key)]
            end = found.end
            counts[f"{found.kind}s_masked"] = counts.get(f"{found.kind}s_masked", 0) + 1
        text = "".join([*pieces, text[end:]])  # and once more: what stood beside an address may now stand on its own
    if "count" in ways.values():
        for found in find(text):
            if ways[found.kind] == "count":
                counts[f"{found.kind}s_counted"] = counts.get(f"{found.kind}s_counted", 0) + 1
    return text, counts


def token(found: Found, key: bytes) -> str:
    """Return the mask of what was found: a pseudonym where there is a key."""
    name = found.kind.upper()
    if not key:
        return f"<{name}>"
    digest = hashlib.blake2b(f"{found.kind}:{found.value}".encode(), key=key, digest_size=8).hexdigest()
    return f"<{name}:{digest.translate(_LETTERS)}>"


_LETTERS = str.maketrans("0123456789abcdef", "abcdefghijklmnop")


def find(text: str) -> list[Found]:
    """Return the personal data in `text`, by place, without overlap: of two that do, the kind that is first in `KINDS`."""
    found = [*_emails(text), *_numbers(text)]
    if _LETTERS_THEN_DIGITS.search(text):
        found += [*_ibans(text), *_insurance_numbers(text)]
    if _TWO_COLONS.search(text):
        found += _ipv6(text)
    found.sort()
    taken: list[Found] = []
    for each in found:
        if not taken or taken[-1].end <= each.start:
            taken.append(each)
        elif KINDS.index(each.kind) < KINDS.index(taken[-1].kind):
            taken[-1] = each
    return taken


_LETTERS_THEN_DIGITS, _TWO_COLONS = re.compile(r"[A-Z]{2} ?[0-9]{2}"), re.compile(r":[0-9A-Fa-f]{0,4}:")
"""What a text holds in which longer patterns can be found; most texts do not, and this is sooner seen."""

_LOCAL = re.compile(r"[A-Za-z0-9][\w.%+-]{0,63}\Z", re.ASCII)
_HOST = re.compile(r"[A-Za-z0-9-]{1,63}(?:\.[A-Za-z0-9-]{1,63}){0,8}\.([A-Za-z]{2,24})\b", re.ASCII)
_FILE_ENDINGS = frozenset(["png", "jpg", "jpeg", "gif", "svg", "webp", "ico", "css", "js", "json", "html", "htm", "xml", "php", "txt"])
"""What follows the point in ``logo@2x.png``."""


def _emails(text: str) -> Iterator[Found]:
    place, end = text.find("@"), 0
    while place >= 0:
        local = _LOCAL.search(text, max(end, place - 64), place)
        host = _HOST.match(text, place + 1) if local else None
        if local and host and host[1].lower() not in _FILE_ENDINGS:
            end = host.end()
            yield Found(local.start(), end, "email", f"{local[0]}@{host[0]}".lower())
        place = text.find("@", max(place + 1, end))
    if " dot " in text or " DOT " in text or _HIDDEN_AT.search(text):
        yield from (found for match in _HIDDEN.finditer(text) if (found := _hidden(match)))


_HIDDEN_AT = re.compile(r"[\[({<] ?(?:at|AT|@) ?[\])}>]")
_HIDDEN = re.compile(
    r"""(?<![\w.%+-])
    (?P<local>[A-Za-z0-9][\w.%+-]{0,63}(?:[ ](?:dot|DOT)[ ][\w.%+-]{1,63}){0,3})
    (?:(?P<bracket>[ ]{0,2}[\[({<][ ]?(?:at|AT|@)[ ]?[\])}>][ ]{0,2}) | [ ](?:at|AT)[ ])
    (?P<host>[A-Za-z0-9-]{1,63}(?:(?P<dot>[ ]{1,2}(?:dot|DOT)[ ]{1,2}|[ ]?[\[({<][ ]?(?:dot|DOT|\.)[ ]?[\])}>][ ]?)[A-Za-z0-9-]{1,63}
        |\.[A-Za-z0-9-]{1,63}){1,6})
    (?![\w-])""",
    re.VERBOSE | re.ASCII,
)
_DOT = re.compile(r" {0,2}(?:[\[({<] ?)?\b(?:dot|DOT)\b(?: ?[\])}>])? {0,2}| ?[\[({<] ?\. ?[\])}>] ?")
_NO_NAMES = ("look", "looking", "available", "found", "hosted", "us", "me", "live", "is", "are", "online", "site", "page", "website")
"""What stands before "at example dot com" in a sentence that names a site."""


def _hidden(match: re.Match[str]) -> Found | None:
    """Return an address written to be hidden; with a bare "at", its points have to be written out too."""
    if not match["bracket"] and (not match["dot"] or match["local"].lower() in _NO_NAMES):
        return None
    local, host = (_DOT.sub(".", match[part]) for part in ("local", "host"))
    if not _HOST.fullmatch(host):
        return None
    return Found(match.start(), match.end(), "email", f"{local}@{host}".lower())


_IBAN = re.compile(r"[A-Z](?<!\w.)[A-Z]\d\d(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?", re.ASCII)
_IBAN_COUNTRIES = {
    15: "NO",
    16: "BE",
    18: "DK FI FK FO GL NL SD",
    19: "MK SI",
    20: "AT BA EE KZ LT LU MN XK",
    21: "CH HR LI LV",
    22: "BG BH CR DE GB GE IE ME RS VA",
    23: "AE GI IL IQ OM SO TL",
    24: "AD CZ ES MD PK RO SA SE SK TN VG",
    25: "LY PT ST",
    26: "IS TR",
    27: "BI DJ FR GR IT MC MR SM",
    28: "AL AZ BY CY DO GT HU LB NI PL SV",
    29: "BR EG PS QA UA",
    30: "JO KW MU YE",
    31: "MT SC",
    33: "RU",
}
_IBAN_LENGTHS = {country: length for length, countries in _IBAN_COUNTRIES.items() for country in countries.split()}
"""Length of an IBAN by country (ISO 13616 registry)."""


def _ibans(text: str) -> Iterator[Found]:
    for match in _IBAN.finditer(text):
        length = _IBAN_LENGTHS.get(match[0][:2], 0)
        end, letters = match.start(), ""
        while end < match.end() and len(letters) < length:
            letters += text[end].strip()
            end += 1
        moved = letters[4:] + letters[:4]
        inside = text[end : end + 1].isalnum()
        if length == len(letters) > 0 and not inside and int("".join(str(int(letter, 36)) for letter in moved)) % 97 == 1:
            yield Found(match.start(), end, "iban", letters)


_INSURANCE_NUMBER = re.compile(r"[A-CEGHJ-PR-TW-Z](?<!\w.)[A-CEGHJ-NPR-TW-Z] ?\d\d ?\d\d ?\d\d ?[A-D](?!\w)", re.ASCII)
_NEVER_GIVEN = ("BG", "GB", "KN", "NK", "NT", "TN", "ZZ")


def _insurance_numbers(text: str) -> Iterator[Found]:
    """Yield UK national insurance numbers (HMRC, National Insurance Manual NIM39110); they have no check digit."""
    for match in _INSURANCE_NUMBER.finditer(text):
        if not match[0].startswith(_NEVER_GIVEN):
            yield Found(match.start(), match.end(), "national_id", match[0].replace(" ", ""))


_RUN = re.compile(r"[+(\d][\d .()\-]{5,}[\dX]", re.ASCII)
"""What every number holds that `_NUMBER` finds; prose has few of them."""
_BEHIND = 2
"""Characters after a number that say whether it ends there."""
_NUMBER = re.compile(
    r"""(?<![\w.+-])(?:
        (?P<national_id>\d{17}[\dX] (?!\w|[.,-]\d) | \d{3}-\d\d-\d{4} (?![\w-]) | \d{3}\.\d{3}\.\d{3}-\d\d (?![\w-]))
      | (?P<card>\d{4}([ -])\d{4}\3\d{4}\3\d{4} | 3[47]\d\d([ -])\d{6}\4\d{5} | \d{13,16}) (?!\w|[.,-]\d)
      | (?P<phone>\+[1-9]\d{0,2}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d{1,4}(?:[ .-]?\d{2,4}){1,5}
          | (?:1[ .-])?\(\d{3}\)[ ]?\d{3}[ .-]\d{4} | (?:1-)?\d{3}-\d{3}-\d{4} | (?:1\.)?\d{3}\.\d{3}\.\d{4}) (?![\w-]|\.\d)
      | (?P<ip>\d{1,3}(?:\.\d{1,3}){3}) (?!\w|\.\d|-\w)
    )""",
    re.VERBOSE | re.ASCII,
)


def _numbers(text: str) -> Iterator[Found]:
    for run in _RUN.finditer(text):
        for match in _NUMBER.finditer(text, run.start(), run.end() + _BEHIND):
            kind = str(match.lastgroup)
            if _IS_PERSONAL[kind](match):
                value = match[0] if kind == "ip" else re.sub(r"[^\dX]", "", match[0])
                yield Found(match.start(), match.end(), kind, value)


_ISSUER = re.compile(r"4(?:\d{12}|\d{15})|5[1-5]\d{14}|2[2-7]\d{14}|3[47]\d{13}|6(?:011|5\d\d)\d{12}")
"""First digits and lengths of Visa, Mastercard, American Express and Discover (ISO/IEC 7812)."""
_VERSION_BEFORE = re.compile(
    r"(?:\b(?:versions?|ver\.?|release|v|sections?|sec\.|chapter|clause|paragraph)|§)\s*$",
    re.IGNORECASE,
)
_ADDRESS_BEFORE = re.compile(r"(?:\bip|\baddress|\bhost|\bserver|\bfrom|\bping|\bdns|\bsubnet|\bgateway)\b.{0,12}$|//$|@$", re.IGNORECASE)

_TO_BEFORE = re.compile(r"\d to $")
"""Before and after the four numbers of "from 3.6.1.0 to 3.6.2.0" stands what shows a version."""


def _is_card(match: re.Match[str]) -> bool:
    """Return whether the number has an issuer's digits and ends in its Luhn check digit (ISO/IEC 7812-1, annex B)."""
    digits = re.sub(r"\D", "", match[0])
    doubled = [int(digit) * (1 + place % 2) for place, digit in enumerate(reversed(digits))]
    return _ISSUER.fullmatch(digits) is not None and sum(number - 9 if number > 9 else number for number in doubled) % 10 == 0


_COUNTRY = re.compile(
    r"""1|7|2(?:0|7|1[12368]|[2-6]\d|9[01789])|3(?:[0-469]|5\d|7\d|8[0-35-79])|4(?:[013-9]|2[013])|5(?:[1-8]|0\d|9\d)
      |6(?:[0-6]|7[02-9]|8[0-35-9]|9[0-2])|8(?:[1246]|5[02356]|80|86)|9(?:[0-58]|6[0-8]|7[0-79]|9[2-68])""",
    re.VERBOSE,
)
"""Country codes that are given (ITU-T E.164, list of assigned country codes)."""
_NORTH_AMERICAN = re.compile(r"1[2-9]\d\d[2-9]\d{6}")


def _is_phone(match: re.Match[str]) -> bool:
    """Return whether a number has the digits of a phone number; one that is not cut into groups has to fit its country code."""
    digits = re.sub(r"\D", "", match[0])
    if not 8 <= len(digits) <= 15:  # E.164 allows 15
        return False
    if not match[0].startswith("+"):
        return True
    country = _COUNTRY.match(digits)
    if country is None or match[0][1:] != digits:
        return country is not None
    return _NORTH_AMERICAN.fullmatch(digits) is not None if country[0] == "1" else 7 <= len(digits) - len(country[0]) <= 11


def _is_address(match: re.Match[str]) -> bool:
    """Return whether four numbers are an address.

    Where they could be a version or a section (each below 100, or after "version", "section" and the like), the words before
    them have to say so.
    """
    octets = [int(part) for part in match[0].split(".")]
    if max(octets) > 255 or octets[0] in (0, 127, 255):
        return False
    before = match.string[max(0, match.start() - 30) : match.start()]
    if _VERSION_BEFORE.search(before):
        return False
    upgrade = _TO_BEFORE.search(before) or match.string.startswith(" to ", match.end())
    return max(octets) >= 100 or (_ADDRESS_BEFORE.search(before) is not None and not upgrade)


def _is_national_id(match: re.Match[str]) -> bool:
    written = match[0]
    if len(written) == 18:
        return _is_resident(written)
    if len(written) == 14:
        return _is_cpf([int(digit) for digit in written if digit.isdigit()])
    area, group, serial = written.split("-")
    return area not in ("000", "666") and group != "00" and serial != "0000"  # never given (SSA); 9xx are taxpayer numbers


def _is_cpf(digits: list[int]) -> bool:
    """Return whether both check digits of a Brazilian CPF are right (modulo 11; one digit eleven times is none)."""
    sums = (sum(digit * (length + 1 - place) for place, digit in enumerate(digits[:length])) for length in (9, 10))
    return len(set(digits)) > 1 and [total * 10 % 11 % 10 for total in sums] == digits[9:]


def _is_resident(written: str) -> bool:
    """Return whether a Chinese number has a date of birth and its check digit (GB 11643-1999, ISO 7064 MOD 11-2)."""
    year, month, day = int(written[6:10]), int(written[10:12]), int(written[12:14])
    total = sum(int(digit) * 2 ** (17 - place) for place, digit in enumerate(written[:17]))
    dated = 1900 <= year < 2100 and 1 <= month <= 12 and 1 <= day <= 31
    return dated and "10X98765432"[total % 11] == written[17]


_IS_PERSONAL = {"card": _is_card, "phone": _is_phone, "ip": _is_address, "national_id": _is_national_id}

_IPV6 = re.compile(r"[23fF](?<![\w:.].)[0-9a-fA-F]{3}:[0-9a-fA-F:]{2,35}(?![\w:])", re.ASCII)
_POINTS_AT_SOMEBODY = tuple(map(IPv6Network, ("2000::/3", "fc00::/7", "fe80::/10")))
"""Global, private and link-local addresses (RFC 4291, RFC 4193)."""


def _ipv6(text: str) -> Iterator[Found]:
    for match in _IPV6.finditer(text):
        try:
            address = IPv6Address(match[0])
        except ValueError:
            continue
        if any(address in network for network in _POINTS_AT_SOMEBODY):
            yield Found(match.start(), match.end(), "ip", address.compressed)
