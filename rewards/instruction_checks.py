"""The 25 instruction types of IFEval (arXiv 2311.07911, table 4): does a text follow one?

Each check is a function of the text and of the arguments that IFEval publishes for its type, under their published
names; the text is never blank. Where the published checkers pay for nothing (three options listed at once, empty
brackets, a text whose language cannot be told), these do not; docs/rewards.md lists the differences. Keywords are
text, not regular expressions. Every check takes linear time.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

RELATIONS = ("less than", "at least")
OPTIONS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
_TERMINATOR = re.compile(r"(?:[.!?…]+[\"'\u201d\u2019)\]*_]*(?=\s|$)|[。\uff01\uff1f]+)")
_ABBREVIATION = re.compile(
    r"(?:^|[\s(\"'\u201c\u2018\[])(?:mr|mrs|ms|dr|prof|st|sr|jr|vs|no|fig|approx|dept|inc|ltd|co|corp|gen|col|rev|hon|cf|al|"
    r"mt|jan|feb|mar|apr|aug|sept?|oct|nov|dec|[a-z](?:\.[a-z])*)$",
    re.IGNORECASE,
)
_LIST_NUMBER = re.compile(r"(?:^|\n)[ \t>*#-]*\d{1,3}$")
_COMMAS = re.compile("[,\uff0c﹐،、]")


def compare(count: float, relation: str, threshold: float) -> bool:
    """`less than`: count < threshold; `at least`: count >= threshold."""
    return count < threshold if relation == "less than" else count >= threshold


def language_of(text: str) -> str | None:
    """ISO 639-1 code of the language (zh for both scripts), or None where there is nothing to tell it by.

    langdetect with a seed and profiles of our own: equal texts get equal answers, whatever else uses the library. Case
    is removed first, because its profiles are of ordinary prose.
    """
    from langdetect.lang_detect_exception import LangDetectException

    detector = _detectors().create()
    detector.append(text.lower())
    try:
        found = detector.detect()
    except LangDetectException:
        return None
    return None if found == "unknown" else found.partition("-")[0]


@lru_cache(maxsize=1)
def _detectors() -> Any:
    from langdetect.detector_factory import PROFILES_DIRECTORY, DetectorFactory

    factory = DetectorFactory()
    factory.load_profile(PROFILES_DIRECTORY)
    factory.seed = 0  # pyright: ignore[reportAttributeAccessIssue]  (None in the class)
    return factory


def count_sentences(text: str) -> int:
    """Sentences that have a word. A full stop of an abbreviation, an initial, a number or a list item ends none."""
    count, start = 0, 0
    for match in _TERMINATOR.finditer(text):
        before = text[max(start, match.start() - 12) : match.start()]
        after = text[match.end() : match.end() + 40].lstrip()
        if match.group() == "." and ((_ABBREVIATION.search(before) and after) or _LIST_NUMBER.search(before)):
            continue
        if match.group()[0] in ".…" and len(match.group()) > 1 and after[:1].islower():
            continue
        count += bool(re.search(r"\w", text[start : match.end()]))
        start = match.end()
    return count + bool(re.search(r"\w", text[start:]))


def words(text: str) -> list[str]:
    """Runs of letters, digits and underscores, as in IFEval: `don't` has two. Vowel signs (Hindi) do not end a word."""
    if not text.isascii():
        text = "".join(character for character in text if unicodedata.category(character)[0] != "M")
    return re.findall(r"\w+", text)


# ---- keywords ----


def existence(text: str, keywords: Sequence[str]) -> bool:
    return all(keyword.strip().lower() in text.lower() for keyword in keywords)


def frequency(text: str, keyword: str, frequency: int, relation: str) -> bool:
    return compare(text.lower().count(keyword.strip().lower()), relation, frequency)


def forbidden_words(text: str, forbidden_words: Sequence[str]) -> bool:
    """None occurs as a whole word: `gene` is not in `generative`."""
    return not any(re.search(rf"(?<!\w){re.escape(word.strip())}(?!\w)", text, re.I) for word in forbidden_words)


def letter_frequency(text: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    return compare(text.lower().count(letter.lower()), let_relation, let_frequency)


# ---- language, length ----


def response_language(text: str, language: str) -> bool:
    return language_of(text) == language.lower().partition("-")[0]


def number_sentences(text: str, num_sentences: int, relation: str) -> bool:
    return compare(count_sentences(text), relation, num_sentences)


def number_paragraphs(text: str, num_paragraphs: int) -> bool:
    """Exactly so many, with *** between them; a divider may also open and close the text."""
    parts = [part.strip() for part in text.split("***")]
    inner = parts[bool(not parts[0]) : len(parts) - bool(not parts[-1])]
    return len(inner) == num_paragraphs and all(inner)


def number_words(text: str, num_words: int, relation: str) -> bool:
    return compare(len(words(text)), relation, num_words)


def nth_paragraph_first_word(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """Paragraphs stand between blank lines; blank ones do not count. The word is compared without quotes and case."""
    paragraphs = [part for part in text.split("\n\n") if part.strip()]
    if len(paragraphs) != num_paragraphs or not 1 <= nth_paragraph <= num_paragraphs:
        return False
    word = re.match(r"\s*[\"'\u201c\u2018]*([^\s.,?!'\"\u2019\u201d]*)", paragraphs[nth_paragraph - 1])
    return word is not None and word[1].lower() == first_word.strip().lower()


# ---- detectable content and format ----


def number_placeholders(text: str, num_placeholders: int) -> bool:
    """At least so many [placeholders]; an empty pair of brackets is none."""
    return len(re.findall(r"\[\s*[^\[\]\s][^\[\]\n]*\]", text)) >= num_placeholders


def postscript(text: str, postscript_marker: str) -> bool:
    """The marker, whatever its case and the blanks after its dots, and then some text."""
    marker = re.escape(postscript_marker.strip()).replace(r"\.", r"\.[ \t]?")
    return bool(re.search(rf"(?<!\w){marker}\W*\w", text, re.IGNORECASE))


def number_bullet_lists(text: str, num_bullets: int) -> bool:
    """Exactly so many lines that start with * or -; a rule such as *** or --- and a bullet without text are none."""
    return len(re.findall(r"^[ \t]*(?:\*(?!\*)|-(?!--)).*\w.*$", text, re.MULTILINE)) == num_bullets


def constrained_response(text: str) -> bool:
    """Exactly one of the three answers is in it: all of them at once is no answer."""
    return sum(option in text for option in OPTIONS) == 1


def number_highlighted_sections(text: str, num_highlights: int) -> bool:
    """At least so many *sections* or **sections** on one line; the star of a bullet, before a blank, opens none."""
    spans = re.findall(r"(?<!\*)(\*{1,3})(?![\s*])[^*\n]*(?<!\s)\1(?!\*)", text)
    return len(spans) >= num_highlights


def multiple_sections(text: str, section_spliter: str, num_sections: int) -> bool:
    """At least so many sections with text, each headed by the splitter and a number of its own."""
    pieces = re.split(rf"(?<!\w){re.escape(section_spliter.strip())}\s?(\d+)", text)
    with_text = {number for number, body in zip(pieces[1::2], pieces[2::2]) if re.search(r"\w", body)}
    return len(with_text) >= num_sections


def json_format(text: str) -> bool:
    """All of it is a JSON object or array, perhaps in a ``` block. A bare number or string wraps nothing."""

    def no_constant(name: str) -> Any:
        raise ValueError(f"{name} is not JSON")

    fenced = re.fullmatch(r"```(?:json)?(.*)```", text.strip(), re.DOTALL | re.IGNORECASE)
    try:
        value = json.loads(fenced[1] if fenced else text, parse_constant=no_constant, parse_int=str)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict | list)


def title(text: str) -> bool:
    """A <<title>> that is not blank and stands on one line."""
    return any(line.partition("<<")[2].rpartition(">>")[0].strip("<> \t") for line in text.splitlines() if "<<" in line)


# ---- combination, start and end, case, punctuation ----


def two_responses(text: str) -> bool:
    """Two different ones with ****** between them; the divider may also open and close the text."""
    parts = [part.strip() for part in text.split("******")]
    inner = parts[bool(not parts[0]) : len(parts) - bool(not parts[-1])]
    return len(inner) == 2 and all(inner) and inner[0] != inner[1]


def repeat_prompt(text: str, prompt_to_repeat: str) -> bool:
    """It starts with the request, whatever the case, and an answer follows."""
    request, text = prompt_to_repeat.strip().lower(), text.strip().lower()
    return text.startswith(request) and bool(re.search(r"\w", text[len(request) :]))


def end_checker(text: str, end_phrase: str) -> bool:
    return text.strip().strip('"').strip().lower().endswith(end_phrase.strip().strip('"').lower())


def capital_word_frequency(text: str, capital_frequency: int, capital_relation: str) -> bool:
    """Words without a lower-case letter; `COVID-19`, `U.S.` and `I` are one each."""
    found = re.findall(r"\w+(?:[-.'\u2019/&]\w+)*", text)
    return compare(sum(word.isupper() for word in found), capital_relation, capital_frequency)


def english_capital(text: str) -> bool:
    return text.isupper() and language_of(text) == "en"


def english_lowercase(text: str) -> bool:
    return text.islower() and language_of(text) == "en"


def no_comma(text: str) -> bool:
    """No comma of any script."""
    return not _COMMAS.search(text)


def quotation(text: str) -> bool:
    """The whole text, not blank, between two double quotation marks."""
    text = text.strip()
    return len(text) > 2 and text[0] == text[-1] == '"' and bool(text.strip('" \n\t'))


CHECKS: Mapping[str, Callable[..., bool]] = {
    "keywords:existence": existence,
    "keywords:frequency": frequency,
    "keywords:forbidden_words": forbidden_words,
    "keywords:letter_frequency": letter_frequency,
    "language:response_language": response_language,
    "length_constraints:number_sentences": number_sentences,
    "length_constraints:number_paragraphs": number_paragraphs,
    "length_constraints:number_words": number_words,
    "length_constraints:nth_paragraph_first_word": nth_paragraph_first_word,
    "detectable_content:number_placeholders": number_placeholders,
    "detectable_content:postscript": postscript,
    "detectable_format:number_bullet_lists": number_bullet_lists,
    "detectable_format:constrained_response": constrained_response,
    "detectable_format:number_highlighted_sections": number_highlighted_sections,
    "detectable_format:multiple_sections": multiple_sections,
    "detectable_format:json_format": json_format,
    "detectable_format:title": title,
    "combination:two_responses": two_responses,
    "combination:repeat_prompt": repeat_prompt,
    "startend:end_checker": end_checker,
    "startend:quotation": quotation,
    "change_case:capital_word_frequency": capital_word_frequency,
    "change_case:english_capital": english_capital,
    "change_case:english_lowercase": english_lowercase,
    "punctuation:no_comma": no_comma,
}
