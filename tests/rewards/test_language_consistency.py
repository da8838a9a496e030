"""language_consistency: eight languages told apart, mixtures measured, and what does not count or does not apply."""

import itertools

import pytest

from rewards import RewardInput, Status, build_rewards
from rewards.language_consistency import LANGUAGES, count_words, prompt_language

PROMPTS = {
    "en": "Natalia sold clips to 48 of her friends in April. How many did she sell altogether?",
    "fr": "Natalia a vendu des pinces à 48 de ses amis en avril. Combien en a-t-elle vendu en tout ?",
    "es": "Natalia vendió pinzas a 48 de sus amigos en abril. ¿Cuántas vendió en total?",
    "de": "Natalia verkaufte im April Klammern an 48 ihrer Freunde. Wie viele verkaufte sie insgesamt?",
    "zh": "娜塔莉亚四月份向她的48位朋友出售了发夹。她一共卖了多少个?",
    "ja": "ナタリアは4月に48人の友達にクリップを売りました。全部でいくつ売りましたか。",
    "ko": "나탈리아는 4월에 친구 48명에게 클립을 팔았습니다. 모두 몇 개를 팔았습니까?",
    "ru": "Наталья продала в апреле заколки 48 своим друзьям. Сколько всего она продала?",
}
THOUGHTS = {
    "en": "In May she sold half as many, so that is 24 clips. Adding both months gives the whole amount, which is 72.",
    "fr": "Au mois de mai, elle en a vendu la moitié, ce qui fait 24. En ajoutant les deux mois on arrive à 72 pinces.",
    "es": "En mayo vendió la mitad, es decir 24 pinzas. Si sumamos los dos meses llegamos a una cantidad de 72.",
    "de": "Im Mai waren es halb so viele, das macht 24 Stück. Zählt man beide Monate zusammen, kommt man auf 72.",
    "zh": "五月份她卖了一半,也就是24个。把两个月加起来,总数是72个。",
    "ja": "5月にはその半分を売ったので、24個です。二か月分を足すと、合計は72個になります。",
    "ko": "5월에는 그 절반을 팔았으므로 24개입니다. 두 달을 더하면 모두 72개가 됩니다.",
    "ru": "Затем на майские праздники она продала вдвое меньше, то есть 24 штуки. Получаем 72 заколки.",
}
MATHS = r"""$$\text{the sum of all the numbers} = 72$$, \(x = \frac{the}{number}\) 3 x + 4 y = 12 sin
```python
for number in the_list_of_numbers: print(number)
```"""


def score(completion, prompt="", options=None, **fields):
    [got] = build_rewards({"language_consistency": options or {}}).score([RewardInput(prompt, completion, fields)])
    return got


@pytest.mark.parametrize(("asked", "thought"), itertools.product(LANGUAGES, LANGUAGES))
def test_own_language_pays_one_and_others_zero(asked, thought):
    value = score(f"<think>{THOUGHTS[thought]}</think> 72", PROMPTS[asked]).value
    assert value == (1.0 if asked == thought else 0.0)


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_prompts_language_is_told(language):
    assert prompt_language(PROMPTS[language]) == language
    messages = [
        {"role": "system", "content": "You are a helpful assistant. Think about the problem first."},
        {"role": "user", "content": PROMPTS[language]},
    ]
    assert prompt_language(messages) == language


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("What is two plus two?", "en"),
        ("Find the value of x.", "en"),
        ("Combien font deux et deux ?", "fr"),
        ("Trouvez la valeur de x.", "fr"),
        ("¿Cuánto es dos más dos?", "es"),
        ("Halla el valor de x.", "es"),
        ("Wie viel ist zwei plus zwei?", "de"),
        ("Bestimme den Wert von x.", "de"),
        ("求x的值。", "zh"),
        ("xの値を求めなさい。", "ja"),
        ("x의 값을 구하시오.", "ko"),
        ("Найдите значение x.", "ru"),
        ("12 + 30 = ?", None),
        ("$x^2$", None),
        ("", None),
    ],
)
def test_short_prompts(text, language):
    assert prompt_language(text) == language


def test_mixtures_are_measured_in_words():
    mixed = f"<think>{THOUGHTS['zh']} Wait, that is not what they asked for at all.</think>"
    chinese = sum(count_words(THOUGHTS["zh"]).values())
    assert score(mixed, PROMPTS["zh"]).value == pytest.approx(chinese / (chinese + 10))
    half = "We add the two numbers to get the answer. Entonces sumamos los dos números para tener todo."
    assert score(half, PROMPTS["en"]).value == pytest.approx(9 / 17)


@pytest.mark.parametrize("language", LANGUAGES)
def test_mathematics_code_and_numbers_do_not_count(language):
    assert score(f"<think>{MATHS} {THOUGHTS[language]} {MATHS}</think> 72", PROMPTS[language]).value == 1.0


def test_only_the_thoughts_count():
    assert score(f"<think>{THOUGHTS['fr']}</think> {THOUGHTS['en']}", PROMPTS["fr"]).value == 1.0
    assert score(f"{THOUGHTS['fr']} {THOUGHTS['en']}", PROMPTS["fr"]).value < 0.6


def test_a_foreign_script_counts_as_foreign():
    assert score("Bonjour tout le monde. " + "مرحبا " * 5, PROMPTS["fr"]).value < 0.2


@pytest.mark.parametrize("text", ["", "<think></think>", "72", MATHS, "<think>Okay.</think>"])
def test_too_little_text_does_not_apply(text):
    assert score(text, PROMPTS["en"]).status is Status.NOT_APPLICABLE


def test_a_prompt_without_a_language_does_not_apply():
    assert score(THOUGHTS["en"], "12 + 30 = ?").status is Status.NOT_APPLICABLE


def test_option_and_column_override_the_prompt():
    assert score(THOUGHTS["de"], PROMPTS["en"], {"language": "de"}).value == 1.0
    assert score(THOUGHTS["de"], PROMPTS["en"], language="de").value == 1.0
    assert score(THOUGHTS["en"], PROMPTS["en"], language="de-CH").value == 0.0
    assert score(THOUGHTS["en"], PROMPTS["en"], language="sw").status is Status.NOT_APPLICABLE


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"language": "klingon"}, ["language_consistency.language", "'klingon'", "zh"]),
        ({"min_words": 0}, ["language_consistency.min_words", "0"]),
    ],
)
def test_bad_options_are_one_clear_line(options, words):
    with pytest.raises(ValueError) as caught:
        build_rewards({"language_consistency": options})
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)
