"""Parameters of objectives: kinds, ranges and parents; nets that do not fit."""

from __future__ import annotations

import importlib
import inspect
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import x_transformers
from tests.laws.parameters import options_of
from x_transformers import (
    DPO,
    AutoregressiveWrapper,
    BeliefStateWrapper,
    BlockDiffusionWrapper,
    ContinuousAutoregressiveWrapper,
    ContinuousTransformerWrapper,
    CrossAttender,
    Decoder,
    Encoder,
    EntropyBasedTokenizer,
    InertFlagWarning,
    NeoMLP,
    NextLatentWrapper,
    NonAutoregressiveWrapper,
    PrefixDecoder,
    TransformerWrapper,
    XLAutoregressiveWrapper,
    XTransformer,
    XValAutoregressiveWrapper,
    XValTransformerWrapper,
)
from x_transformers.continuous_autoencoder import ContinuousTransformerAutoencoder, VariationalBottleneck
from x_transformers.discover_wrapper import DiscoverDecoder, TPREncoder
from x_transformers.fast_weights import TTTMetaLearningTargetKLLoss, TTTNextLatentPredictionLoss
from x_transformers.flags import calls, later_objectives, objectives
from x_transformers.flags.base import FlagError, as_tuple
from x_transformers.flags.fit import hides_future
from x_transformers.flags.objectives import OF_NET, Options, options
from x_transformers.free_transformer import BinaryMapper, FreeTransformer
from x_transformers.full_bandwidth import FullBandwidth
from x_transformers.gpt_lejepa import LatentAutoregressive
from x_transformers.gpt_vae import GPTVAE
from x_transformers.recirculation import Recirculation
from x_transformers.up_wrapper import SyntheticDataGenerator, UniversalPretrainWrapper
from x_transformers.xm_latent_decoder import XMLatentDecoder

V, N = 16, 8
STACK = {'dim': 16, 'depth': 1, 'heads': 2, 'attn_dim_head': 8}

