"""Reasons for refusals that the flags of several files share."""

from __future__ import annotations

AGAIN = 'the stack is run again'
BEFORE = 'the token before a slice is not gathered'
DRAWS = 'other numbers would be drawn than in one process'
DROPS = 'other units would be dropped than in one process'
MIXES = 'it mixes all heads, of which each process has some'
STATE = 'its state comes from the slice before'
SUMS = 'sums over the slices before are not gathered'
UNIT = 'gains and lengths of weights are cut neither by heads nor by features'
UNKNOWN = 'it may look at what other processes have'
WHOLE = 'there is an output for the whole sequence, and none for each token, which this needs'
