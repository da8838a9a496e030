"""instruction_following: for each of IFEval's 25 types what follows it, what does not, and what only looks as if."""

import time

import pytest

pytest.importorskip("langdetect", reason="instruction_following needs langdetect")

from rewards import RewardInput, Status, build_rewards
from rewards.instruction_checks import CHECKS, count_sentences, language_of
from rewards.instructions import follows, variants

LESS, MORE = "less than", "at least"
BLOCK = '```json\n{"a": 1}\n```'
# id, arguments, (follow, do not follow, look as if they did), each a list of texts
CASES = [
    ("keywords:existence", {"keywords": ["c++", "Rust"]}, ["rust and C++"], ["rust and c"], ["rust and cpp"]),
    ("keywords:frequency", {"keyword": "a.b", "frequency": 2, "relation": MORE}, ["a.b A.B"], ["a.b"], ["a.b axb"]),
    ("keywords:frequency", {"keyword": "war", "frequency": 2, "relation": LESS}, ["war", "peace"], ["war war"], [" "]),
    ("keywords:forbidden_words", {"forbidden_words": ["gene"]}, ["Genes"], ["A Gene."], ["gene-free"]),
    ("keywords:letter_frequency", {"letter": "T", "let_frequency": 3, "let_relation": MORE}, ["tTt"], ["tt"], ["TT 7"]),
    (
        "keywords:letter_frequency",
        {"letter": "#", "let_frequency": 2, "let_relation": MORE},
        ["#a #b"],
        ["#a"],
        ["hash"],
    ),
    (
        "language:response_language",
        {"language": "de"},
        ["Der Hund läuft durch den Park, und alle sehen zu."],
        ["The dog runs through the park and everybody watches."],
        ["!!! 123 ???"],
    ),
    ("language:response_language", {"language": "zh"}, ["今天我们去公园散步。"], ["今日は公園を散歩します。"], ["123"]),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 3, "relation": MORE},
        ["One. Two! Three?", "one. two. three"],
        ["One. Two."],
        [
            "Dr. Smith of the U.S. paid 3.50. Fine.",
            "1. One item\n2. Two items",
            "Yes! ... !!! ??",
            "Well... then... no.",
        ],
    ),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 2, "relation": LESS},
        ["Mr. J. Doe came, e.g. by car."],
        ["He came. She left."],
        ["one. two"],
    ),
    (
        "length_constraints:number_paragraphs",
        {"num_paragraphs": 2},
        ["a\n***\nb", "***\na\n***\nb\n***"],
        ["a", "a\n***\nb\n***\nc"],
        ["a\n***\n***\nb", "a\n\nb"],
    ),
    ("length_constraints:number_words", {"num_words": 3, "relation": MORE}, ["a b c"], ["a b"], ["a - - b ..."]),
    ("length_constraints:number_words", {"num_words": 3, "relation": LESS}, ["में शाम"], ["a b c"], ["don't stop"]),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 3, "nth_paragraph": 2, "first_word": "President"},
        ["a\n\n'president', b\n\nc", "a\n\n\n\nPresident b\n\nc"],
        ["a\n\nthe president\n\nc", "a\n\npresident"],
        ["a\n\nPresidents\n\nc", "a\npresident\nc", "a\n\npresident\n\n \n\n"],
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, ["[a] [b c]"], ["[a]"], ["[] [ ]", "[a] ]["]),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, ["a\np. s. b"], ["a"], ["a\nP.S.", "help.s. me"]),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, ["a P.P.S. b"], ["a P.S. b"], ["P.P.S."]),
    (
        "detectable_format:number_bullet_lists",
        {"num_bullets": 2},
        ["* a\n- b", "list:\n  *a\n  -b"],
        ["* a", "* a\n* b\n* c"],
        ["*\n-", "a * b - c", "---\na\n***", "+ a\n+ b", "**a**\n**b**"],
    ),
    (
        "detectable_format:constrained_response",
        {},
        ["My answer is no.", "Hm. My answer is maybe. It depends."],
        ["No."],
        ["My answer is yes. My answer is no. My answer is maybe.", "my answer is no"],
    ),
    (
        "detectable_format:number_highlighted_sections",
        {"num_highlights": 2},
        ["*a* and **b c**", "* one *a* two *b*"],
        ["*a*"],
        ["** ** * *", "*a\n*b", "2 * 3 * 4 * 5", "* a\n* b\n* c"],
    ),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "SECTION", "num_sections": 2},
        ["SECTION 1\na\nSECTION 2\nb"],
        ["SECTION 1\na", "Section 1 a Section 2 b"],
        ["SECTION 1 SECTION 2", "SECTION 1 a SECTION 1 b", "SECTION X a SECTION Y b", "SUBSECTION 1 a SUBSECTION 2 b"],
    ),
    (
        "detectable_format:json_format",
        {},
        ['{"a": [1]}', "[]", BLOCK],
        ["{'a': 1}", "text", '{"a": 1'],
        ["42", '"text"', "null", '{"a": NaN}', "Here: " + BLOCK, "[" * 10**5],
    ),
    ("detectable_format:title", {}, ["<<a b>>\ntext", "text <<a>>"], ["<a>", "title"], ["<< >>", "<<>>", "<<a\nb>>"]),
    (
        "combination:two_responses",
        {},
        ["a\n******\nb", "******\na\n******\nb\n******"],
        ["a", "a\n******\nb\n******\nc"],
        ["a\n******\na ", "a\n***\nb", "a\n******\n******\nb", "a\n******"],
    ),
    (
        "combination:repeat_prompt",
        {"prompt_to_repeat": "Say hi."},
        ["Say hi. Hi!", "say HI.\nhi"],
        ["Hi!", "Sure! Say hi. Hi!"],
        ["Say hi.", "Say hi. ..."],
    ),
    ("startend:end_checker", {"end_phrase": "The end."}, ["a the END.", '"a The end."'], ["a"], ["The end. Bye"]),
    ("startend:quotation", {}, ['"a"', ' "a "b" c" '], ["a", '"a" b'], ['"', '""', '" "', '"""', "'a'"]),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 3, "capital_relation": MORE},
        ["A COVID-19 U.S. b", "I AM HERE"],
        ["ONE two THREE"],
        ["OnE TwO ThReE", "1 2 3", "U.S. and U.K.-based"],
    ),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 1, "capital_relation": LESS},
        ["none here"],
        ["ONE"],
        ["a I b"],
    ),
    (
        "change_case:english_capital",
        {},
        ["THIS TEXT IS WRITTEN IN ENGLISH AND LOUD."],
        ["This text is written in english."],
        ["DIESER TEXT IST AUF DEUTSCH GESCHRIEBEN UND LAUT.", "123!", "一二三"],
    ),
    (
        "change_case:english_lowercase",
        {},
        ["this text is written in english and quiet."],
        ["This text is written in english."],
        ["dieser text ist auf deutsch geschrieben und leise.", "123!", "一二三"],
    ),
    ("punctuation:no_comma", {}, ["a; b"], ["a, b"], ["a\uff0c b", "甲、乙", "1,000"]),
]