# the constructors and calls that are checked against each class of options
CHECKED = {
    objectives.AutoregressiveOptions: AutoregressiveWrapper.__init__,
    objectives.XLOptions: XLAutoregressiveWrapper.__init__,
    objectives.XValOptions: XValAutoregressiveWrapper.__init__,
    objectives.ContinuousOptions: ContinuousAutoregressiveWrapper.__init__,
    objectives.XTransformerOptions: XTransformer.__init__,
    objectives.MaskedOptions: NonAutoregressiveWrapper.__init__,
    objectives.BlockDiffusionOptions: BlockDiffusionWrapper.__init__,
    objectives.BeliefStateOptions: BeliefStateWrapper.__init__,
    objectives.DPOOptions: DPO.__init__,
    objectives.FreeTransformerOptions: FreeTransformer.__init__,
    objectives.GPTVAEOptions: GPTVAE.__init__,
    objectives.NeoMLPOptions: NeoMLP.__init__,
    objectives.TokenizerOptions: EntropyBasedTokenizer.__init__,
    objectives.MachineOptions: SyntheticDataGenerator.__init__,
    objectives.PretrainOptions: UniversalPretrainWrapper.__init__,
    later_objectives.FullBandwidthOptions: FullBandwidth.__init__,
    later_objectives.LatentAutoregressiveOptions: LatentAutoregressive.__init__,
    later_objectives.NextLatentOptions: NextLatentWrapper.__init__,
    later_objectives.RecirculationOptions: Recirculation.__init__,
    later_objectives.XMLatentOptions: XMLatentDecoder.__init__,
    later_objectives.FramesAutoencoderOptions: ContinuousTransformerAutoencoder.__init__,
    later_objectives.BottleneckOptions: VariationalBottleneck.__init__,
    later_objectives.ProbeOptions: TPREncoder.__init__,
    later_objectives.DiscoverOptions: DiscoverDecoder.__init__,
    later_objectives.NextStateLossOptions: TTTNextLatentPredictionLoss.__init__,
    later_objectives.TargetLossOptions: TTTMetaLearningTargetKLLoss.__init__,
    later_objectives.BitsOptions: BinaryMapper.__init__,
    calls.DrawingOptions: GPTVAE.generate,
    calls.WritingOptions: XLAutoregressiveWrapper.generate,
    calls.CachedWritingOptions: XValAutoregressiveWrapper.generate,
    calls.GenerationOptions: AutoregressiveWrapper.generate,
    calls.BeamOptions: AutoregressiveWrapper.beam_search,
    calls.LabelledOptions: AutoregressiveWrapper.forward,
    calls.XLForwardOptions: XLAutoregressiveWrapper.forward,
    calls.FramesOptions: ContinuousAutoregressiveWrapper.generate,
    calls.FramesForwardOptions: ContinuousAutoregressiveWrapper.forward,
    calls.RolloutOptions: ContinuousAutoregressiveWrapper.forward_rollout,
    calls.MaskedForwardOptions: NonAutoregressiveWrapper.forward,
    calls.MaskedGenerateOptions: NonAutoregressiveWrapper.generate,
    calls.BlockGenerateOptions: BlockDiffusionWrapper.generate,
    calls.BeliefGenerateOptions: BeliefStateWrapper.generate_with_suffix_cond,
    calls.FreeGenerateOptions: FreeTransformer.generate,
    calls.LatentsOptions: FreeTransformer.encode_to_latents,
    calls.BitsForwardOptions: BinaryMapper.forward,
    calls.PosteriorOptions: GPTVAE.encode_to_latents,
    calls.MachineGenerateOptions: SyntheticDataGenerator.generate,
    calls.BandwidthGenerateOptions: FullBandwidth.generate,
    calls.CandidatesForwardOptions: XMLatentDecoder.forward,
    calls.CandidatesGenerateOptions: XMLatentDecoder.generate_with_candidate_latents,
    calls.EncodeOptions: ContinuousTransformerAutoencoder.encode,
    calls.CutOptions: EntropyBasedTokenizer.forward,
    calls.MixOptions: Recirculation.mix,
    calls.LearnOptions: Recirculation.learn_parameters,
    calls.FitOptions: TPREncoder.fit,
}


def fields(of: type[Options]):
    return {name: field for name, field in of.flag_fields().items() if not field.metadata['says'].startswith(OF_NET)}


def test_every_class_of_options_is_checked_here() -> None:
    said = [kind for module in (objectives, later_objectives, calls) for kind in vars(module).values()]
    every = {kind for kind in said if isinstance(kind, type) and issubclass(kind, Options)}
    assert every - {Options} == set(CHECKED)


def of_package() -> set[type]:
    """Every module that is built around a net, or writes."""
    found = set()
    for path in Path(x_transformers.__file__).parent.glob('[a-z]*.py'):
        module = importlib.import_module(f'x_transformers.{path.stem}')
        for kind in vars(module).values():
            if isinstance(kind, type) and issubclass(kind, nn.Module) and kind.__module__ == module.__name__:
                around = {'net', 'model', 'decoder', 'forward_decoder'} & set(inspect.signature(kind).parameters)
                found |= {kind} if around or 'generate' in vars(kind) else set()
    # a net as others see it, and a module of parts of one
    return {kind for kind in found if kind.__name__ not in ('EpisodicNet', 'SelfCritic', 'FeatureMaps')}


OWNERS = sorted(
    of_package() | {getattr(inspect.getmodule(call), call.__qualname__.split('.')[0]) for call in CHECKED.values()},
    key=lambda kind: kind.__name__,
)


@pytest.mark.parametrize('owner', OWNERS, ids=lambda kind: kind.__name__)
def test_every_option_of_an_objective_and_of_its_calls_is_declared(owner: type) -> None:
    for name, call in vars(owner).items():
        if inspect.isfunction(call) and (name == '__init__' or not (name.startswith('_') or name == 'parameters')):
            said = [fields(of) for of, checked in CHECKED.items() if inspect.unwrap(checked) is inspect.unwrap(call)]
            missing = set(options_of(call)) - {field for each in said for field in each}
            assert not missing, f'{owner.__name__}.{name}: {missing} are in no class of options'


