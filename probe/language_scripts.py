"""Which scripts a language is written in, by its code (`de`, `deu_Latn`, `pt-BR`, `zh-Hant`)."""

from __future__ import annotations

import re
from typing import Final

_HAN = "HAN BOPOMOFO"

#: Scripts by language, as `moescope.probe.plain_text.script_of` names them.
_BY_LANGUAGE: Final[dict[str, str]] = {
    **dict.fromkeys(
        [
            *("cs", "da", "de", "en", "es", "et", "fi", "fr", "hr", "hu", "id", "it", "lt", "lv"),
            *("ms", "nb", "nl", "no", "pl", "pt", "ro", "sk", "sl", "sv", "sw", "tl", "tr", "vi"),
        ],
        "LATIN",
    ),
    **dict.fromkeys(["be", "bg", "mk", "ru", "uk"], "CYRILLIC"),
    **dict.fromkeys(["kk", "sr", "uz"], "CYRILLIC LATIN"),
    **dict.fromkeys(["ar", "fa", "ur"], "ARABIC"),
    **dict.fromkeys(["hi", "mr", "ne"], "DEVANAGARI"),
    "am": "ETHIOPIC",
    "bn": "BENGALI",
    "el": "GREEK",
    "he": "HEBREW",
    "hy": "ARMENIAN",
    "ja": "HAN KANA",
    "ka": "GEORGIAN",
    "ko": "HANGUL HAN",
    "ta": "TAMIL",
    "te": "TELUGU",
    "th": "THAI",
    "zh": _HAN,
}

#: Scripts by the script part of a code (ISO 15924), which overrules the language.
_BY_TAG: Final[dict[str, str]] = {
    "arab": "ARABIC",
    "armn": "ARMENIAN",
    "beng": "BENGALI",
    "cyrl": "CYRILLIC",
    "deva": "DEVANAGARI",
    "ethi": "ETHIOPIC",
    "geor": "GEORGIAN",
    "grek": "GREEK",
    "hang": "HANGUL HAN",
    "hans": _HAN,
    "hant": _HAN,
    "hebr": "HEBREW",
    "jpan": "HAN KANA",
    "kore": "HANGUL HAN",
    "latn": "LATIN",
    "taml": "TAMIL",
    "telu": "TELUGU",
    "thai": "THAI",
}

#: Three-letter codes (ISO 639-2 and 639-3) of the languages above.
_SHORT: Final[dict[str, str]] = {
    "amh": "am", "ara": "ar", "arb": "ar", "bel": "be", "ben": "bn", "bul": "bg", "ces": "cs",
    "chi": "zh", "cmn": "zh", "cze": "cs", "dan": "da", "deu": "de", "dut": "nl", "ell": "el",
    "eng": "en", "est": "et", "fas": "fa", "fin": "fi", "fra": "fr", "fre": "fr", "ger": "de",
    "gre": "el", "heb": "he", "hin": "hi", "hrv": "hr", "hun": "hu", "hye": "hy", "ind": "id",
    "ita": "it", "jpn": "ja", "kat": "ka", "kaz": "kk", "kor": "ko", "lit": "lt", "lvs": "lv",
    "mar": "mr", "mkd": "mk", "msa": "ms", "nld": "nl", "nob": "nb", "npi": "ne", "per": "fa",
    "pes": "fa", "pol": "pl", "por": "pt", "ron": "ro", "rus": "ru", "slk": "sk", "slv": "sl",
    "spa": "es", "srp": "sr", "swe": "sv", "swh": "sw", "tam": "ta", "tel": "te", "tha": "th",
    "tgl": "tl", "tur": "tr", "ukr": "uk", "urd": "ur", "uzn": "uz", "vie": "vi", "zho": "zh",
}  # fmt: skip


def scripts_of_language(lang: str) -> frozenset[str]:
    """The scripts of a language, as Unicode names them; empty where the code is not known."""
    parts = re.split(r"[-_]", lang.strip().lower())
    for part in parts[1:]:
        if part in _BY_TAG:
            return frozenset(_BY_TAG[part].split())
    code = _SHORT.get(parts[0], parts[0])
    return frozenset(_BY_LANGUAGE.get(code, "").split())
