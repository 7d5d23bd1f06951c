"""Words of the tasks of our own: names of a phonebook, keys of needles."""

from __future__ import annotations

#: ours: frequent names of several languages, few and short, so that a vocabulary of 512 has most of them whole
_FIRST_NAMES = """
Ada Alan Amir Anna Ben Carl Dan Dora Ella Eva Hana Ida Ivan Jack Jose Kate Leo Luis Mara Nina Omar Rosa Sam Tom
"""
_LAST_NAMES = """
Baker Bell Berg Chen Cook Cruz Diaz Ford Gray Hall Horn Ito Khan King Lee Moore Novak Park Reed Rossi Sato Stone
Vogel Wolf
"""
_COLOURS = """
amber black blue brown coral gold gray green ivory lime orange pink plum red silver white
"""
_ANIMALS = """
bear cat crane crow deer dog dove duck fox frog goat goose hare hawk horse lion moose otter owl seal sheep swan
tiger wolf
"""
FIRST_NAMES = _FIRST_NAMES.split()
LAST_NAMES = _LAST_NAMES.split()
COLOURS = _COLOURS.split()
ANIMALS = _ANIMALS.split()