@pytest.mark.parametrize('of', CHECKED, ids=lambda of: of.__name__)
def test_defaults_are_those_of_the_signature(of: type[Options]) -> None:
    parameters = inspect.signature(CHECKED[of]).parameters
    for name in fields(of):
        default = parameters[name].default
        # None stands for a value that is made of others
        assert default in (of.default(name), inspect.Parameter.empty, None) or name == 'kl_loss_threshold', name


@pytest.mark.parametrize('of', CHECKED, ids=lambda of: of.__name__)
def test_defaults_are_fine(of: type[Options]) -> None:
    given = {name: of.default(name) for name in of.flag_fields()}
    options(of, 'X', given)


def other(of: type[Options], name: str):
    default = of.default(name)
    if isinstance(default, bool):
        return not default
    if isinstance(default, (int, float)):
        return default / 2 if isinstance(default, float) else default + 1
    named = {
        'contrastive_decode_kwargs': {'alpha': 0.2},
        'filter_kwargs': {'k': 2},
        'filter_logits_fn': 'top_k',
        'generator': torch.Generator(),
        'sigreg_loss_kwargs': {'num_slices': 2},
    }
    return named.get(name, 2)


@pytest.mark.parametrize(
    ('of', 'name'),
    [(of, name) for of in CHECKED for name, field in fields(of).items() if field.metadata['parent']],
    ids=lambda part: part if isinstance(part, str) else part.__name__,
)
def test_a_parameter_without_its_parent_does_nothing(of: type[Options], name: str) -> None:
    parents = as_tuple(of.flag_fields()[name].metadata['parent'])
    given = {parent: False for parent in parents if of.default(parent) is True} | {name: other(of, name)}
    with pytest.warns(InertFlagWarning) as caught:
        options(of, 'X', given)
    assert len(caught) == 1
    assert all(f'`{parent}`' in str(caught[0].message) for parent in (name, *parents)[1:])
    assert f'`{name}=' in str(caught[0].message)


@pytest.mark.parametrize(
    ('of', 'name', 'bound'),
    [
        (of, name, bound)
        for of in CHECKED
        for name, field in fields(of).items()
        for bound in ('low', 'high', 'above', 'below', 'among')
        if field.metadata[bound] is not None
    ],
    ids=lambda part: part if isinstance(part, str) else part.__name__,
)
def test_ranges(of: type[Options], name: str, bound: str) -> None:
    limit = of.flag_fields()[name].metadata[bound]
    value = {'low': lambda: limit - 1, 'high': lambda: limit + 1, 'among': lambda: 'other'}.get(bound, lambda: limit)()
    with pytest.raises(FlagError, match=f'X: `{name}=.*`: it must be'):
        options(of, 'X', {name: value})
    with pytest.raises(FlagError, match=f'X: `{name}` must be|X: `{name}=.*it must be'):
        options(of, 'X', {name: 'a word'})
    if bound != 'among':
        with pytest.raises(FlagError):
            options(of, 'X', {name: float('nan')})


@pytest.mark.parametrize(
    ('of', 'rule'), [(of, rule) for of in CHECKED for rule in of.RULES], ids=lambda part: getattr(part, '__name__', '')
)
def test_rules(of: type[Options], rule) -> None:
    if rule.inert:
        with pytest.warns(InertFlagWarning, match=rule.why.split('*')[0][:30]):
            options(of, 'X', rule.example)
    else:
        with pytest.raises(FlagError, match=rule.why[:30]):
            options(of, 'X', rule.example)


def test_all_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(FlagError) as caught:
        NonAutoregressiveWrapper(encoder(), mask_id=0, steps=0, no_replace_prob=2.0, self_cond='yes')
    assert len(caught.value.sentences) == 3


# ---------------------------------------------------------------- nets


