"""The same workloads on Hugging Face transformers, with models of the same shape: GPT-2, Llama, BERT, ViT, BART."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from worker import LENGTH, VOCABULARY, WIDE, Growth, Step, ids, training

SHAPE: dict[str, Any] = {'hidden_size': 512, 'num_hidden_layers': 6, 'num_attention_heads': 8, 'intermediate_size': 2048}


class HuggingFace:
    """What ``transformers`` of this interpreter has; workloads without a counterpart raise ``NotImplementedError``."""

    def decoder(self, modern: bool, vocabulary: int = VOCABULARY, length: int = LENGTH) -> Any:
        from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

        if modern:
            config: Any = LlamaConfig(
                **SHAPE, num_key_value_heads=2, vocab_size=vocabulary, max_position_embeddings=length,
                tie_word_embeddings=False, attn_implementation='sdpa',
            )  # fmt: skip
            return LlamaForCausalLM(config)
        config = GPT2Config(
            n_embd=512, n_layer=6, n_head=8, vocab_size=vocabulary, n_positions=length, resid_pdrop=0.0, embd_pdrop=0.0,
            attn_pdrop=0.0, tie_word_embeddings=False, attn_implementation='sdpa',
        )  # fmt: skip
        return GPT2LMHeadModel(config)

    def prepare(self, name: str) -> tuple[Step, torch.nn.Module]:
        kind, *rest = name.split('/')
        modern = 'modern' in rest
        if kind in ('train', 'vocab'):
            vocabulary = WIDE if kind == 'vocab' else VOCABULARY
            model, x = self.decoder(modern, vocabulary), ids(2, LENGTH, vocabulary)
            return training(lambda: model(x, labels=x, use_cache=False).loss, model), model
        if kind == 'prefill':
            model, x = self.decoder(modern, length=2048).eval(), ids(1, 2048)
            return torch.no_grad()(lambda: model(x, use_cache=False)), model
        if kind in ('decode', 'growth'):
            model = self.decoder(modern, length=4096).eval()
            given = {'do_sample': False, 'eos_token_id': None, 'pad_token_id': 0}

            def generate(prompt: Tensor, steps: int) -> Tensor:
                return model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=steps, **given)

            if kind == 'growth':
                return Growth(generate), model
            prompt = ids(int(rest[1][1:]), 32)
            return lambda: generate(prompt, 256), model
        if kind in ('encoder', 'vit', 'encdec'):
            return getattr(self, kind)()
        raise NotImplementedError(f'transformers has no counterpart of {name}')

    def encoder(self) -> tuple[Step, torch.nn.Module]:
        from transformers import BertConfig, BertModel

        config = BertConfig(
            **SHAPE, vocab_size=VOCABULARY, max_position_embeddings=LENGTH, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0, attn_implementation='sdpa',
        )  # fmt: skip
        model, x = BertModel(config, add_pooling_layer=False), ids(2, LENGTH)
        mask = (torch.arange(LENGTH) < torch.tensor([[LENGTH], [700]])).long()
        return training(lambda: model(x, attention_mask=mask).last_hidden_state.square().mean(), model), model

    def vit(self) -> tuple[Step, torch.nn.Module]:
        from transformers import ViTConfig, ViTForImageClassification

        config = ViTConfig(**SHAPE, image_size=256, patch_size=16, num_labels=1000, attn_implementation='sdpa')
        model, images = ViTForImageClassification(config), torch.randn(4, 3, 256, 256)
        return training(lambda: model(images).logits.square().mean(), model), model

    def encdec(self) -> tuple[Step, torch.nn.Module]:
        from transformers import BartConfig, BartForConditionalGeneration

        sides = {
            f'{side}_{key}': value
            for side in ('encoder', 'decoder')
            for key, value in (('layers', 3), ('ffn_dim', 2048), ('attention_heads', 8))
        }
        config = BartConfig(
            d_model=512, vocab_size=VOCABULARY, max_position_embeddings=LENGTH, dropout=0.0, attn_implementation='sdpa', **sides
        )
        model, x = BartForConditionalGeneration(config), ids(2, LENGTH)
        return training(lambda: model(input_ids=x, labels=x).loss, model), model
