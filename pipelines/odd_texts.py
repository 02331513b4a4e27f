"""Odd texts: what tokenizers stumble over, in seeded combinations, to compare two of them."""

from __future__ import annotations

import random
from collections.abc import Sequence

PIECES = (
    *(
        " ",
        "  ",
        "\t",
        "\n",
        "\r\n",
        "\n\n\n",
        " \n ",
        "\x0b",
        "\x0c",
        "\x1c",
        "\x85",
        "\xa0",
        "\u1680",
        "\u180e",
        "\u2003",
        "\u2028",
        "\u2029",
    ),
    *("\u202f", "\u205f", "\u3000", "\u200b", "\u200d", "\u2060", "\ufeff", "\x00", "\x07", "\x1b[31m", "\x7f", "\xad"),
    *(
        "'s",
        "'S",
        "’s",
        "'ll",
        "'LL",
        " 're",
        "don't",
        "'ſ",
        "''",
        '"',
        "«",
        "…",
        "--",
        "_",
        "__x__",
        "#",
        "//",
        "/*",
        "\\n",
        "%20",
        "@",
        "&amp;",
    ),
    *("a", "A", "the", " of", "tion", "İ", "ß", "ﬁ", "ǅ", "ªº"),
    *("é", "e\u0301", "\u0301", "\u0308\u0323", "ñ", "ø", "Ω", "Ω", "µ", "μ"),
    *("0", "7", "42", "1234567", "3.14", "1e-9", "²", "½", "Ⅷ", "٣٤", "१२", "𝟘", "①", "0x1F", "1,000"),
    *(
        "漢字",
        "かな",
        "カナ",
        "ｶﾅ",
        "한국어",
        "\u1112\u1161\u11ab",
        "ไทย",
        "हिन्दी",
        "தமிழ்",
        "עברית",
        "العربية",
        "ﷺ",
        "ქართული",
        "አማርኛ",
        "𐍈",
        "𝔘",
    ),
    *("👩‍👩‍👧‍👦", "👍🏽", "🇨🇿", "🇨", "❤️", "☺"),
    *("\ue000", "\uf8ff", "\ufffd", "\ufffe", "\uffff", "\U000e0001", "\U0010ffff"),
    *(
        "def f(x):\n    return x",
        "{'a': [1]}",
        "</p>",
        "\\alpha_{i}",
        "<|",
        "|>",
        "<|end",
        "endoftext",
        "[MASK]",
        "<s>",
        "</s>",
        "<unk>",
        "▁",
        "Ġ",
        "Ċ",
        "##",
    ),
)
"""White space of every kind, control and format characters, contractions, cases, marks, numbers, scripts, emoji, code, markup."""
LONGEST = 24
"""Pieces of a text, but for one in fifty that repeats one piece."""


def odd_texts(tokens: Sequence[str] = (), *, count: int, seed: int = 0) -> list[str]:
    """Return `count` texts of `PIECES`, of `tokens` (those that a tokenizer adds) and of characters of all planes but surrogates."""
    generator = random.Random(seed)
    choices = [*PIECES, *(piece for token in tokens for piece in (token, f" {token}", token[:-1], token * 2))]
    return [_odd_text(generator, choices) for _ in range(count)]


def _odd_text(generator: random.Random, choices: Sequence[str]) -> str:
    if generator.random() < 0.02:
        return generator.choice(choices) * generator.randint(2, 400)
    alone = generator.random() < 0.1
    return "".join(
        _character(generator) if alone or generator.random() < 0.2 else generator.choice(choices) for _ in range(_length(generator))
    )


def _length(generator: random.Random) -> int:
    return generator.randint(0, LONGEST)


def _character(generator: random.Random) -> str:
    limit = generator.choice((0x80, 0x800, 0x3000, 0xD800, 0x20000, 0x110000))
    number = generator.randrange(limit)
    return chr(number if not 0xD800 <= number < 0xE000 else number - 0x800)
