"""Reading one token at a time, with everything decided beforehand.

The definition of a token's way through a model is ``AttentionLayers.run``. Decoding takes that way once per token, and most of
what it asks there has the same answer every time. The rooms here ask once, when decoding begins, and keep what is left: norms,
linear maps, one query against the keys. Like a kernel, a stepper may only be faster; what it cannot carry it refuses by name
(``refusals``), and the general way is taken.
"""