def net(kind: type = Decoder, wrapper: dict | None = None, **flags) -> TransformerWrapper:
    return TransformerWrapper(num_tokens=V, max_seq_len=2 * N, attn_layers=kind(**STACK, **flags), **(wrapper or {}))


def encoder(**flags) -> TransformerWrapper:
    return net(Encoder, **flags)


VAE = {'num_tokens': V, 'depth': 1, 'enc_depth': 1, 'max_seq_len': 2 * N, 'heads': 2, 'attn_dim_head': 8}
FRAMES = {'dim': 16, 'enc_depth': 1, 'dec_depth': 1, 'max_seq_len': N, 'heads': 2, 'attn_dim_head': 8}


def critic_of(width: int) -> TransformerWrapper:
    return TransformerWrapper(num_tokens=V, max_seq_len=N, logits_dim=width, attn_layers=Encoder(**STACK))


def ids(rows: int = 2) -> torch.Tensor:
    return torch.randint(0, V, (rows, N))


def xval(kind: type) -> XValTransformerWrapper:
    return XValTransformerWrapper(num_tokens=V, max_seq_len=N, numerical_token_id=3, attn_layers=kind(**STACK))


def frames(kind: type) -> ContinuousTransformerWrapper:
    return ContinuousTransformerWrapper(dim_in=4, dim_out=4, max_seq_len=N, attn_layers=kind(**STACK))


def pretrain(kind: type, **flags) -> UniversalPretrainWrapper:
    return UniversalPretrainWrapper(net(kind), batch_size=2, buffer_size=6, num_reset=2, seq_len=N, seed_length=2, **flags)


TRAINED = {
    'autoregressive': lambda kind, **more: AutoregressiveWrapper(net(kind), **more)(ids()),
    'xl': lambda kind, **more: XLAutoregressiveWrapper(net(kind, {'max_mem_len': 4}), **more)(ids()),
    'xval': lambda kind, **more: XValAutoregressiveWrapper(xval(kind), **more)(ids(), torch.randn(2, N)),
    'frames': lambda kind, **more: ContinuousAutoregressiveWrapper(frames(kind), **more)(torch.randn(2, N, 4)),
    'rollout': lambda kind, **more: ContinuousAutoregressiveWrapper(frames(kind), **more)(torch.randn(2, N, 4), 2),
    'dpo': lambda kind, **more: DPO(net(kind), **more)(ids(), ids(), prompt_mask=torch.arange(N)[None].expand(2, -1) < 3),
    'pretrain': lambda kind, **more: pretrain(kind, **more)(),
}


@pytest.mark.parametrize('name', TRAINED)
def test_a_net_that_sees_the_future_is_not_trained(name: str) -> None:
    train = TRAINED[name]
    with pytest.raises(FlagError, match='must not see the tokens that it is to predict, but its stack is an Encoder'):
        train(Encoder)
    assert train(Encoder, allow_future=True).isfinite()
    for kind in (Decoder, PrefixDecoder):
        assert train(kind).isfinite()


