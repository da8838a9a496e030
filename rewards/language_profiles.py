"""What tells English, French, Spanish and German apart: their commonest words, and the trigrams of a little text.

The sentences are of the kind found in worked solutions and in plain prose; trigrams are counted from them and from the
words when first asked for.
"""

from __future__ import annotations

import math
from collections import Counter
from functools import lru_cache

COMMON_WORDS = {
    "en": """the of and to a in is it you that he was for on are with as i his they be at one have this from or had by
        but some what there we can out other were all your when up use word how said an each she which do their time if
        will way about many then them would write like so these her long make thing see him two has look more day could
        go come did my no most who over know than call first people may down been now find any new work part take get
        place made live where after back only round man year came show every good me give our under let need since
        therefore because should equal number answer wait okay total per how much many does not think let's i'll we're
        it's that's check left right both also same must hence thus next step given""",
    "fr": """de la le et les des en un du une que est pour qui dans a par plus pas au sur ne se ce il sont avec son aux
        d'un cette d'une ont ses mais comme on tout nous sa fait été aussi leur bien peut ces y deux très où sans donc
        elle être avoir je tu vous ils elles mon ton notre votre quel quelle combien quand parce alors ainsi puis
        encore entre même si car faut soit nombre réponse égal est-ce c'est qu'il n'est j'ai l'on il y chaque moins
        fois reste après avant calculer trouver donne obtient jour total peu trop toujours d'abord ensuite""",
    "es": """de la que el en y a los se del las un por con no una su para es al lo como más o pero sus le ha me si sin
        sobre este ya entre cuando todo esta ser son dos también fue había era muy años hasta desde está mi porque qué
        sólo han yo hay vez puede todos así nos ni parte tiene él uno donde bien tiempo mismo ese ahora cada vida otro
        después te otros aunque esa eso hace otra tan durante siempre día tanto ella tres sí dijo sido gran país según
        menos cuánto cuántos entonces luego número respuesta igual tenemos necesitamos debe primero total calcular
        queda quedan hallar problema""",
    "de": """der die und in den von zu das mit sich des auf für ist im dem nicht ein eine als auch es an werden aus er
        hat dass daß sie nach wird bei einer um am sind noch wie einem über einen so zum war haben nur oder aber vor
        zur bis mehr durch man sein wurde sei hatte kann gegen vom können schon wenn habe seine ihre dann unter wir soll
        ich eines es jahr zwei jahren diese dieser wieder keine seiner worden will zwischen immer was sagte gibt alle
        diesem muss wer uns da also weil wie viele viel zahl antwort gleich insgesamt jeder jede jedes zuerst nun
        daher damit bleibt bleiben ergibt berechnen müssen""",
}

SENTENCES = {
    "en": """Let us think about the problem step by step. First we need to find out how many apples there are in the
        basket, and then we subtract those which have been eaten. Since each of the children takes three of them, the
        total must be greater than twenty. Wait, that is not quite right, so I should check the calculation again. If we
        multiply both sides by the same number, the equation still holds, which means that our answer is correct. The
        weather was cold yesterday, although the sun had been shining throughout the morning. She wanted to know whether
        her brother would bring something with him when he came home from work.""",
    "fr": """Réfléchissons au problème étape par étape. D'abord, il faut trouver combien de pommes se trouvent dans le
        panier, puis nous soustrayons celles qui ont été mangées. Puisque chacun des enfants en prend trois, le total
        doit être supérieur à vingt. Attends, ce n'est pas tout à fait juste, je dois donc vérifier le calcul. Si l'on
        multiplie les deux membres par le même nombre, l'équation reste vraie, ce qui signifie que notre réponse est
        correcte. Il faisait froid hier, bien que le soleil ait brillé pendant toute la matinée. Elle voulait savoir si
        son frère apporterait quelque chose en rentrant du travail.""",
    "es": """Pensemos en el problema paso a paso. Primero tenemos que averiguar cuántas manzanas hay en la cesta y
        después restamos las que se han comido. Como cada uno de los niños toma tres, el total debe ser mayor que
        veinte. Espera, eso no es del todo correcto, así que debería comprobar el cálculo otra vez. Si multiplicamos los
        dos lados por el mismo número, la ecuación se mantiene, lo que significa que nuestra respuesta es correcta. Ayer
        hacía frío, aunque el sol había brillado durante toda la mañana. Ella quería saber si su hermano traería algo
        cuando volviera del trabajo.""",
    "de": """Denken wir Schritt für Schritt über die Aufgabe nach. Zuerst müssen wir herausfinden, wie viele Äpfel im
        Korb liegen, und dann ziehen wir diejenigen ab, die gegessen wurden. Da jedes der Kinder drei davon nimmt, muss
        die Summe größer als zwanzig sein. Moment, das stimmt nicht ganz, also sollte ich die Rechnung noch einmal
        prüfen. Wenn wir beide Seiten mit derselben Zahl multiplizieren, gilt die Gleichung weiterhin, was bedeutet,
        dass unsere Antwort richtig ist. Gestern war es kalt, obwohl die Sonne den ganzen Vormittag geschienen hatte.
        Sie wollte wissen, ob ihr Bruder etwas mitbringen würde, wenn er von der Arbeit nach Hause käme.""",
}


def trigrams(word: str) -> list[str]:
    """Three characters at a time of the word with a space on either side."""
    padded = f" {word} "
    return [padded[start : start + 3] for start in range(len(padded) - 2)]


@lru_cache(maxsize=1)
def _profiles() -> tuple[dict[str, frozenset[str]], dict[str, dict[str, float]], dict[str, float]]:
    """For each language: its common words, the log-probability of its trigrams, and that of one it does not have."""
    counts = {}
    for language, sentences in SENTENCES.items():
        words = [word.strip(".,") for word in sentences.lower().split()] + COMMON_WORDS[language].split()
        counts[language] = Counter(trigram for word in words for trigram in trigrams(word))
    kinds = len(set().union(*counts.values()))
    totals = {language: counted.total() + 0.2 * kinds for language, counted in counts.items()}
    seen = {
        language: {trigram: math.log((count + 0.2) / totals[language]) for trigram, count in counted.items()}
        for language, counted in counts.items()
    }
    unseen = {language: math.log(0.2 / total) for language, total in totals.items()}
    return {language: frozenset(words.split()) for language, words in COMMON_WORDS.items()}, seen, unseen


@lru_cache(maxsize=50_000)
def evidence(word: str) -> dict[str, float]:
    """Language -> how much a lower-case word speaks for it, as a log-probability; only differences mean something.

    A word that is common in a language counts for it beyond its trigrams.
    """
    common, seen, unseen = _profiles()
    pieces = trigrams(word)
    return {
        language: sum(seen[language].get(piece, unseen[language]) for piece in pieces) / 3
        + (2.0 if word in common[language] else 0.0)
        for language in SENTENCES
    }
