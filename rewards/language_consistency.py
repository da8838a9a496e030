"""The language_consistency reward: the share of a chain of thought that is in the prompt's language.

DeepSeek-R1 (arXiv 2501.12948) pays the share of words in the target language. Here scripts decide between Chinese,
Japanese, Korean, Russian and Latin letters, and words and trigrams (rewards/language_profiles.py) between the languages
written in Latin letters. Mathematics, code and numbers are in no language and do not count.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence

from rewards.language_profiles import evidence
from rewards.records import RewardInput, Status
from rewards.rule import Rule, Verdict, each, failure

LATIN = ("de", "en", "es", "fr")
LANGUAGES = ("de", "en", "es", "fr", "ja", "ko", "ru", "zh")
_LONGEST = 60_000  # characters that are read, half from the start and half from the end
_NO_LANGUAGE = re.compile(
    r"```[^`]*(?:```|$)|`[^`\n]*`"  # code
    r"|\$\$[^$]*\$\$|\$[^$\n]*\$|\\\((?:[^\\\n]|\\(?![()]))*\\\)|\\\[[^\[\]]*\\\]"  # formulas
    r"|\\[A-Za-z]+(?:\{[^{}\n]*\})*|<[^<>\n]{1,80}>|https?://\S+"
)
_SEGMENT = re.compile(r"[.!?;:\n\u2026\u3002\uff01\uff1a\uff1b\uff1f]+")
_LATIN_LETTER = r"A-Za-z\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f"
_WORDS = re.compile(r"[^\W\d_]{2}|[\u0400-\uffff]")  # a single letter says nothing
_TOKEN = re.compile(
    r"(?P<kana>[\u3040-\u30ff\u31f0-\u31ff\uff66-\uff9f])"
    r"|(?P<han>[\u3005\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff])"
    r"|(?P<hangul>[\u1100-\u11ff\u3130-\u318f\uac00-\ud7af]+)"
    r"|(?P<cyrillic>[\u0400-\u04ff]+)"
    rf"|(?P<latin>[{_LATIN_LETTER}]+(?:['\u2019][{_LATIN_LETTER}]+)*)"
    r"|(?P<greek>[\u0370-\u03ff\u1f00-\u1fff])"
    r"|(?P<other>[^\W\d_])"
)
_SYMBOLS = re.compile(
    "(?:arc)?(?:sin|cos|tan)h?|cot|sec|csc|log|l[ng]|exp|lim|max|min|sup|inf|mod|gcd|lcm|det|arg|deg|dim|ker|rank|tr"
    "|sgn|sqrt|frac|cdot|times|pi|mathrm|boxed|[ckmd]m|[km]g|ml|kwh|mph|kmh"
)
_CLEAR = 0.7  # by how much a segment's best Latin language must lead, in summed log-probability
_PER_WORD = 2  # Chinese or Japanese characters that count as one word


def language_consistency(*, language: str | None = None, min_words: int = 5) -> Rule:
    """The share of words, from 0 to 1, of the chain of thought that are in the prompt's language.

    The chain of thought is what stands before the last </think>, or without one the whole completion. Its language
    should be `language`, else that of the row's "language" column, else that of the prompt (the last user message).
    Known: de, en, es, fr, ja, ko, ru, zh; words in others count as foreign. Two Chinese or Japanese characters are a
    word. It does not apply where fewer than `min_words` words can be told, or the prompt's language cannot. ValueError:
    an unknown language, or min_words below 1.
    """
    if language is not None and language not in LANGUAGES:
        raise ValueError(f"rewards.language_consistency.language is {language!r}; known: {', '.join(LANGUAGES)}")
    if isinstance(min_words, bool) or not isinstance(min_words, int) or min_words < 1:
        raise ValueError(f"rewards.language_consistency.min_words is {min_words!r}; give a number of words, 1 or more")

    def score(sample: RewardInput) -> Verdict:
        wanted = language or sample.fields.get("language") or prompt_language(sample.prompt)
        if wanted is None:
            return failure(Status.NOT_APPLICABLE, "the prompt has too little text to tell its language")
        wanted = str(wanted).strip().lower()[:2]
        if wanted not in LANGUAGES:
            return failure(Status.NOT_APPLICABLE, f"the language {wanted!r} is not one of {', '.join(LANGUAGES)}")
        thoughts, closed, _ = sample.completion.rpartition("</think>")
        words = count_words(thoughts if closed else sample.completion, wanted)
        total = sum(words.values())
        if total < min_words:
            return failure(Status.NOT_APPLICABLE, f"only {total:g} words of the completion speak a language")
        return words[wanted] / total

    return Rule(each(score), bounds=(0.0, 1.0))


def prompt_language(prompt: str | Sequence[Mapping[str, str]]) -> str | None:
    """The language most of the prompt is in (of messages: the last by the user); None where too little can be told."""
    if not isinstance(prompt, str):
        users = [message["content"] for message in prompt if message.get("role") == "user"]
        prompt = str(users[-1]) if users else ""
    words = count_words(prompt)
    words.pop("", None)
    if not words:
        return None
    (best, count), *_ = words.most_common(1)
    return best if count >= 1 and best in LANGUAGES else None


def count_words(text: str, wanted: str | None = None) -> Counter[str]:
    """Language -> number of words in it; "" holds what is surely not in `wanted` but in no known language.

    Latin words whose language cannot be told are left out, unless `wanted` is written in another script.
    """
    if len(text) > _LONGEST:
        text = text[: _LONGEST // 2] + "\n" + text[-_LONGEST // 2 :]
    total = Counter[str]()
    unclear = 0
    for segment in _SEGMENT.split(_NO_LANGUAGE.sub(" ", text)):
        if not _WORDS.search(segment):
            continue
        kinds: list[str | None] = []
        latin = []
        for token in _TOKEN.finditer(segment):
            kinds.append(token.lastgroup)
            if token.lastgroup == "latin" and _speaks(token.group()):
                latin.append(token.group().lower().replace("\u2019", "'"))
        kana, han = kinds.count("kana"), kinds.count("han")
        total["ja" if kana > 0.1 * han else "zh"] += (kana + han) / _PER_WORD  # type: ignore[assignment]
        total["ko"] += kinds.count("hangul")
        total["ru"] += kinds.count("cyrillic")
        total[""] += kinds.count("other")
        best = _latin_language(latin)
        total[best] += len(latin) if best else 0
        unclear += 0 if best else len(latin)
    if wanted is not None and wanted not in LATIN:
        total[""] += unclear
    return +total


def _speaks(word: str) -> bool:
    """Not a variable, an abbreviation or a unit."""
    return len(word) > 1 and not word.isupper() and not _SYMBOLS.fullmatch(word.lower())


def _latin_language(words: Sequence[str]) -> str:
    """The language of a segment's words; "" where it cannot be told."""
    if not words:
        return ""
    speak = [evidence(word) for word in words]
    sums = sorted((sum(word[language] for word in speak), language) for language in LATIN)
    return sums[-1][1] if sums[-1][0] - sums[-2][0] >= _CLEAR else ""
