"""Names from other libraries and their equivalents here, for error messages about unknown names."""

from __future__ import annotations

from collections.abc import Collection

# another name: the keyword of a stack (``Decoder``, ``Encoder``)
OF_LAYERS = {
    'd_model': 'dim',
    'embed_dim': 'dim',
    'hidden_dim': 'dim',
    'hidden_size': 'dim',
    'n_embd': 'dim',
    'n_layer': 'depth',
    'n_layers': 'depth',
    'num_hidden_layers': 'depth',
    'num_layers': 'depth',
    'n_head': 'heads',
    'n_heads': 'heads',
    'nhead': 'heads',
    'num_attention_heads': 'heads',
    'num_heads': 'heads',
    'n_kv_heads': 'attn_kv_heads',
    'num_key_value_heads': 'attn_kv_heads',
    'num_kv_heads': 'attn_kv_heads',
    'd_head': 'attn_dim_head',
    'head_dim': 'attn_dim_head',
    'd_ff': 'ff_dim_inner',
    'dim_feedforward': 'ff_dim_inner',
    'ff_dim': 'ff_dim_inner',
    'ffn_dim': 'ff_dim_inner',
    'intermediate_size': 'ff_dim_inner',
    'mlp_dim': 'ff_dim_inner',
    'mlp_ratio': 'ff_mult',
    'activation': 'ff_custom_activation',
    'hidden_act': 'ff_custom_activation',
    'attention_bias': 'attn_qkv_bias',
    'qkv_bias': 'attn_qkv_bias',
    'attention_dropout': 'attn_dropout',
    'attn_drop': 'attn_dropout',
    'drop_path': 'layer_dropout',
    'stochastic_depth': 'layer_dropout',
    'flash_attn': 'attn_flash',
    'use_flash_attn': 'attn_flash',
    'qk_norm': 'attn_qk_norm',
    'layer_norm_eps': 'norm_eps',
    'rms_norm_eps': 'norm_eps',
    'rms_norm': 'use_rmsnorm',
    'rmsnorm': 'use_rmsnorm',
    'layer_scale': 'use_layerscale',
    'alibi': 'alibi_pos_bias',
    'rope': 'rotary_pos_emb',
    'rope_scaling': 'rotary_scaling',
    'rope_theta': 'rotary_theta',
    'sliding_window': 'attn_max_attend_past',
    'window_size': 'attn_max_attend_past',
    'norm_first': 'pre_norm',
}

# the same, of a model of tokens (``TransformerWrapper``)
OF_MODELS = {
    'n_vocab': 'num_tokens',
    'vocab_size': 'num_tokens',
    'block_size': 'max_seq_len',
    'context_length': 'max_seq_len',
    'max_length': 'max_seq_len',
    'max_position_embeddings': 'max_seq_len',
    'n_positions': 'max_seq_len',
    'embd_pdrop': 'emb_dropout',
    'tie_embeddings': 'tie_embedding',
    'tie_weights': 'tie_embedding',
    'tie_word_embeddings': 'tie_embedding',
}

# the same, of the command that trains
OF_TRAINING = {
    'batch_size': 'batch',
    'block_size': 'seq_len',
    'context_length': 'seq_len',
    'gradient_accumulation_steps': 'grad_accum',
    'grad_clip': 'clip',
    'learning_rate': 'lr',
    'max_steps': 'steps',
    'num_steps': 'steps',
    'out': 'run_dir',
    'out_dir': 'run_dir',
    'output': 'run_dir',
    'output_dir': 'run_dir',
    'vocab_size': 'vocab',
    'warmup_steps': 'warmup',
}

OWNERS = {**dict.fromkeys(OF_LAYERS, 'the layers (Decoder, Encoder)'), **dict.fromkeys(OF_MODELS, 'TransformerWrapper')}

# names of no keyword, and what to write for them
SAID_OTHERWISE = {
    'swiglu': 'write `ff_glu=True, ff_swish=True`.',
    'geglu': 'write `ff_glu=True`.',
    'causal_mask': 'a Decoder is causal, an Encoder is not.',
    'is_causal': 'a Decoder is causal, an Encoder is not.',
    'attention_mask': 'write `mask=`, boolean, True where there is a token.',
    'key_padding_mask': 'write `mask=`, boolean, True where there is a token: the opposite of torch.nn.',
    'src_key_padding_mask': 'write `mask=`, boolean, True where there is a token: the opposite of torch.nn.',
    'memory_key_padding_mask': 'write `context_mask=`, boolean, True where there is something: the opposite of torch.nn.',
    'encoder_attention_mask': 'write `context_mask=`, boolean, True where there is something.',
    'encoder_hidden_states': 'write `context=`, into a stack with `cross_attend=True`.',
    'memory': 'write `context=`, into a stack with `cross_attend=True`.',
    'input_ids': 'the ids are the first argument.',
    'inputs_embeds': 'a stack takes vectors: call the `attn_layers` of the model, or use ContinuousTransformerWrapper.',
    'position_ids': 'write `pos=`.',
    'past_key_values': 'write `cache=`, with what `return_intermediates=True` returned.',
    'output_hidden_states': 'write `return_intermediates=True`.',
    'output_attentions': 'write `return_attn=True`.',
    'labels': 'AutoregressiveWrapper takes them, and makes them of the ids where there are none; a loss of your own: '
    'F.cross_entropy(model(ids).transpose(1, 2), labels).',
    'do_sample': '`temperature=0` takes the likeliest token, anything above samples.',
    'top_k': "write `filter_logits_fn='top_k', filter_kwargs={'k': 5}`.",
    'top_p': "write `filter_logits_fn='top_p', filter_kwargs={'thres': 0.9}`.",
    'min_p': "write `filter_logits_fn='min_p', filter_kwargs={'min_p': 0.05}`.",
    'max_length': 'write `seq_len=`, the second argument, for the tokens after the prompt.',
    'max_new_tokens': 'write `seq_len=`, the second argument.',
    'num_beams': 'call `beam_search(prompts, seq_len, beams=...)`.',
    'eos_token_id': 'write `eos_token=`.',
    'pad_token_id': 'write `pad_value=` in the constructor of the wrapper.',
    'use_cache': 'write `cache_kv=`.',
    'streamer': 'write `stream=True`; the call returns an iterator.',
}


def renamed_to(name: str, known: Collection[str]) -> str | None:
    """The keyword among ``known`` that means what others call ``name``; None if there is none."""
    names_here = [names[name] for names in (OF_TRAINING, OF_LAYERS, OF_MODELS) if name in names]
    spellings = [spelling for here in names_here for spelling in (here, here.removeprefix('attn_').removeprefix('ff_'))]
    return next((spelling for spelling in spellings if spelling in known), None)


def answer(name: str, known: Collection[str]) -> str | None:
    """What to write in the place of a constructor's keyword, as the rest of a sentence; None if nobody knows the name."""
    here = renamed_to(name, known)
    if here is not None:
        return f'here it is `{here}`.'
    if name in OWNERS:
        return f'here it is `{OF_LAYERS.get(name) or OF_MODELS[name]}` of {OWNERS[name]}.'
    return SAID_OTHERWISE.get(name)


def answer_of_call(name: str) -> str | None:
    """The same for an argument of a call."""
    return SAID_OTHERWISE.get(name)
