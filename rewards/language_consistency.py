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
_LONGEST = 100_000  # characters that are read, half from the start and half from the end
_NO_LANGUAGE = re.compile(
    r"```[^`]*(?:```|$)|`[^`\n]*`"  # code
    r"|\$\$[^$]*\$\$|\$[^$\n]*\$|\\\((?:[^\\\n]|\\(?![()]))*\\\)|\\\[[^\[\]]*\\\]"  # formulas
    r"|\\[A-Za-z]+(?:\{[^{}\n]*\})*|<[^<>\n]{1,80}>|https?://\S+"
)
_SEGMENT = re.compile(r"[.!?;:\n。！？；：…]+")
_TOKEN = re.compile(
    r"(?P<kana>[぀-ヿㇰ-ㇿｦ-ﾟ])|(?P<han>[㐀-䶿一-鿿豈-﫿々])|(?P<hangul>[가-힯ᄀ-ᇿ㄰-㆏]+)"
    r"|(?P<cyrillic>[Ѐ-ӿ]+)|(?P<latin>[A-Za-zÀ-ÖØ-öø-ɏ]+(?:['’][A-Za-zÀ-ÖØ-öø-ɏ]+)*)"
    r"|(?P<greek>[Ͱ-Ͽἀ-῿])|(?P<other>[^\W\d_])"
)
_CLEAR = 0.7  # by how much a word's or a segment's best Latin language must lead, in summed log-probability
_PER_WORD = 2  # Chinese or Japanese characters that count as one word


def language_consistency(*, language: str | None = None, min_words: int = 5) -> Rule:
    """The share of words, from 0 to 1, of the chain of thought that are in the prompt's language.

    The chain of thought is what stands before the last </think>, or without one the whole completion. Its language
    should be `language`, else that of the row's "language" column, else that of the prompt (the last user message). Known:
    de, en, es, fr, ja, ko, ru, zh; words in others count as foreign. Two Chinese or Japanese characters are a word. It
    does not apply where fewer than `min_words` words can be told, or the prompt's language cannot. ValueError: an
    unknown language, or min_words below 1.
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
    return best if count >= 2 and best in LANGUAGES else None


def count_words(text: str, wanted: str | None = None) -> Counter[str]:
    """Language -> number of words in it; "" holds what is surely not in `wanted` but in no known language.

    Latin words whose language cannot be told are left out, unless `wanted` is written in another script.
    """
    if len(text) > _LONGEST:
        text = text[: _LONGEST // 2] + "\n" + text[-_LONGEST // 2 :]
    total = Counter[str]()
    latin_unclear = Counter[str]()
    for segment in _SEGMENT.split(_NO_LANGUAGE.sub(" ", text)):
        kinds = Counter[str]()
        latin = []
        for token in _TOKEN.finditer(segment):
            kinds[token.lastgroup or ""] += 1
            if token.lastgroup == "latin" and _speaks(token.group()):
                latin.append(token.group().lower().replace("’", "'"))
        east_asian = (kinds["kana"] + kinds["han"]) / _PER_WORD
        if east_asian:
            total["ja" if kinds["kana"] > 0.1 * kinds["han"] else "zh"] += east_asian  # type: ignore[assignment]
        total["ko"] += kinds["hangul"]
        total["ru"] += kinds["cyrillic"]
        total[""] += kinds["other"]
        best = _latin_language(latin)
        (total if best else latin_unclear)[best] += len(latin)
    if wanted is not None and wanted not in LATIN:
        total[""] += latin_unclear.total()
    return +total


def _speaks(word: str) -> bool:
    """Not a variable, an abbreviation or a unit."""
    return len(word) > 1 and not word.isupper()


def _latin_language(words: Sequence[str]) -> str:
    """The language of a segment's words; "" where it cannot be told."""
    sums = Counter[str]()
    for word in words:
        for language, value in evidence(word).items():
            sums[language] += value  # type: ignore[assignment]
    if not sums:
        return ""
    (best, first), (_, second) = sums.most_common(2)
    return best if first - second >= _CLEAR else ""
