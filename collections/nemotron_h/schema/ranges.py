"""Ranges of numbers in recipes.

They are ours: they stop typing errors and what would overflow far from its cause, and leave room for any model.
"""

#: of counts: 32 bits, as most indices of the libraries below have them
COUNT = 2**31 - 1
#: of a layer's sizes
WIDTH = 2**24
#: of a vocabulary: four times the largest that is published, about a million
VOCABULARY = 2**22
#: of seeds: NumPy's legacy generators take 32 bits, and ranks add to it
SEED = 2**31 - 1
