"""The record of the keywords with which a module was made, for saving."""

from __future__ import annotations

from typing import Any, Self

from torch import nn


class Made(nn.Module):
    """A module that remembers the arguments of its constructor, and can fill its own parameters and buffers."""

    made_with: tuple[tuple[Any, ...], dict[str, Any]]
    # the config of the published model that the weights came from
    hf_config: dict[str, Any] | None = None

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        self = super().__new__(cls)
        # in the dictionary, as nn.Module's own __setattr__ needs its constructor to have run
        self.__dict__['made_with'] = (args, kwargs)
        return self

    def init_own(self) -> None:
        """Fill the parameters and buffers that this very module owns."""