def row(*instructions):
    ids, kwargs = zip(*instructions)
    return {"instruction_id_list": list(ids), "kwargs": list(kwargs)}


def score(text, fields, **options):
    return build_rewards({"instruction_following": options}).score([RewardInput("q", text, fields)])[0]


@pytest.mark.parametrize(("name", "arguments", "yes", "no", "traps"), CASES)
def test_each_type(name, arguments, yes, no, traps):
    def check(text):
        return follows((name, arguments), text)

    assert [text for text in yes if not check(text)] == []
    assert [text for text in [*no, *traps] if check(text)] == []
    assert not check("") and not check(" \n ")


def test_the_table_has_every_type():
    assert {case[0] for case in CASES} == set(CHECKS) and len(CHECKS) == 25


def test_all_or_a_share():
    three = row(
        ("punctuation:no_comma", {}),
        ("keywords:existence", {"keywords": ["tea"], "num_words": None, "relation": None}),  # as Parquet has it
        ("length_constraints:number_words", {"num_words": 3.0, "relation": LESS}),
    )
    assert score("Green tea", three).value == 1.0
    assert score("Green tea, please do", three).value == 0.0
    partly = score("Green tea, please do", three, partial=True)
    assert partly.value == pytest.approx(1 / 3)
    assert partly.info["instruction_following"]["followed"] == [False, True, False]
    assert score("", three, partial=True).value == 0.0


