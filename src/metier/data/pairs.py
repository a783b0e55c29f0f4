"""Grammatical minimal pairs: two sentences that differ in one point, of which one is wrong.

A model that knows English gives the good one the higher probability (Marvin and Linzen 2018;
Warstadt et al. 2020). The sentences here are made from word lists of our own, in words common in
prose and textbooks since the 19th century, so that a small model knows them. Both sentences of a
pair have the same number of words, and wherever a contrast has two directions (was for were, were
for was) both occur, so that a mere liking for a word gains nothing.

Left out on purpose: anything that needs knowledge of the world, and islands, scope and ellipsis,
which small models do not have and so cannot forget.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from random import Random

from metier.data.files import read_rows
from metier.errors import DataError


@dataclass(frozen=True, slots=True)
class Pair:
    """Two sentences, of which `good` is grammatical and `bad` is not.

    Attributes:
        good: the grammatical sentence.
        bad: the other one.
        phenomenon: what they differ in; empty where it is not known.

    """

    good: str
    bad: str
    phenomenon: str = ""


def generate(seed: int = 0, per_phenomenon: int = 100) -> list[Pair]:
    """Pairs of every phenomenon, none twice.

    Args:
        seed: chooses the sentences; the same seed gives the same pairs.
        per_phenomenon: pairs of each of the `PHENOMENA`.

    Raises:
        ValueError: more pairs are asked for than there are different ones.

    """
    return [
        pair
        for name, make in PHENOMENA.items()
        for pair in _distinct(name, make, Random(f"{seed} {name}"), per_phenomenon)  # noqa: S311
    ]


def read(paths: Iterable[Path]) -> list[Pair]:
    """Pairs of a user's own, from rows with `good`, `bad` and, where there is one, `phenomenon`.

    Raises:
        DataError: a file cannot be read, or a row has not two different sentences.

    """
    return [_row(row.place, row.values) for path in paths for row in read_rows(path)]


def _row(place: str, values: dict[str, object]) -> Pair:
    good, bad, phenomenon = (values.get(name) for name in ("good", "bad", "phenomenon"))
    if not isinstance(good, str) or not isinstance(bad, str) or not good.strip() or not bad.strip():
        raise DataError(
            place,
            "has no sentence in 'good' or in 'bad'",
            'write rows as {"good": "The dogs bark.", "bad": "The dogs barks."}',
        )
    if good == bad:
        raise DataError(place, "'good' and 'bad' are the same sentence", "make them differ")
    return Pair(good, bad, phenomenon if isinstance(phenomenon, str) else "")


def _distinct(name: str, make: Maker, rng: Random, count: int) -> list[Pair]:
    found: dict[str, Pair] = {}
    for _ in range(50 * count):
        if len(found) == count:
            return list(found.values())
        good, bad = make(rng)
        found.setdefault(good, Pair(_sentence(good), _sentence(bad), name))
    raise ValueError(f"there are not {count:,} different pairs of the phenomenon {name}")


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + ("" if text.endswith("?") else ".")


Maker = Callable[[Random], tuple[str, str]]
"""Draws (good sentence, bad sentence)."""


def _regular(words: str) -> tuple[tuple[str, str], ...]:
    """Nouns as (singular, plural)."""
    return tuple((word, f"{word}s") for word in words.split())


_PEOPLE = (
    *_regular("farmer captain teacher doctor soldier sailor king servant stranger boy girl lawyer"),
    *_regular("student visitor prisoner driver painter singer writer traveler"),
    ("man", "men"),
    ("woman", "women"),
    ("child", "children"),
    ("lady", "ladies"),
)
_THINGS = (
    *_regular("house letter door book window picture chair table lamp road garden bridge ship"),
    *_regular("boat hat coat"),
    ("box", "boxes"),
    ("knife", "knives"),
)
_PLACES = (
    *_regular("house door window chair table lamp garden bridge boat tree wall gate tower"),
    ("box", "boxes"),
)
_MALE = (
    *_regular("boy king prince brother uncle son"),
    ("man", "men"),
    ("gentleman", "gentlemen"),
)
_FEMALE = (
    *_regular("girl queen sister aunt daughter"),
    ("woman", "women"),
    ("lady", "ladies"),
    ("princess", "princesses"),
)
_OF_PEOPLE = ("young", "old", "poor", "tall", "clever", "quiet", "tired", "famous")
_OF_THINGS = ("old", "large", "small", "new", "beautiful", "strange", "little", "fine")


def _subject_verb(rng: Random) -> tuple[str, str]:
    """The old farmer sleeps / *sleep in the next room."""
    noun, number = rng.choice(_PEOPLE), rng.randrange(2)
    verb, rest = rng.choice(_PRESENT)
    start = f"the {rng.choice(_OF_PEOPLE)} {noun[number]}"
    good, bad = verb[number], verb[1 - number]
    return f"{start} {good} {rest}", f"{start} {bad} {rest}"


_PRESENT = (
    (("lives", "live"), "near the river"),
    (("works", "work"), "in the garden"),
    (("sleeps", "sleep"), "in the next room"),
    (("speaks", "speak"), "to the children every day"),
    (("waits", "wait"), "at the gate"),
    (("walks", "walk"), "to the village every morning"),
    (("comes", "come"), "home in the evening"),
    (("sits", "sit"), "by the fire"),
    (("reads", "read"), "a letter after dinner"),
    (("knows", "know"), "the way to the town"),
    (("needs", "need"), "a little more time"),
    (("stands", "stand"), "before the house"),
)


def _across_phrase(rng: Random) -> tuple[str, str]:
    """The lamp near the windows is / *are very old."""
    number = rng.randrange(2)
    noun, other = rng.sample(_PLACES, 2)
    verb, rest = rng.choice(_OF_STATE)
    start = f"the {noun[number]} {rng.choice(('near', 'behind', 'beside'))} the {other[1 - number]}"
    good, bad = verb[number], verb[1 - number]
    return f"{start} {good} {rest}", f"{start} {bad} {rest}"


_OF_STATE = (
    (("is", "are"), "very old"),
    (("was", "were"), "quite dirty"),
    (("has", "have"), "been there for years"),
    (("looks", "look"), "new"),
    (("belongs", "belong"), "to my uncle"),
    (("seems", "seem"), "much too small"),
)


def _across_clause(rng: Random) -> tuple[str, str]:
    """The boy who followed the soldiers was / *were very tired."""
    number = rng.randrange(2)
    noun, other = rng.sample(_PEOPLE, 2)
    verb, rest = rng.choice(_OF_PERSON)
    clause = rng.choice(("met", "followed", "helped", "saw", "called", "thanked"))
    start = f"the {noun[number]} who {clause} the {other[1 - number]}"
    good, bad = verb[number], verb[1 - number]
    return f"{start} {good} {rest}", f"{start} {bad} {rest}"


_OF_PERSON = (
    (("was", "were"), "very tired"),
    (("is", "are"), "still here"),
    (("has", "have"), "gone home"),
    (("lives", "live"), "in this street"),
    (("speaks", "speak"), "very slowly"),
    (("knows", "know"), "the truth"),
    (("wants", "want"), "to leave the country"),
)


def _determiner(rng: Random) -> tuple[str, str]:
    """He sold these old chairs / *chair in the morning."""
    noun, number = rng.choice(_THINGS), rng.randrange(2)
    word = rng.choice((("this", "these"), ("that", "those")))[number]
    adjective = rng.choice(("", *(f"{quality} " for quality in _OF_THINGS)))
    verb = rng.choice(("bought", "sold", "lost", "kept", "wanted", "liked"))
    start = f"{rng.choice(_SUBJECTS)} {verb} {word} {adjective}"
    rest = rng.choice(("last year", "in the morning", "a long time ago", "before the war"))
    good, bad = noun[number], noun[1 - number]
    return f"{start}{good} {rest}", f"{start}{bad} {rest}"


_SUBJECTS = ("he", "she", "they", "we", "my father", "her mother", "the children")


def _reflexive_number(rng: Random) -> tuple[str, str]:
    """The kings blamed themselves / *himself for the accident."""
    number, (nouns, singular) = rng.randrange(2), rng.choice(_GENDERS)
    noun = rng.choice(nouns)[number]
    words = (singular, "themselves")
    return _reflexive(rng, noun, words[number], words[1 - number])


def _reflexive_gender(rng: Random) -> tuple[str, str]:
    """Our uncle saw himself / *herself in the mirror."""
    gender = rng.randrange(2)
    noun = rng.choice(_GENDERS[gender][0])[0]
    return _reflexive(rng, noun, _GENDERS[gender][1], _GENDERS[1 - gender][1])


_GENDERS = ((_MALE, "himself"), (_FEMALE, "herself"))


def _reflexive(rng: Random, noun: str, good: str, bad: str) -> tuple[str, str]:
    verb, rest = rng.choice(_TO_ONESELF)
    start = f"{rng.choice(('the', 'our'))} {noun} {verb}"
    return f"{start} {good} {rest}", f"{start} {bad} {rest}"


_TO_ONESELF = (
    ("blamed", "for the accident"),
    ("hurt", "with the knife"),
    ("saw", "in the mirror"),
    ("prepared", "for the journey"),
    ("hid", "behind the curtain"),
    ("warmed", "by the fire"),
    ("found", "in a dark wood"),
    ("threw", "on the bed"),
    ("taught", "to read"),
    ("made", "ready for dinner"),
)


def _participle(rng: Random) -> tuple[str, str]:
    """The boy has broken / *broke the window; the boy broke / *broken the window."""
    noun, perfect = rng.choice(_PEOPLE), rng.random() < 0.5
    past, participle, thing = rng.choice(_IRREGULAR)
    start = f"the {rng.choice(_OF_PEOPLE)} {noun[0] if perfect else rng.choice(noun)}"
    if perfect:
        start += rng.choice((" has", " had", " has already", " had never"))
    good, bad = (participle, past) if perfect else (past, participle)
    return f"{start} {good} {thing}", f"{start} {bad} {thing}"


_IRREGULAR = (
    ("broke", "broken", "the window"),
    ("wrote", "written", "a long letter"),
    ("took", "taken", "the money"),
    ("gave", "given", "him an answer"),
    ("chose", "chosen", "a new leader"),
    ("drove", "driven", "the horses home"),
    ("stole", "stolen", "a horse"),
    ("ate", "eaten", "all the bread"),
    ("knew", "known", "the answer"),
    ("saw", "seen", "the sea"),
    ("did", "done", "the work"),
    ("began", "begun", "the work"),
    ("forgot", "forgotten", "the way"),
    ("threw", "thrown", "the stone"),
    ("wore", "worn", "a black coat"),
    ("sang", "sung", "the song"),
)


def _polarity(rng: Random) -> tuple[str, str]:
    """Nobody / *Somebody in the village had ever seen the sea."""
    noun = rng.choice(_PEOPLE)
    place = rng.choice(("in the village", "in this house", "on the ship", "in the town"))
    good, bad = (f"{word} {place}" for word in ("nobody", "somebody"))
    group = rng.randrange(4)
    if group == 1:
        good, bad = (f"{word} of the {noun[1]}" for word in ("none", "some"))
    elif group == 2:
        good, bad = (f"{word} {noun[0]} {place}" for word in ("no", "some"))
    elif group == 3:
        good, bad = (f"{word} of the {noun[1]}" for word in ("neither", "both"))
    _, participle, thing = rng.choice(_IRREGULAR)
    rest = f"had ever {participle} {thing}"
    return f"{good} {rest}", f"{bad} {rest}"


def _inversion(rng: Random) -> tuple[str, str]:
    """Where did the captain / *the captain did hide the money."""
    noun = rng.choice(_PEOPLE)
    base, participle, thing = rng.choice(_DEEDS)
    helper, form = rng.choice((("did", base), ("will", base), ("can", base), ("had", participle)))
    subject = f"the {rng.choice(noun)}"
    start = rng.choice(("where", "when", "why", "how"))
    good, bad = f"{start} {helper} {subject}", f"{start} {subject} {helper}"
    return f"{good} {form} {thing}?", f"{bad} {form} {thing}?"


_DEEDS = (
    ("hide", "hidden", "the money"),
    ("find", "found", "the key"),
    ("sell", "sold", "the horse"),
    ("send", "sent", "the letter"),
    ("buy", "bought", "the bread"),
    ("meet", "met", "the doctor"),
    ("lose", "lost", "the ring"),
    ("learn", "learned", "the song"),
    ("leave", "left", "the ship"),
    ("build", "built", "the bridge"),
)


def _pronoun(rng: Random) -> tuple[str, str]:
    """The old man followed her / *she; she / *her followed the old man."""
    noun, verb = rng.choice(_PEOPLE), rng.choice(_MEETINGS)
    other = f"the {rng.choice(_OF_PEOPLE)} {rng.choice(noun)}"
    rest = rng.choice(("in the street", "at the door", "after dinner", "that evening"))
    nominative, objective = rng.choice(_CASES)
    if rng.random() < 0.5:
        sentences = [f"{word} {verb} {other} {rest}" for word in (nominative, objective)]
        return sentences[0], sentences[1]
    sentences = [f"{other} {verb} {word} {rest}" for word in (objective, nominative)]
    return sentences[0], sentences[1]


_CASES = (("I", "me"), ("he", "him"), ("she", "her"), ("we", "us"), ("they", "them"))
_MEETINGS = ("saw", "followed", "helped", "met", "called", "thanked", "left", "asked", "heard")


def _auxiliary(rng: Random) -> tuple[str, str]:
    """The boy could not find / *found the key; the boy had found / *find the key."""
    noun = rng.choice(_PEOPLE)
    base, participle, thing = rng.choice(_DEEDS)
    start = f"the {rng.choice(_OF_PEOPLE)} {rng.choice(noun)}"
    if rng.random() < 0.5:
        helper, good, bad = rng.choice(("will", "did not", "could not", "must")), base, participle
    else:
        helper, good, bad = rng.choice(("had", "had not", "had never")), participle, base
    start = f"{start} {helper}"
    return f"{start} {good} {thing}", f"{start} {bad} {thing}"


def _article(rng: Random) -> tuple[str, str]:
    """She saw an / *a old house; she saw a / *an house."""
    start = f"{rng.choice(_SUBJECTS)} {rng.choice(('saw', 'found', 'wanted', 'bought', 'lost'))}"
    vowel = rng.random() < 0.5
    word = rng.choice(_VOWELS if vowel else _OF_THINGS[1:])
    rest = f"{word} {rng.choice(_THINGS)[0]}"
    good, bad = ("an", "a") if vowel else ("a", "an")
    return f"{start} {good} {rest}", f"{start} {bad} {rest}"


_VOWELS = ("old", "ugly", "odd", "iron", "English", "American", "excellent", "expensive")

PHENOMENA: dict[str, Maker] = {
    "subject-verb agreement": _subject_verb,
    "agreement across a phrase": _across_phrase,
    "agreement across a clause": _across_clause,
    "determiner-noun agreement": _determiner,
    "reflexive number": _reflexive_number,
    "reflexive gender": _reflexive_gender,
    "past participle": _participle,
    "negative polarity": _polarity,
    "inversion in questions": _inversion,
    "pronoun case": _pronoun,
    "auxiliary and verb form": _auxiliary,
    "indefinite article": _article,
}
"""What the generated pairs differ in."""