class Foreign(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.max_seq_len, self.attn_layers = inner, N, inner.attn_layers

    def forward(self, x, **given):
        return self.inner(x, **given)


class Masked(TransformerWrapper):
    def forward(self, x, **given):
        n = x.shape[1]
        return super().forward(x, attn_mask=torch.ones(n, n, dtype=torch.bool).tril(), **given)


def test_what_cannot_be_proved_is_trained() -> None:
    assert AutoregressiveWrapper(Foreign(encoder()))(ids()).isfinite()
    own = Masked(num_tokens=V, max_seq_len=N, attn_layers=Encoder(**STACK))
    assert AutoregressiveWrapper(own)(ids()).isfinite()
    assert AutoregressiveWrapper(net(CrossAttender))(ids(), context=torch.randn(2, 3, 16)).isfinite()


def test_a_mask_of_the_call_may_hide_the_future() -> None:
    model, causal = AutoregressiveWrapper(encoder()), torch.ones(N, N, dtype=torch.bool).tril()
    for mask in (causal, causal.expand(2, -1, -1), causal.expand(2, 2, -1, -1)):
        assert model(ids(), attn_mask=mask).isfinite()
    with pytest.raises(FlagError, match='must not see'):
        model(ids(), attn_mask=causal.tril(1) | torch.ones(N, N, dtype=torch.bool).tril(1))
    assert hides_future(torch.ones(2, 4, dtype=torch.bool).tril(2))
    assert not hides_future(torch.ones(2, 4, dtype=torch.bool))
    assert not hides_future([[True]])


def test_such_a_net_may_still_write() -> None:
    assert AutoregressiveWrapper(encoder()).generate(ids(), 3, temperature=0.0).shape == (2, 3)


@pytest.mark.parametrize(
    ('build', 'says'),
    [
        (lambda: AutoregressiveWrapper(encoder(wrapper={'average_pool_embed': True})), 'average_pool_embed'),
        (lambda: AutoregressiveWrapper(net(wrapper={'attn_pool': True})), 'attn_pool'),
        (lambda: AutoregressiveWrapper(net(wrapper={'num_output_heads': 2})), 'num_output_heads'),
        (lambda: AutoregressiveWrapper(net(wrapper={'return_only_embed': True})), 'return_only_embed'),
        (lambda: XLAutoregressiveWrapper(net(wrapper={'average_pool_embed': True})), 'average_pool_embed'),
        (lambda: NonAutoregressiveWrapper(encoder(wrapper={'use_cls_token': True}), mask_id=0), 'use_cls_token'),
        (lambda: BeliefStateWrapper(net(cross_attend=True)), 'cross_attend'),
        (lambda: BeliefStateWrapper(net(), net(use_adaptive_rmsnorm=True)), 'backward_decoder has .*use_adaptive_rmsnorm'),
        (lambda: BeliefStateWrapper(net(wrapper={'recycling': True})), 'recycling'),
        (lambda: DPO(net(wrapper={'embed_num_tokens': {'kind': 3}})), 'embed_num_tokens'),
        (lambda: DPO(AutoregressiveWrapper(net())), r'Give its \.net'),
        (lambda: EntropyBasedTokenizer(net(wrapper={'attn_pool': True}), 1.0), 'attn_pool'),
        (lambda: UniversalPretrainWrapper(net(cross_attend=True)), 'cross_attend'),
    ],
)
def test_nets_that_can_never_run_are_refused(build, says: str) -> None:
    with pytest.raises(FlagError, match=says):
        build()


def test_options_are_silent_where_nothing_is_wrong() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        NonAutoregressiveWrapper(encoder(), mask_id=0, self_token_critic=True, critic_loss_weight=2.0, self_cond=True)
        AutoregressiveWrapper(net(wrapper={'add_continuous_pred_head': True}), next_embed_loss_weight=0.5)


@pytest.mark.parametrize(
    ('run', 'name', 'width'),
    [
        (lambda: BeliefStateWrapper(net(), text_head=nn.Linear(32, 5))(ids()), 'text_head', 2 * V),
        (lambda: BeliefStateWrapper(net(), text_head=nn.Linear(32, 6)).generate_with_suffix_cond(ids(), 2), 'text_head', 2 * V),
        (lambda: NonAutoregressiveWrapper(critic_of(V), mask_id=0, token_critic=critic_of(3))(ids()), 'token_critic', 1),
        (
            lambda: GPTVAE(**VAE, encoder=net(Encoder, wrapper={'average_pool_embed': True}), dim=32)(ids()), 'encoder', 32,
        ),
        (
            lambda: ContinuousTransformerAutoencoder(**FRAMES, dim_latent=5, bottleneck=VariationalBottleneck(16, 4))(
                torch.randn(2, N, 16)
            ),
            'bottleneck', 5,
        ),
    ],
)  # fmt: skip
def test_what_a_module_of_the_users_own_says_must_fit(run, name: str, width: int) -> None:
    with pytest.raises(ValueError, match=f'{name} must return a tensor whose last axis has {width} entries, got'):
        run()