def test_loose_takes_any_of_eight_variants():
    assert variants("*a*\nb\nc") == ["*a*\nb\nc", "b\nc", "*a*\nb", "b", "a\nb\nc", "b\nc", "a\nb", "b"]
    ends, quoted = row(("startend:end_checker", {"end_phrase": "Bye."})), row(("startend:quotation", {}))
    both = row(("startend:quotation", {}), ("startend:end_checker", {"end_phrase": "Bye."}))
    for text, fields in (("**Bye.**", ends), ("Bye.\nAnything else", ends), ('Sure:\n"a"\nDone', quoted)):
        assert (score(text, fields).value, score(text, fields, mode="loose").value) == (0.0, 1.0)
    assert score('"a"\nBye.', both, mode="loose").value == 1.0  # each by a variant of its own
    assert score("one line, a comma", row(("punctuation:no_comma", {})), mode="loose").value == 0.0  # cut to nothing


def test_thoughts_do_not_count():
    fields = row(("punctuation:no_comma", {}))
    assert score("<think>a, b</think> c", fields).value == 1.0
    assert score("a, b</think> c", fields).value == 1.0
    assert score("<think>c</think> a, b", fields).value == 0.0
    assert score("<think>still at it", fields).value == 0.0
    assert score("<think>c</think>", fields).value == 0.0


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (row(("keywords:exists", {})), ["keywords:exists", "keywords:existence"]),
        (row(("keywords:existence", {})), ["keywords:existence", "'keywords'"]),
        (row(("keywords:existence", {"keywords": None})), ["keywords:existence", "'keywords'"]),
        (row(("keywords:existence", {"keywords": [""]})), ["keywords:existence", "text in a list"]),
        (
            row(("length_constraints:number_words", {"num_words": 3, "relation": "more than"})),
            ["more than", "at least"],
        ),
        (row(("length_constraints:number_words", {"num_words": 2.5, "relation": MORE})), ["num_words", "2.5"]),
        (row(("length_constraints:number_words", {"num_words": float("nan"), "relation": MORE})), ["'num_words'"]),
        (row(("keywords:letter_frequency", {"letter": "ab", "let_frequency": 1, "let_relation": MORE})), ["'ab'"]),
        ({"instruction_id_list": ["punctuation:no_comma"], "kwargs": []}, ["equal length"]),
        ({"instruction_id_list": [], "kwargs": []}, ["empty"]),
        ({"instruction_id_list": "punctuation:no_comma", "kwargs": [{}]}, ["lists"]),
    ],
)
def test_bad_rows_are_found_before_the_run_and_never_score_0(fields, words):
    with pytest.raises(ValueError) as caught:
        build_rewards({"instruction_following": 1.0}).check(fields)
    message = str(caught.value)
    assert all(word in message for word in ["rewards.instruction_following", *words]) and "\n" not in message
    found = score("text", fields)
    assert (found.value, found.status) == (None, Status.ERROR)


@pytest.mark.parametrize(("options", "word"), [({"mode": "lax"}, "mode"), ({"partial": 1}, "partial")])
def test_bad_options(options, word):
    with pytest.raises(ValueError, match=rf"rewards\.instruction_following\.{word}"):
        build_rewards({"instruction_following": options})


def test_language_is_the_same_whatever_was_asked_before():
    texts = ["ok then", "la casa", "Haus am See", "hello there"]
    first = [language_of(text) for text in texts]
    assert [language_of(text) for text in reversed(texts * 3)] == [*reversed(first * 3)]
    assert language_of("HELLO THERE") == language_of("hello there") == "en"


def test_sentences_in_numbers():
    assert count_sentences('He said "Stop!" Then he left. (It was 3.14 p.m. or so.) What?! 你好。再见。') == 6
    assert count_sentences("no full stop") == 1
    assert count_sentences("- - -") == 0


@pytest.mark.parametrize(
    "unit", ["<<", "[", "*", "**a", "* ", "SECTION 1 ", "P.S. ", '{"a":', "a.b.", "- ", "```", "a, "]
)
def test_a_hostile_text_takes_no_time(unit):
    text = unit * (300_000 // len(unit))
    start = time.perf_counter()
    for name, arguments, *_ in CASES:
        follows((name, arguments), text)
    assert time.perf_counter() - start < 4.0
