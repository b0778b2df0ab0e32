"""A language model with the interface of trainers and adapters of the Hugging Face ecosystem."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from x_transformers.autoregressive_wrapper import AutoregressiveWrapper
from x_transformers.labelled import Labelled
from x_transformers.tensor_types import Int


@dataclass
class Described:
    """What these packages read of a model's config."""

    model_type: str = 'x_transformers'
    tie_word_embeddings: bool = False
    use_cache: bool = False

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class CausalLM(nn.Module):
    """An ``AutoregressiveWrapper`` with what PEFT reads beside its call, for ``task_type='CAUSAL_LM'``.

    ``net``: a ``TransformerWrapper``, or an ``AutoregressiveWrapper`` around one; its parameters are those of this module,
    under ``model``. forward: ``AutoregressiveWrapper``'s with ``input_ids``. Raises ValueError for further tensors.
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
    ) -> Labelled:
        if unknown := [name for name, value in asked.items() if value is not None and not isinstance(value, bool)]:
            raise ValueError(f'CausalLM must be given input_ids, attention_mask and labels, got {", ".join(unknown)}, too.')
        said: Labelled = self.model(
            input_ids=input_ids, attention_mask=attention_mask, labels=labels, num_items_in_batch=num_items_in_batch
        )
        return said

    def generate(self, prompts: Any, *args: Any, **keywords: Any) -> Tensor:
        """``AutoregressiveWrapper.generate``."""
        written: Tensor = self.model.generate(prompts, *args, **keywords)
        return written

    def prepare_inputs_for_generation(self, input_ids: Int[Tensor, 'b n'], **keywords: Any) -> dict[str, Any]:
        """What PEFT asks for by this name; generation here prepares its inputs by itself."""
        return {'input_ids': input_ids, **keywords}
