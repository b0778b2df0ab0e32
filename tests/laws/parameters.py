"""What is seen of every objective with some of its parameters, and a value other than the default for each of these."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tests.laws.combination import shaken
from x_transformers import (
    DPO,
    AutoregressiveWrapper,
    BeliefStateWrapper,
    BlockDiffusionWrapper,
    ContinuousAutoregressiveWrapper,
    ContinuousTransformerWrapper,
    Decoder,
    Encoder,
    EntropyBasedTokenizer,
    MultiInputTransformerWrapper,
    NeoMLP,
    NonAutoregressiveWrapper,
    PrefixDecoder,
    TransformerWrapper,
    ViTransformerWrapper,
    XLAutoregressiveWrapper,
    XTransformer,
    XValAutoregressiveWrapper,
    XValTransformerWrapper,
)
from x_transformers.free_transformer import FreeTransformer
from x_transformers.gpt_vae import GPTVAE
from x_transformers.up_wrapper import SyntheticDataGenerator, UniversalPretrainWrapper

V, N, DIM = 16, 8, 16


@dataclass(frozen=True)
class With:
    """A value, and what must stand beside it, with and without."""

    value: Any
    beside: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Target:
    """A constructor or a call. ``of``: its signature names the parameters; ``see`` gives whatever they change.

    ``fixed``: the input and the nets, which every call has. ``idle``: parameters that change nothing, and why.
    """

    name: str
    of: Callable[..., Any]
    see: Callable[..., Any]
    values: dict[str, Any] = field(default_factory=dict)
    fixed: tuple[str, ...] = ()
    idle: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


# what is checked where it is used, alike by all that write, and what is handed to stacks or nets, whose own it is
ELSEWHERE = (
    'seq_len', 'length', 'eos_token', 'temperature', 'filter_logits_fn', 'filter_kwargs', 'logit_filter_kwargs', 'prompt_lens',
    'attn_dim_head', 'heads', 'logits_last',
)  # fmt: skip


def options_of(call: Callable[..., Any]) -> dict[str, set[str]]:
    """Numbers, switches and words that a caller may choose, with their kinds, but what is checked elsewhere.

    A switch of ``forward`` is read by its truth, which costs nothing.
    """
    chosen = {}
    for name, parameter in inspect.signature(call).parameters.items():
        kinds = set(str(parameter.annotation).split(' | ')) & {'int', 'float', 'bool', 'str'}
        free = parameter.default is not parameter.empty or call.__name__ == '__init__'
        if kinds and free and name not in ELSEWHERE and not (call.__name__ == 'forward' and kinds == {'bool'}):
            chosen[name] = kinds
    return chosen


def seen(target: Target, given: dict[str, Any]) -> list[Any]:
    """All tensors and numbers in what there is to see, with the same random numbers every time."""
    torch.manual_seed(0)
    random.seed(0)
    leaves = tree_leaves(target.see(**given))
    kinds = (Tensor, bool, int, float, str)
    # of anything else it counts that it is there
    leaves = [leaf if isinstance(leaf, kinds) else type(leaf).__name__ for leaf in leaves]
    return [leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]


def stack(kind: type = Decoder, **flags: Any) -> nn.Module:
    return kind(**{'dim': DIM, 'depth': 1, 'heads': 2, 'attn_dim_head': 8, 'verbose': False} | flags)


def net(kind: type = Decoder, wrapper: dict[str, Any] | None = None, **flags: Any) -> Any:
    wrapper = {'num_tokens': V, 'max_seq_len': 2 * N} | (wrapper or {})
    return shaken(TransformerWrapper(attn_layers=stack(kind, **flags), **wrapper), 0)


def ids(rows: int = 2, length: int = N, seed: int = 0) -> Tensor:
    return torch.randint(1, V, (rows, length), generator=torch.Generator().manual_seed(seed))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def holed(value: int = -100) -> Tensor:
    """Tokens, one of which is to be ignored."""
    x = ids()
    x[0, 3] = value
    return x


def looped() -> Any:
    return net(wrapper={'looped': True, 'max_looped_steps': 2}, pre_and_post_norm=True)


def following() -> Any:
    return net(wrapper={'add_continuous_pred_head': True})


def several() -> Any:
    return net(wrapper={'multi_token_heads': 3})


def moved(model: nn.Module) -> nn.Module:
    """With parameters off their start."""
    return shaken(model, 1)


# ---------------------------------------------------------------- language models


def autoregressive(net_: Callable[[], Any] = net, x: Tensor | None = None, **given: Any) -> Any:
    model = AutoregressiveWrapper(net_(), **given)
    return model(holed() if x is None else x)


def relative(longest: int = 2 * N, heads: int = 1) -> Any:
    wrapper = {'use_abs_pos_emb': False, 'max_seq_len': longest, 'multi_token_heads': heads}
    return net(rotary_pos_emb=True, wrapper=wrapper)


def generated(prompts: Any = None, longest: int = 6, heads: int = 1, **given: Any) -> Any:
    model = AutoregressiveWrapper(relative(longest, heads))
    fed = {'feeds': 0}
    handle = model.net.register_forward_pre_hook(lambda *_: fed.update(feeds=fed['feeds'] + 1))
    seen_lengths: list[int] = []
    second = model.net.attn_layers.register_forward_pre_hook(lambda _, args: seen_lengths.append(args[0].shape[1]))
    out = model.generate(ids(2, 4) if prompts is None else prompts, 6, **given)
    handle.remove(), second.remove()
    out = list(out) if given.get('stream') else out
    return out, given.get('compile') or (fed['feeds'], seen_lengths)


def written_first(see: Callable[..., Any]) -> Callable[[], int]:
    """The token that a call writes first, which then ends the text."""

    def found() -> int:
        torch.manual_seed(0)
        random.seed(0)
        return int(see()[0][0, 0])

    return found


def beams(**given: Any) -> Any:
    model = AutoregressiveWrapper(relative(6))
    lengths: list[int] = []
    handle = model.net.attn_layers.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    out = model.beam_search(ids(2, 4), 9, **given)
    handle.remove()
    return out, lengths


def segments(x: Tensor | None = None, net_: Callable[[], Any] | None = None, call: Any = None, **given: Any) -> Any:
    made = (net_ or (lambda: net(wrapper={'max_seq_len': 4, 'max_mem_len': 4})))()
    return XLAutoregressiveWrapper(made, **given)(holed() if x is None else x, **(call or {}))


def segments_written(**given: Any) -> Any:
    model = XLAutoregressiveWrapper(net(wrapper={'max_seq_len': 4, 'max_mem_len': 4}))
    return (model.generate(ids(2, 3), 6, **given),)


def numbers_net() -> Any:
    made = XValTransformerWrapper(num_tokens=V, max_seq_len=2 * N, numerical_token_id=3, attn_layers=stack())
    return shaken(made, 0)


def with_numbers() -> Tensor:
    x = holed()
    x[:, 5] = 3
    return x


def numbers(x: Tensor | None = None, call: Any = None, **given: Any) -> Any:
    return XValAutoregressiveWrapper(numbers_net(), **given)(with_numbers() if x is None else x, normal(2, N), **(call or {}))


def numbers_written(**given: Any) -> Any:
    model = XValAutoregressiveWrapper(numbers_net())
    lengths: list[int] = []
    model.net.attn_layers.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    out = model.generate(ids(2, 4), normal(2, 4), 5, **given)
    return [part.nan_to_num() if part.is_floating_point() else part for part in out], lengths


def frames_net(**flags: Any) -> Any:
    given = {'dim_in': 4, 'dim_out': 4, 'max_seq_len': 2 * N} | flags
    return shaken(ContinuousTransformerWrapper(attn_layers=stack(given.pop('kind', Decoder)), **given), 0)


def frames(net_: Any = None, call: Any = None, **given: Any) -> Any:
    return ContinuousAutoregressiveWrapper(net_ or frames_net(), **given)(normal(2, N, 4), **(call or {}))


def frames_written(net_: Any = None, **given: Any) -> Any:
    model = ContinuousAutoregressiveWrapper(net_ or frames_net(probabilistic=True))
    lengths: list[int] = []
    model.net.attn_layers.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    return model.generate(normal(2, 4, 4), 5, **given), lengths


# ---------------------------------------------------------------- other objectives


def masked(call: Any = None, **given: Any) -> Any:
    hidden = net(Encoder, wrapper={'max_seq_len': N})
    model = NonAutoregressiveWrapper(hidden, **({'mask_id': 0, 'steps': 3} | given))
    moved(model)
    losses = [model(ids(4), **(call or {})) for _ in range(3)]
    parts = [part for loss in losses for part in loss if part is not None]
    learned = [p.requires_grad for p in model.parameters()]
    return parts, model.generate(2) if not call else None, learned


def unmasked(critic: bool = True, **given: Any) -> Any:
    hidden = net(Encoder, wrapper={'max_seq_len': N})
    model: Any = moved(NonAutoregressiveWrapper(hidden, mask_id=0, steps=4, self_token_critic=critic))
    return model.generate(**given)


def blocks(call: Any = None, net_: Any = None, **given: Any) -> Any:
    model: Any = BlockDiffusionWrapper(net_ or net(PrefixDecoder), **({'mask_id': 0, 'block_size': 4} | given))
    return model(ids(), **(call or {})), model.generate(ids(2, 2), 4) if not call else None


def blocks_written(**given: Any) -> Any:
    model = BlockDiffusionWrapper(net(PrefixDecoder), mask_id=0, block_size=4)
    lengths: list[int] = []
    model.net.attn_layers.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    return model.generate(**({'prompts': ids(2, 4), 'seq_len': 5} | given)), lengths


def belief(call: Any = None, **given: Any) -> Any:
    model: Any = BeliefStateWrapper(net(), **given)
    moved(model)
    return [model(ids(), **(call or {})) for _ in range(3)]


def belief_written(**given: Any) -> Any:
    model: Any = moved(BeliefStateWrapper(net(rotary_pos_emb=True, wrapper={'use_abs_pos_emb': False})))
    lengths: list[int] = []
    model.forward_decoder.attn_layers.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    return model.generate_with_suffix_cond(ids(2, 4), 5, **given), lengths


def preferred(call: Any = None, x: Tensor | None = None, **given: Any) -> Any:
    model: Any = DPO(net(), **given)
    shaken(model.policy_model, 3)
    x = ids() if x is None else x
    told = {'prompt_mask': torch.arange(N).expand(2, -1) < 3} | (call or {})
    return model(x, ids(seed=1), **told)


TRANSLATION: dict[str, Any] = {
    'dim': DIM, 'enc_num_tokens': V, 'enc_max_seq_len': N, 'enc_depth': 1, 'enc_heads': 2,
    'dec_num_tokens': V, 'dec_max_seq_len': N, 'dec_depth': 1, 'dec_heads': 2,
}  # fmt: skip


def translated(call: Any = None, target: Tensor | None = None, **given: Any) -> Any:
    model: Any = moved(XTransformer(**TRANSLATION | given))
    shapes = sorted((name, tuple(p.shape)) for name, p in model.named_parameters())
    return model(ids(), holed() if target is None else target, **(call or {})), str(shapes)


def translation_written(**given: Any) -> Any:
    model: Any = moved(XTransformer(**TRANSLATION))
    return model.generate(ids(), ids(2, 1), 5, **given)


def cut(x: Tensor | None = None, call: Any = None, **given: Any) -> Any:
    model = EntropyBasedTokenizer(net(), **({'entropy_threshold': 2.5} | given))
    return model(ids() if x is None else x, **(call or {}))


def neurons(call: Any = None, **given: Any) -> Any:
    model: Any = moved(NeoMLP(**{'dim_in': 3, 'dim_hidden': 2, 'dim_out': 2, 'dim_model': 16, 'depth': 1} | given))
    shapes = str(sorted((name, tuple(p.shape)) for name, p in model.named_parameters()))
    return model(normal(2, given.get('dim_in', 3)), **(call or {})), shapes


FREE: dict[str, Any] = {
    'num_tokens': V, 'dim': DIM, 'dec_head_depth': 1, 'dec_tail_depth': 1, 'max_seq_len': N, 'latent_bits': 3, 'heads': 2,
    'attn_dim_head': 8, 'verbose': False,
}  # fmt: skip


def free(call: Any = None, **given: Any) -> Any:
    model: Any = moved(FreeTransformer(**FREE | given))
    shapes = str(sorted((name, tuple(p.shape)) for name, p in model.named_parameters()))
    return model(holed(-1), **(call or {})), shapes


def free_written(**given: Any) -> Any:
    model: Any = moved(FreeTransformer(**FREE))
    lengths: list[int] = []
    model.decoder_tail.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    return model.generate(ids(2, 3), 7, **given), lengths


VAE: dict[str, Any] = {
    'num_tokens': V, 'dim': DIM, 'depth': 1, 'enc_depth': 1, 'max_seq_len': 2 * N, 'heads': 2, 'attn_dim_head': 8,
}  # fmt: skip


def vae(call: Any = None, **given: Any) -> Any:
    model: Any = moved(GPTVAE(**VAE | given))
    shapes = str(sorted((name, tuple(p.shape)) for name, p in model.named_parameters()))
    return [model(holed(-1), **(call or {})) for _ in range(3)], shapes


def vae_written(**given: Any) -> Any:
    model: Any = moved(GPTVAE(**VAE))
    return model.generate(ids(2, 3), 5, **given)


def machine(call: Any = None, **given: Any) -> Any:
    model = SyntheticDataGenerator(**{'dim': 8, 'num_tokens': V, 'max_seq_len': 40} | given)
    shapes = str(sorted((name, tuple(p.shape)) for name, p in model.named_parameters()))
    return model(ids(), **(call or {})), model.generate(50, seed=ids()), shapes


def machine_written(**given: Any) -> Any:
    return SyntheticDataGenerator(8, V, max_seq_len=40).generate(**({'length': 9, 'seed': ids()} | given))


def pretrained(**given: Any) -> Any:
    sizes = {'batch_size': 2, 'buffer_size': 6, 'num_reset': 2, 'seq_len': N, 'seed_length': 2}
    model = UniversalPretrainWrapper(net(), **sizes | given)
    return [model() for _ in range(3)], model.synth_data_buffer, len(model.state_dict())


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Sampled(With):
    """A generator of random numbers: made anew for each call."""


TOKEN = int(ids()[0, 3])
SHOWN = torch.arange(N) < torch.tensor([[N], [5]])
LENS = torch.tensor([N, 5])
CAUSAL = torch.ones(N, N, dtype=torch.bool).tril()
ALSO_FUTURE = 'only takes a refusal back: tests/flags/test_objectives.py::test_a_net_that_sees_the_future_is_not_trained'


def of_call(see: Callable[..., Any]) -> Callable[..., Any]:
    """``see`` with parameters of the call."""
    return lambda **given: see(call=given)


OBJECTIVES = (
    Target(
        'AutoregressiveWrapper', AutoregressiveWrapper.__init__, autoregressive,
        {
            'ignore_index': With(TOKEN, {'x': ids()}), 'pad_value': 3, 'mask_prob': 0.5,
            'next_embed_loss_weight': With(0.7, {'net_': following}),
            'multi_token_loss_weight': With(0.7, {'net_': several}),
            'looped_loss_threshold_exit': With(-1.0, {'net_': looped}), 'looped_loss_slope': With(3.0, {'net_': looped}),
            'looped_exit_loss_weight': With(3.0, {'net_': looped}),
        },
        ('net',), {'allow_future': ALSO_FUTURE},
    ),
    Target(
        'AutoregressiveWrapper.forward', AutoregressiveWrapper.forward,
        lambda **given: AutoregressiveWrapper(net())(holed(), **given),
        {
            'prepend_embeds': normal(2, 2, DIM), 'lens': LENS, 'targets': ids(seed=1), 'labels': ids(seed=1),
            'attention_mask': With(torch.arange(N) < LENS[:, None], {'labels': ids(seed=1)}),
            'num_items_in_batch': With(3, {'labels': ids(seed=1)}),
        },
        ('x',), {'input_ids': 'tests/hf/test_causal.py'},
    ),
    Target(
        'AutoregressiveWrapper.generate', AutoregressiveWrapper.generate, generated,
        {
            'eos_token': Sampled(written_first(generated)), 'temperature': 0.0, 'prompt_lens': torch.tensor([4, 2]),
            'filter_logits_fn': 'min_p', 'filter_kwargs': {'k': 5}, 'amateur_model': relative(),
            'contrastive_decode_kwargs': With({'alpha': 0.9}, {'amateur_model': relative()}),
            'generator': Sampled(seeded), 'draft_model': relative(),
            'prompt_lookup': With(1, {'prompts': torch.tensor([[1, 2, 1, 2]])}),
            'self_speculative': With(True, {'heads': 3}),
            'lookahead': With(2, {'draft_model': relative(), 'longest': 2 * N}),
        },
        ('prompts', 'seq_len'), {'compile': 'the same tokens by one program: tests/generation/test_continuation.py'},
    ),
    Target(
        'AutoregressiveWrapper.beam_search', AutoregressiveWrapper.beam_search, beams,
        {
            'beams': With(1, {'return_beams_and_scores': True}), 'eos_token': Sampled(written_first(beams)),
            'temperature': With(9.0, {'stochastic': True}), 'prompt_lens': torch.tensor([4, 2]),
            'filter_logits_fn': With('min_p', {'stochastic': True, 'filter_kwargs': {}, 'temperature': 5.0}),
            'filter_kwargs': With({'k': 5}, {'stochastic': True, 'filter_logits_fn': 'top_k', 'temperature': 5.0}),
            'length_penalty': With(2.0, {'return_beams_and_scores': True}),
            'generator': Sampled(seeded, {'stochastic': True, 'temperature': 5.0}),
        },
        ('prompts', 'seq_len'),
    ),
    Target(
        'XLAutoregressiveWrapper', XLAutoregressiveWrapper.__init__, segments,
        {
            'ignore_index': With(TOKEN, {'x': ids()}), 'pad_value': 3,
        },
        ('net',),
        {
            'allow_future': ALSO_FUTURE,
            **dict.fromkeys(
                ('tbptt_steps', 'ttt_module_paths', 'ttt_lr', 'ttt_wd', 'ttt_use_muon', 'ttt_muon_steps', 'ttt_muon_lr',
                 'ttt_low_rank_paths', 'ttt_custom_loss_module', 'ttt_next_latent_loss', 'episodic_mem_len',
                 'ttt_low_rank_replaces'),
                'tests/test_fast_weights.py, tests/test_xl_autoregressive_wrapper.py',
            ),
        },
    ),
    Target(
        'XLAutoregressiveWrapper.forward', XLAutoregressiveWrapper.forward, of_call(segments),
        {'mems': [normal(2, 3, DIM)], 'dropout_mems': With(True, {'mems': [normal(2, 3, DIM)]})},
        ('x',), {'ttt_recurrent_steps': 'tests/test_fast_weights.py'},
    ),
    Target(
        'XLAutoregressiveWrapper.generate', XLAutoregressiveWrapper.generate, segments_written,
        {
            'eos_token': Sampled(written_first(segments_written)), 'temperature': 0.0, 'filter_logits_fn': 'min_p',
            'filter_kwargs': {'k': 5}, 'mems': [9 * normal(2, 3, DIM)], 'generator': Sampled(seeded),
        },
        ('start_tokens', 'seq_len'),
    ),
    Target(
        'XValAutoregressiveWrapper', XValAutoregressiveWrapper.__init__, numbers,
        {'ignore_index': With(TOKEN, {'x': ids()}), 'pad_value': 3, 'numerical_loss_weight': 3.0}, ('net',),
        {'allow_future': ALSO_FUTURE},
    ),
    Target('XValAutoregressiveWrapper.forward', XValAutoregressiveWrapper.forward, of_call(numbers), {}, ('x', 'x_num')),
    Target(
        'XValAutoregressiveWrapper.generate', XValAutoregressiveWrapper.generate, numbers_written,
        {
            'filter_logits_fn': 'min_p', 'filter_kwargs': {'k': 5}, 'temperature': 0.0, 'prompt_lens': torch.tensor([4, 2]),
            'generator': Sampled(seeded),
        },
        ('start_tokens', 'start_numbers', 'seq_len'),
    ),
    Target(
        'ContinuousAutoregressiveWrapper', ContinuousAutoregressiveWrapper.__init__, frames,
        {'loss_fn': nn.SmoothL1Loss(reduction='none'), 'mask_by_target': With(True, {'call': {'lens': LENS}})}, ('net',),
        {'allow_future': ALSO_FUTURE},
    ),
    Target(
        'ContinuousAutoregressiveWrapper.forward', ContinuousAutoregressiveWrapper.forward, of_call(frames),
        {'rollout_steps': 2}, ('x',),
    ),
    Target(
        'ContinuousAutoregressiveWrapper.generate', ContinuousAutoregressiveWrapper.generate, frames_written,
        {'temperature': 0.0, 'prompt_lens': torch.tensor([4, 2]), 'generator': Sampled(seeded)}, ('start_tokens', 'seq_len'),
    ),
    Target(
        'NonAutoregressiveWrapper', NonAutoregressiveWrapper.__init__, masked,
        {
            'mask_id': 1, 'steps': 5, 'self_cond_train_prob': With(0.0, {'self_cond': True}), 'no_replace_prob': 0.9,
            'random_token_prob': 0.9, 'schedule': 'cosine', 'can_mask_prev_unmasked': With(True, {'steps': 5}),
            'token_critic': net(Encoder, wrapper={'logits_dim': 1}),
            'critic_loss_weight': With(3.0, {'self_token_critic': True}),
            'critic_sees_masked_only': With(False, {'self_token_critic': True}),
        },
        ('net',),
    ),
    Target(
        'NonAutoregressiveWrapper.forward', NonAutoregressiveWrapper.forward,
        lambda **call: masked(call, self_token_critic=True),
        {'generator_sample_temperature': 9.0, 'mask': torch.arange(N) < torch.tensor([[N], [5], [3], [N]])}, ('x',),
    ),
    Target(
        'NonAutoregressiveWrapper.generate', NonAutoregressiveWrapper.generate, unmasked,
        {
            'batch_size': 3, 'start_temperature': 9.0, 'filter_thres': 0.0, 'noise_level_scale': 9.0,
            'generator': Sampled(seeded),
        },
    ),
    Target(
        'BlockDiffusionWrapper', BlockDiffusionWrapper.__init__, blocks,
        {'mask_id': 5, 'block_size': 2, 'time_low': 0.5, 'time_high': 0.5}, ('net',),
    ),
    Target(
        'BlockDiffusionWrapper.forward', BlockDiffusionWrapper.forward, of_call(blocks),
        {'mask': torch.arange(N) < torch.tensor([[N], [5]])}, ('x',),
    ),
    Target(
        'BlockDiffusionWrapper.generate', BlockDiffusionWrapper.generate, blocks_written,
        {
            'steps': 1, 'temperature': 0.0, 'filter_logits_fn': 'top_k',
            'filter_kwargs': With({'k': 1}, {'filter_logits_fn': 'top_k'}), 'generator': Sampled(seeded),
        },
        ('prompts', 'seq_len'),
    ),
    Target(
        'BeliefStateWrapper', BeliefStateWrapper.__init__, belief,
        {
            'backward_decoder': net(wrapper={'post_emb_norm': True}),
            'train_frac_forward_backward_pairs': 0.3,
            'backward_ar_loss_weight': 3.0, 'text_head': nn.Linear(2 * DIM, 2 * V),
            'pred_distance_loss_weight': With(3.0, {'pred_distance': True}),
            'cond_on_distance_prob': With(0.01, {'cond_on_distance': True}),
            'max_pred_distance': With(3, {'pred_distance': True}),
        },
        ('forward_decoder',),
    ),
    Target(
        'BeliefStateWrapper.forward', BeliefStateWrapper.forward, of_call(belief),
        {'lens': LENS, 'loss_weight_by_fb_indices': lambda pairs: pairs[:, 1].float()}, ('seq',),
    ),
    Target(
        'BeliefStateWrapper.generate_with_suffix_cond', BeliefStateWrapper.generate_with_suffix_cond, belief_written,
        {
            'temperature': 0.0, 'suffix': ids(2, 3), 'filter_logits_fn': With('top_k', {'filter_kwargs': {}}),
            'filter_kwargs': {'min_p': 0.9},
            'generator': Sampled(seeded),
        },
        ('prompts', 'seq_len'),
    ),
    Target(
        'DPO', DPO.__init__, preferred,
        {'beta': 0.9, 'pad_id': With(TOKEN, {'x': ids()}), 'reduction': 'sum'}, ('model',), {'allow_future': ALSO_FUTURE},
    ),
    Target(
        'DPO.forward', DPO.forward, of_call(preferred),
        {
            'prompt_mask': torch.arange(N).expand(2, -1) < 5, 'preferred_seq_mask': SHOWN, 'unpreferred_seq_mask': SHOWN,
        },
        ('preferred_seq', 'unpreferred_seq'),
    ),
    Target(
        'XTransformer', XTransformer.__init__, translated,
        {
            'dim': 32, 'ignore_index': With(TOKEN, {'target': ids()}), 'pad_value': 3, 'cross_attn_tokens_dropout': 0.5,
        },
    ),
    Target(
        'XTransformer.forward', XTransformer.forward, of_call(translated),
        {'mask': SHOWN, 'attn_mask': CAUSAL, 'src_prepend_embeds': normal(2, 2, DIM)}, ('src', 'tgt'),
    ),
    Target(
        'XTransformer.generate', XTransformer.generate, translation_written,
        {'mask': SHOWN & (torch.arange(N) < 2), 'attn_mask': CAUSAL, 'src_prepend_embeds': 9 * normal(2, 2, DIM)},
        ('seq_in', 'seq_out_start', 'seq_len'),
    ),
    Target(
        'EntropyBasedTokenizer', EntropyBasedTokenizer.__init__, cut,
        {
            'entropy_threshold': 0.0, 'max_token_size': 2, 'accumulate_entropy': With(True, {'entropy_threshold': 4.0}),
            'ignore_entropy_below': With(3.9, {'entropy_threshold': 4.0, 'accumulate_entropy': True}),
        },
        ('decoder',),
    ),
    Target(
        'EntropyBasedTokenizer.forward', EntropyBasedTokenizer.forward,
        lambda **given: cut(call=given, entropy_threshold=2.3),
        {'lens': LENS, 'decoder_forward_kwargs': {'sum_embeds': 9 * normal(2, N, DIM)}}, ('seq',),
    ),
    Target(
        'NeoMLP', NeoMLP.__init__, neurons,
        {'dim_in': 4, 'dim_hidden': 3, 'dim_out': 3, 'dim_model': 32, 'depth': 2, 'encoder_kwargs': {'heads': 1}},
    ),
    Target('NeoMLP.forward', NeoMLP.forward, of_call(neurons), {}, ('x',)),
    Target(
        'FreeTransformer', FreeTransformer.__init__, free,
        {
            'num_tokens': 20, 'dim': 32, 'dec_head_depth': 2, 'dec_tail_depth': 2, 'enc_depth': 2, 'attn_dim_head': 4,
            'heads': 4, 'latent_bits': 2, 'kl_loss_threshold': 0.0, 'binary_mapper_kwargs': {'kl_loss_threshold': 0.1},
            'enc_kwargs': {'attn_kv_heads': 1}, 'dec_kwargs': {'attn_kv_heads': 1}, 'latent_dropout_prob': 0.9,
            'kl_loss_weight': With(9.0, {'kl_loss_threshold': 0.0}),
        },
        (),
        {
            'dim_latent': 'tests/test_defects.py::test_a_keyword_of_all_stacks_has_effect_if_it_has_in_one',
            'max_seq_len': 'kept for callers that pass it',
            'pad_id': 'tests/test_free_transformer.py::test_pads_within_the_input',
        },
    ),
    Target('FreeTransformer.forward', FreeTransformer.forward, of_call(free), {'seq_for_latents': ids(seed=4)}, ('seq',)),
    Target(
        'FreeTransformer.generate', FreeTransformer.generate, free_written,
        {
            'latents': 2, 'filter_logits_fn': With('top_k', {'logit_filter_kwargs': {}}),
            'logit_filter_kwargs': {'thres': 0.1}, 'temperature': 0.0,
            'generator': Sampled(seeded),
        },
        ('prompts', 'seq_len'),
    ),
    Target(
        'GPTVAE', GPTVAE.__init__, vae,
        {
            'num_tokens': 20, 'dim': 32, 'depth': 2, 'enc_depth': 2, 'max_seq_len': 20, 'dim_latent': 4, 'attn_dim_head': 4,
            'heads': 1, 'enc_kwargs': {'attn_kv_heads': 1}, 'dec_kwargs': {'attn_kv_heads': 1}, 'vae_kl_loss_weight': 3.0,
            'vae_kl_div_floor': 3.0, 'latents_dropout_prob': 0.0,
            'encoder': net(Encoder, wrapper={'average_pool_embed': True, 'post_emb_norm': True}),
        },
        (), {'pad_id': 'tests/test_gpt_vae.py::test_pads'},
    ),
    Target('GPTVAE.forward', GPTVAE.forward, of_call(vae), {'seq_for_latents': ids(seed=4)}, ('seq',)),
    Target(
        'GPTVAE.generate', GPTVAE.generate, vae_written,
        {'latents': 9 * normal(DIM), 'seq_for_latents': ids(), 'generator': Sampled(seeded)}, ('prompts', 'seq_len'),
    ),
    Target(
        'SyntheticDataGenerator', SyntheticDataGenerator.__init__, machine,
        {'dim': 4, 'num_tokens': 20, 'max_seq_len': 30, 'hidden_size': 4, 'network_klass': nn.RNN},
    ),
    Target(
        'SyntheticDataGenerator.forward', SyntheticDataGenerator.forward, of_call(machine),
        {'hiddens': (normal(1, 2, 8), normal(1, 2, 8))}, ('input',),
    ),
    Target(
        'SyntheticDataGenerator.generate', SyntheticDataGenerator.generate, machine_written,
        {'length': 5, 'seed': ids(seed=5), 'condition': ids(seed=6), 'temperature': 5.0,
         'generator': Sampled(seeded, {'temperature': 5.0})},
    ),
    Target(
        'UniversalPretrainWrapper', UniversalPretrainWrapper.__init__, pretrained,
        {
            'data_generator': SyntheticDataGenerator(4, V, max_seq_len=N), 'buffer_size': 8, 'num_reset': 4, 'batch_size': 3,
            'seq_len': 6, 'seed_length': 3, 'reset_turing_machine_every': 1,
        },
        ('model',), {'allow_future': ALSO_FUTURE},
    ),
)  # fmt: skip


# ---------------------------------------------------------------- models


def model_of(kind: type, given: dict[str, Any], flags: dict[str, Any]) -> Any:
    around = flags.pop('kind', Decoder)
    torch.manual_seed(0)
    return kind(attn_layers=stack(around), **given | flags)


def shapes_of(model: nn.Module) -> str:
    return str(sorted((name, tuple(p.shape)) for name, p in model.named_parameters()))


def memories(out: Any) -> Any:
    return [mem.shape for mem in out]


def of_frames(call: Any = None, **flags: Any) -> Any:
    model = model_of(ContinuousTransformerWrapper, {'dim_in': 4, 'dim_out': 4, 'max_seq_len': 2 * N, 'max_mem_len': 4}, flags)
    shaken(model, 0)
    x, mems = normal(2, N, model.dim_in or DIM), [normal(2, 3, DIM)]
    out = model(x, **(call or {}))
    left = model(x, mems=mems, return_mems=True)[1]
    return out, str(memories(left)), shapes_of(model)


def of_numbers(call: Any = None, **flags: Any) -> Any:
    model = model_of(
        XValTransformerWrapper, {'num_tokens': V, 'max_seq_len': 2 * N, 'numerical_token_id': 3, 'max_mem_len': 2}, flags
    )
    shaken(model, 0)
    x = with_numbers().clamp(min=0)
    return model(x, normal(2, N), **(call or {})), str(memories(model(x, normal(2, N), return_mems=True)[1])), shapes_of(model)


def of_several(call: Any = None, **flags: Any) -> Any:
    given = {'num_tokens': {'a': V, 'b': V}, 'max_seq_len': 2 * N, 'max_mem_len': 2}
    depth = flags.pop('depth', 1)
    torch.manual_seed(0)
    model = MultiInputTransformerWrapper(attn_layers=stack(depth=depth), **given | flags)
    shaken(model, 0)
    x = {name: ids(seed=number) % size for number, (name, size) in enumerate(model.num_tokens.items())}
    mems = [normal(2, 3, DIM, seed=layer) for layer in range(depth)]
    out = model(x, mems=mems, **(call or {}))
    out = (out[0], out[1].attn_z_loss) if isinstance(out, tuple) and hasattr(out[1], 'attn_z_loss') else out
    _, record = model(x, return_attn_z_loss=True)
    torch.stack([t.sum() for t in tree_leaves(out) if isinstance(t, Tensor)]).sum().backward()
    grads = [p.grad for p in model.embeds.parameters()]
    left = memories(model(x, return_mems=True)[1])
    return out, record.attn_z_loss, grads, str(left), shapes_of(model)


def of_images(call: Any = None, **flags: Any) -> Any:
    given = {'image_size': 8, 'patch_size': 4, 'num_classes': 3}
    torch.manual_seed(0)
    model = ViTransformerWrapper(attn_layers=stack(Encoder), **given | flags)
    shaken(model, 0)
    image = normal(2, model.channels, *model.flags.image_sides)
    return model(image, **(call or {})), model(image, return_embeddings=True), shapes_of(model)


PREFIX = normal(2, 2, DIM)
MODELS = (
    Target(
        'ContinuousTransformerWrapper', ContinuousTransformerWrapper, of_frames,
        {
            'max_seq_len': 20, 'dim_in': 5, 'dim_out': 5, 'emb_dim': 12, 'max_mem_len': 2, 'num_memory_tokens': 2,
            'emb_dropout': 0.5, 'project_in': With(nn.Linear(DIM, DIM), {'dim_in': None}),
            'project_out': With(nn.Linear(DIM, 4), {'dim_out': None}), 'use_identity_if_same_dim': With(True, {'dim_in': DIM}),
            'extend_mems': With(True, {'max_mem_len': 20}),
        },
        ('attn_layers',),
    ),
    Target(
        'ContinuousTransformerWrapper.forward', ContinuousTransformerWrapper.forward,
        lambda **call: of_frames(call, kind=Encoder),
        {
            'mask': SHOWN, 'lens': LENS, 'mems': [normal(2, 3, DIM)],
            'mem_masks': With([torch.tensor([[True, False, True]]).expand(2, -1)], {'mems': [normal(2, 3, DIM)]}),
            'pos': torch.arange(N) * 2, 'sum_embeds': normal(2, N, DIM), 'prepend_embeds': PREFIX,
            'prepend_mask': With(torch.tensor([[True, False]] * 2), {'prepend_embeds': PREFIX}), 'logits_last': 2,
            'seq_start_pos': torch.tensor([0, 3]),
        },
        ('x',), dict.fromkeys(('cache', 'input_not_include_cache'), 'tests/laws/wrapper_laws.py::cached_is_full'),
    ),
    Target(
        'XValTransformerWrapper', XValTransformerWrapper, of_numbers,
        {
            'num_tokens': 20, 'max_seq_len': 20, 'numerical_token_id': 4, 'emb_dim': 12, 'logits_dim': 5, 'max_mem_len': 1,
            'num_memory_tokens': 2, 'emb_dropout': 0.5,
        },
        ('attn_layers',),
    ),
    Target(
        'XValTransformerWrapper.forward', XValTransformerWrapper.forward,
        lambda **call: of_numbers(call, kind=Encoder),
        {
            'mask': SHOWN, 'mems': [normal(2, 3, DIM)], 'pos': torch.arange(N) * 2, 'prepend_embeds': PREFIX,
            'mem_masks': With([torch.tensor([[True, False, True]]).expand(2, -1)], {'mems': [normal(2, 3, DIM)]}),
            'prepend_mask': With(torch.tensor([[True, False]] * 2), {'prepend_embeds': PREFIX}),
            'sum_embeds': normal(2, N, DIM), 'seq_start_pos': torch.tensor([0, 3]), 'logits_last': 2,
        },
        ('x', 'x_num'), dict.fromkeys(('cache', 'input_not_include_cache'), 'tests/laws/wrapper_laws.py::cached_is_full'),
    ),
    Target(
        'MultiInputTransformerWrapper', MultiInputTransformerWrapper, of_several,
        {
            'num_tokens': {'a': V, 'c': 7}, 'max_seq_len': 20, 'emb_dim': 12, 'max_mem_len': 1,
            'shift_mem_down': With(1, {'depth': 2}), 'emb_dropout': 0.5, 'num_memory_tokens': 2,
            'memory_tokens_interspersed_every': With(3, {'num_memory_tokens': 2}), 'emb_frac_gradient': 0.1,
            'attn_z_loss_weight': 0.5,
        },
        ('attn_layers',),
    ),
    Target(
        'MultiInputTransformerWrapper.forward', MultiInputTransformerWrapper.forward, of_call(of_several),
        {
            'mask': SHOWN & (torch.arange(N) != 2), 'pos': torch.arange(N) * 2, 'prepend_embeds': PREFIX,
            'mem_masks': [torch.tensor([[True, False, True]]).expand(2, -1)],
            'prepend_mask': With(torch.tensor([[True, False]] * 2), {'prepend_embeds': PREFIX}),
            'sum_embeds': normal(2, N, DIM), 'seq_start_pos': torch.tensor([0, 3]), 'logits_last': 2,
            'attn_z_loss_weight': With(0.5, {'return_attn_z_loss': True}),
        },
        ('x', 'mems'), dict.fromkeys(('cache', 'input_not_include_cache'), 'tests/laws/wrapper_laws.py::cached_is_full'),
    ),
    Target(
        'ViTransformerWrapper', ViTransformerWrapper, of_images,
        {
            'image_size': 16, 'patch_size': 2, 'channels': 1, 'num_classes': 5, 'num_register_tokens': 2, 'emb_dropout': 0.5,
            'keep_register_tokens': With(True, {'num_register_tokens': 2}), 'cls_and_mean': With(True, {'use_cls_token': True}),
        },
        ('attn_layers',),
    ),
    Target('ViTransformerWrapper.forward', ViTransformerWrapper.forward, of_call(of_images), {}, ('img',)),
)  # fmt: skip
