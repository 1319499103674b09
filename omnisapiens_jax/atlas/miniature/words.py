"""The words of the miniature atlas. Content words, sentence templates and speakers never cross from one split to another.

Interjections and punctuation are closed classes, shared by all splits, as in real transcripts: they are what a model can carry
over to unseen words.
"""

from __future__ import annotations

from omnisapiens_jax.atlas.miniature.speech import Voice

SPLITS = ("train", "validation", "test")

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
        "train": tuple("unfair rude broken stolen useless noisy greedy crooked reckless hostile spiteful insulting bossy careless".split()),
        "validation": tuple("unjust cruel shameless vicious".split()),
        "test": tuple("outrageous arrogant unforgivable nasty cheating pushy".split()),
    },
    "disgust": {
        "train": tuple("rotten slimy mouldy smelly greasy filthy sticky rancid foul dirty gooey stinking sour spoiled".split()),
        "validation": tuple("putrid grimy musty oozing".split()),
        "test": tuple("revolting crusty sweaty soggy festering rank".split()),
    },
    "fear": {
        "train": tuple("haunted deadly creepy burning sinking shaking dark cursed savage poisoned falling lethal armed eerie".split()),
        "validation": tuple("ghostly toxic collapsing wild".split()),
        "test": tuple("menacing flooded venomous sinister exploding ghastly".split()),
    },
    "happy": {
        "train": tuple("lovely sunny splendid charming golden perfect superb cheerful radiant brilliant fantastic joyful great sweet".split()),
        "validation": tuple("delightful glorious merry amazing".split()),
        "test": tuple("wonderful marvellous beautiful terrific blissful excellent".split()),
    },
    "neutral": {
        "train": tuple("square grey plain usual wooden round medium standard empty flat narrow common paper local".split()),
        "validation": tuple("ordinary oval regular metal".split()),
        "test": tuple("typical beige average folded plastic printed".split()),
    },
    "sad": {
        "train": tuple("lonely lost weary hopeless gloomy gone mournful tearful faded worn hollow bleak grieving crushed".split()),
        "validation": tuple("forlorn wilted dreary heavy".split()),
        "test": tuple("sorrowful abandoned deserted miserable withered forsaken".split()),
    },
}
NOUNS: dict[str, tuple[str, ...]] = {
    "train": tuple("house garden letter soup neighbour room street bridge table party office river jacket story".split()),
    "validation": tuple("kitchen train picture window".split()),
    "test": tuple("market hotel song boat school dinner".split()),
}
JOKE_NOUNS: dict[str, tuple[str, ...]] = {
    "train": tuple("penguin goat banana monkey pirate robot cow wizard".split()),
    "validation": tuple("parrot clown pickle".split()),
    "test": tuple("llama walrus turnip vampire".split()),
}
JOKE_ADJECTIVES: dict[str, tuple[str, ...]] = {
    "train": tuple("tiny purple wobbly fluffy giant silly".split()),
    "validation": tuple("bouncy striped".split()),
    "test": tuple("itchy spotted singing".split()),
}
WORRIES: dict[str, tuple[str, ...]] = {
    "train": tuple("worry tremble panic sweat fret pace stammer flinch brood overthink".split()),
    "validation": tuple("shiver obsess tense fidget".split()),
    "test": tuple("dread shudder quiver freeze doubt startle".split()),
}


def _voices(names: str, tracts: tuple[float, ...]) -> tuple[Voice, ...]:
    return tuple(Voice(name, tract) for tract in tracts for name in names.split())


SPEAKERS: dict[str, tuple[Voice, ...]] = {
    "train": _voices(
        "en+m1 en+m3 en-us+m4 en+m7 en-us+f1 en+f2 en+f4 en-us+linda en+Andy en+klatt2 en-us+steph en+Alicia en+paul en-us+ed "
        "en+Mario en+anika en-gb-scotland+m2 en+Gene en-us+Annie en+john en+max en+belinda",
        (0.95, 1.06),
    ),
    "validation": _voices("en-us+m5 en+f3 en+Lee en-us+Andrea", (0.97, 1.04)),
    "test": _voices("en+m6 en-us+m8 en+f5 en+rob en-us+steph2 en+Hugo en+aunty en-us+david", (0.96, 1.05)),
}
