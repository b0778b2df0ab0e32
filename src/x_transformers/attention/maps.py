"""Attention maps, computed when they are read."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from x_transformers.tensor_types import Float

Records = dict[str, Tensor]


class Maps:
    """The three maps of one attention, each (b h i j), or None if nobody asked for them.

    What the reference wrote down is here already. Otherwise the reference runs when a map is first read, on the queries and
    keys that were kept, so gradients flow. ``sink`` tells that column 0 of scores and weights is the learned sink.
    """

    def __init__(
        self, records: Records | None = None, remake: Callable[[], Records] | None = None, *, sink: bool = False
    ) -> None:
        self.records: Records = {} if records is None else records
        self.remake = remake
        self.sink = sink

    def read(self, what: str) -> Tensor | None:
        if what not in self.records and self.remake is not None:
            self.records = {**self.remake(), **self.records}
            self.remake = None
        return self.records.get(what)

    @property
    def qk_similarities(self) -> Float[Tensor, 'b h i j'] | None:
        """Scores (with those of the layer before, if they are added), before heads talk, biases and masks."""
        return self.read('similarities')

    @property
    def pre_softmax(self) -> Float[Tensor, 'b h i j'] | None:
        """The scores that weights are made of; forbidden ones are the lowest number there is."""
        return self.read('scores')

    @property
    def post_softmax(self) -> Float[Tensor, 'b h i j'] | None:
        """Weights, before dropout."""
        return self.read('weights')

    @property
    def next_layer_scores(self) -> Float[Tensor, 'b h i j'] | None:
        """The scores that residual attention adds in the next layer: without the sink."""
        scores = self.pre_softmax
        return scores[..., 1:] if self.sink and scores is not None else scores


# of an attention whose maps nobody may read
NO_MAPS = Maps()
