"""Words of the tasks of our own: names of a phonebook, keys of needles."""

from __future__ import annotations

#: ours: frequent names of several languages, short, so that small vocabularies learn them
_FIRST_NAMES = """
Ada Alan Alice Amir Anna Anton Bela Ben Carl Clara Dan David Diana Dora Ella Emil Emma Eric Eva Felix Frank
Greta Hana Hans Hugo Ida Igor Ines Ivan Jack Jana Joan John Jose Julia Karl Kate Kim Lara Leo Lena Linda Luis
Mara Maria Mark Max Mia Mina Nina Noah Olga Omar Oscar Otto Paul Peter Rosa Sam Sara Tara Tom Vera Wei
"""
_LAST_NAMES = """
Adams Baker Bauer Bell Berg Brown Chen Clark Cook Costa Cruz Davis Diaz Evans Fischer Ford Garcia Gray Green
Hall Hill Horn Hughes Ito James Jones Kelly Khan King Klein Kumar Lang Lee Lewis Lopez Mann Meyer Mills Moore
Novak Ortiz Park Parker Perez Price Reed Rossi Roy Ryan Sato Silva Singh Smith Stone Tanaka Turner Vogel
Wagner Walker Ward West White Wolf Young
"""
_COLOURS = """
amber azure black blue bronze brown coral cream crimson golden gray green indigo ivory jade khaki lemon lilac
lime olive orange pearl pink plum purple red rose ruby rusty scarlet silver tan teal violet white yellow
"""
_ANIMALS = """
badger bear beaver bison camel cat cobra crab crane crow deer dog dove duck eagle falcon ferret finch fox frog
gecko goat goose hare hawk heron horse ibis jackal koala lemur lion lizard llama lynx mole moose moth mouse
newt otter owl panda parrot pigeon puma rabbit raven robin salmon seal shark sheep sloth snail spider squid
stork swan tiger toad trout turtle viper walrus wasp whale wolf wombat zebra
"""
FIRST_NAMES = _FIRST_NAMES.split()
LAST_NAMES = _LAST_NAMES.split()
COLOURS = _COLOURS.split()
ANIMALS = _ANIMALS.split()
