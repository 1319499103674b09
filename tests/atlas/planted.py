"""A recipe whose decoder does on chosen rows what a broken C library may do. Workers unpickle it by its name."""

import ctypes
import dataclasses
import os
import time
from collections.abc import Sequence

from omnisapiens_jax.atlas.recipe import Recipe
from omnisapiens_jax.atlas.schema import MEDIA_FIELDS
from omnisapiens_jax.atlas.sources import Source
from tests.atlas.toys import RECIPE


def crash():
    ctypes.string_at(0)


def hang():
    while True:
        pass


def hang_with_the_lock():
    ctypes.PyDLL(None).pause()  # does not let go of the interpreter's lock: no thread of the worker can help


def flood():
    hoard = []
    while True:
        hoard.append(bytearray(2**26))


def quit_():
    os._exit(3)


def doze():
    time.sleep(0.2)


def mistake():
    raise KeyError("a mistake of ours")


DEEDS = {deed.__name__.rstrip("_"): deed for deed in (crash, hang, hang_with_the_lock, flood, quit_, doze, mistake)}


@dataclasses.dataclass(frozen=True)
class Planted(Recipe):
    deeds: tuple[tuple[int, str], ...] = ()  # row, name of what happens there

    def build(self, sample, *rest):
        for row, deed in self.deeds:
            if row == sample.id:
                DEEDS[deed]()
        return super().build(sample, *rest)

    def measure(self, sample, *rest):
        for row, deed in self.deeds:
            if row == sample.id:
                DEEDS[deed]()
        return super().measure(sample, *rest)


def planted(**deeds: int) -> Planted:
    """`planted(crash=3)`: row 3 crashes."""
    fields = {field.name: getattr(RECIPE, field.name) for field in dataclasses.fields(RECIPE)}
    return Planted(**fields, deeds=tuple((row, deed) for deed, row in deeds.items()))


@dataclasses.dataclass(frozen=True)
class Deadly:
    """A source of which some rows cannot even be read: the library that does it does one of the deeds instead."""

    source: Source
    deeds: tuple[tuple[int, str], ...]

    @classmethod
    def of(cls, source, **deeds: int):
        """`Deadly.of(source, crash=3)`: row 3 crashes."""
        return cls(source, tuple((row, deed) for deed, row in deeds.items()))

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        for row, deed in self.deeds:
            if row == index:
                DEEDS[deed]()
        return self.source[index]

    def fingerprint(self):
        return self.source.fingerprint()

    def stamp(self, index: int, fields: Sequence[str] = MEDIA_FIELDS) -> str:
        return self.source.stamp(index, fields)

    def file(self, index):
        return self.source.file(index)
