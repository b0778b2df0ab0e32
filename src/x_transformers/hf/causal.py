"""A language model as trainers and adapters of the Hugging Face ecosystem call it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.autoregressive_wrapper import AutoregressiveWrapper
from x_transformers.tensor_types import Float, Int

# what carries no loss, as these packages mark it
IGNORED = -100


@dataclass
class Described:
    """What these packages read of a model's config."""

    model_type: str = 'x_transformers'
    tie_word_embeddings: bool = False
    use_cache: bool = False

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class CausalLM(nn.Module):
    """A model of tokens that takes ``input_ids``, ``attention_mask`` and ``labels``, and gives a dictionary.

    For the ``Trainer`` of ``transformers`` and for PEFT with ``task_type='CAUSAL_LM'``. ``net``: a ``TransformerWrapper``, or
    an ``AutoregressiveWrapper`` around one; its parameters are those of this module, under ``model``.
    forward: (b n), masks of 1 for tokens, and labels of which -100 carry no loss -> ``logits`` (b n v) and, with labels,
    ``loss``: the mean, or the sum divided by ``num_items_in_batch``. Labels are shifted in here: they may be the ids.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        wrapper = net if isinstance(net, AutoregressiveWrapper) else AutoregressiveWrapper(net)
        self.model: Any = wrapper
        self.config = Described()
        # is handed on by PEFT; generation here takes keywords
        self.generation_config: Any = None

    def forward(
        self,
        input_ids: Int[Tensor, 'b n'],
        attention_mask: Int[Tensor, 'b n'] | None = None,
        labels: Int[Tensor, 'b n'] | None = None,
        num_items_in_batch: Int[Tensor, ''] | int | None = None,
        **asked: Any,
    ) -> dict[str, Tensor]:
        if unknown := [name for name, value in asked.items() if value is not None and not isinstance(value, bool)]:
            raise ValueError(f'CausalLM must be given input_ids, attention_mask and labels, got {", ".join(unknown)}, too.')
        mask = None if attention_mask is None else attention_mask.bool()
        logits: Float[Tensor, 'b n v'] = self.model.net(input_ids, mask=mask)
        if labels is None:
            return {'logits': logits}
        read, wanted = logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()
        if num_items_in_batch is None:
            return {'loss': F.cross_entropy(read, wanted, ignore_index=IGNORED), 'logits': logits}
        summed = F.cross_entropy(read, wanted, ignore_index=IGNORED, reduction='sum')
        return {'loss': summed / num_items_in_batch, 'logits': logits}

    def generate(self, prompts: Any, *args: Any, **keywords: Any) -> Tensor:
        """``AutoregressiveWrapper.generate``."""
        written: Tensor = self.model.generate(prompts, *args, **keywords)
        return written

    def prepare_inputs_for_generation(self, input_ids: Int[Tensor, 'b n'], **keywords: Any) -> dict[str, Any]:
        """What PEFT asks for by this name; generation here prepares its inputs by itself."""
        return {'input_ids': input_ids, **keywords}
