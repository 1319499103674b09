"""The words of the miniature atlas. Content words, sentence templates and speakers never cross from one split to another.

Interjections and punctuation are closed classes, shared by all splits, as in real transcripts: they are what a model can carry
over to unseen words.
"""

from __future__ import annotations

from omnisapiens_jax.atlas.miniature.speech import Voice

SPLITS = ("train", "validation", "test")


def _pool(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _voices(names: str, tracts: tuple[float, ...]) -> tuple[Voice, ...]:
    return tuple(Voice(name, tract) for tract in tracts for name in names.split())


INTERJECTIONS: dict[str, tuple[str, ...]] = {
    "anger": ("hey", "stop"),
    "disgust": ("yuck", "ew"),
    "fear": ("help", "oh no"),
    "happy": ("wow", "hooray"),
    "neutral": ("well", "so"),
    "sad": ("alas", "oh dear"),
}
PUNCTUATION = {"anger": "!", "disgust": ".", "fear": "?!", "happy": "!", "neutral": ".", "sad": "..."}
FREQUENCIES = {"high": ("often", "always"), "low": ("never", "rarely")}  # closed class of a questionnaire

TEMPLATES: dict[str, tuple[str, ...]] = {
    "train": ("the {noun} is {adj}", "{adj} {noun} again", "my {noun} was {adj}", "such a {adj} {noun}", "{adj}, that {noun}"),
    "validation": ("this {noun} looks {adj}", "one more {adj} {noun}"),
    "test": ("our {noun} seems {adj}", "what {adj} {noun}", "your {noun} got {adj}"),
}
JOKES: dict[str, tuple[str, ...]] = {
    "train": ("a {noun} with a {adj} hat", "two {noun}s met a {adj} duck", "my {noun} ate the {adj} bill"),
    "validation": ("her {noun} sang to a {adj} lamp",),
    "test": ("his {noun} wed some {adj} sock", "no {noun} likes this {adj} cake"),
}
CLINIC: dict[str, tuple[str, ...]] = {
    "train": ("I feel {adj}", "I am {adj} today", "it was {adj} for me"),
    "validation": ("I get {adj}",),
    "test": ("I seem {adj} lately", "I have been {adj}"),
}
QUESTIONNAIRE: dict[str, tuple[str, ...]] = {
    "train": ("I {0}: {1}. I {2}: {3}. I {4}: {5}.", "{0} {1}, {2} {3}, {4} {5}."),
    "validation": ("Do you {0}? {1}. {2}? {3}. {4}? {5}.",),
    "test": ("To {0}: {1}. To {2}: {3}. To {4}: {5}.",),
}

ADJECTIVES: dict[str, dict[str, tuple[str, ...]]] = {
    "anger": {
        "train": _pool("unfair rude broken stolen useless noisy greedy crooked reckless hostile spiteful insulting bossy careless"),
        "validation": _pool("unjust cruel shameless vicious"),
        "test": _pool("outrageous arrogant unforgivable nasty cheating pushy"),
    },
    "disgust": {
        "train": _pool("rotten slimy mouldy smelly greasy filthy sticky rancid foul dirty gooey stinking sour spoiled"),
        "validation": _pool("putrid grimy musty oozing"),
        "test": _pool("revolting crusty sweaty soggy festering rank"),
    },
    "fear": {
        "train": _pool("haunted deadly creepy burning sinking shaking dark cursed savage poisoned falling lethal armed eerie"),
        "validation": _pool("ghostly toxic collapsing wild"),
        "test": _pool("menacing flooded venomous sinister exploding ghastly"),
    },
    "happy": {
        "train": _pool("lovely sunny splendid charming golden perfect superb cheerful radiant brilliant fantastic joyful great sweet"),
        "validation": _pool("delightful glorious merry amazing"),
        "test": _pool("wonderful marvellous beautiful terrific blissful excellent"),
    },
    "neutral": {
        "train": _pool("square grey plain usual wooden round medium standard empty flat narrow common paper local"),
        "validation": _pool("ordinary oval regular metal"),
        "test": _pool("typical beige average folded plastic printed"),
    },
    "sad": {
        "train": _pool("lonely lost weary hopeless gloomy gone mournful tearful faded worn hollow bleak grieving crushed"),
        "validation": _pool("forlorn wilted dreary heavy"),
        "test": _pool("sorrowful abandoned deserted miserable withered forsaken"),
    },
}
NOUNS: dict[str, tuple[str, ...]] = {
    "train": _pool("house garden letter soup neighbour room street bridge table party office river jacket story"),
    "validation": _pool("kitchen train picture window"),
    "test": _pool("market hotel song boat school dinner"),
}
JOKE_NOUNS: dict[str, tuple[str, ...]] = {
    "train": _pool("penguin goat banana monkey pirate robot cow wizard"),
    "validation": _pool("parrot clown pickle"),
    "test": _pool("llama walrus turnip vampire"),
}
JOKE_ADJECTIVES: dict[str, tuple[str, ...]] = {
    "train": _pool("tiny purple wobbly fluffy giant silly"),
    "validation": _pool("bouncy striped"),
    "test": _pool("itchy spotted singing"),
}
WORRIES: dict[str, tuple[str, ...]] = {
    "train": _pool("worry tremble panic sweat fret pace stammer flinch brood overthink"),
    "validation": _pool("shiver obsess tense fidget"),
    "test": _pool("dread shudder quiver freeze doubt startle"),
}
SPEAKERS: dict[str, tuple[Voice, ...]] = {
    "train": _voices(
        "en+m1 en+m3 en-us+m4 en+m7 en-us+f1 en+f2 en+f4 en-us+linda en+Andy en+klatt2 en-us+steph en+Alicia en+paul en-us+ed "
        "en+Mario en+anika en-gb-scotland+m2 en+Gene en-us+Annie en+john en+max en+belinda",
        (0.93, 1.0, 1.07),
    ),
    "validation": _voices("en-us+m5 en+f3 en+Lee en-us+Andrea", (0.97, 1.04)),
    "test": _voices("en+m6 en-us+m8 en+f5 en+rob en-us+steph2 en+Hugo en+aunty en-us+david", (0.96, 1.05)),
}
