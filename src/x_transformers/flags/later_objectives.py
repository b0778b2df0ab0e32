"""The parameters of objectives that 2.16.1 does not have, declared like flags."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from x_transformers.flags.base import flag
from x_transformers.flags.objectives import Options, ignored_targets, in_place_of_ignored, share
from x_transformers.flags.rule import Rule, is_on


def idle(name: str, where: Callable[[Any], bool], why: str, example: Mapping[str, Any]) -> Rule:
    """The rule that a parameter does nothing ``where`` others are so."""
    return Rule((name,), lambda given, _: is_on(given, name) and where(given), why, example, 'Leave it out.', inert=True)


@dataclass(frozen=True, kw_only=True, repr=False)
class FullBandwidthOptions(Options):
    temporal_parallel_passes: int = flag(2, 'Passes of training and of reading a prompt.', low=2)
    recirc_pairs: str | Iterable[Any] | None = flag(None, 'Blocks out of which, and into which.')
    transition: str | Callable[..., Any] | None = flag(None, 'How latent and stream are joined.')
    transitions: Mapping[Any, Any] | None = flag(None, 'Others for some pairs.')
    feedback_pass_weight: float = flag(1.0, 'Weight of the passes after the first.', low=0.0)
    ignore_index: int = ignored_targets()
    jitter_noise_delta: float = flag(0.02, 'Uniform noise on the latents in training.', low=0.0)
    dynamic_rollout_loss_weight: bool = flag(False, 'Passes behind a bad one count less.')
    dynamic_loss_decay: float = flag(0.5, 'How much less.', parent='dynamic_rollout_loss_weight', low=0.0)
    dynamic_loss_threshold: float = flag(1.0, 'What is bad.', parent='dynamic_rollout_loss_weight', low=0.0)
    pad_value: int = in_place_of_ignored()


@dataclass(frozen=True, kw_only=True, repr=False)
class LatentAutoregressiveOptions(Options):
    dim: int = flag(1, 'Width of the net.', low=1)
    sigreg_loss_weight: float = share(0.05, 'Share of the regulariser.')
    l2_loss_weight: float = flag(1.0, 'Weight of the prediction.', low=0.0)
    num_rollouts: int = flag(1, 'How many positions ahead.', low=1)
    rollout_loss_weights: Sequence[Any] | None = flag(None, 'A weight for each.')
    sigreg_loss_kwargs: Mapping[str, Any] | None = flag(None, 'Keywords of the regulariser.')
    frac_gradient: float = share(0.0, "Share of the probe's gradient that reaches the net.")
    predict_next_cosine_sim: bool = flag(True, 'Predictions and targets have unit length.')
    predictor_input_hiddens_index: int | None = flag(-1, 'The attention layer whose input the predictor reads.')
    predict_next_embed_with_action: bool = flag(True, 'A predictor that knows the token.')
    predict_next_embed_no_action: bool = flag(False, 'A predictor that does not.')
    detach_target: bool = flag(True, 'No gradient reaches the targets.')
    ignore_index: int = ignored_targets()
    pad_value: int = in_place_of_ignored()
    RULES = (
        idle(
            'sigreg_loss_kwargs',
            lambda given: given.sigreg_loss_weight == 0,
            'there is no regulariser with a [sigreg_loss_weight] of 0',
            {'sigreg_loss_kwargs': {'num_slices': 3}, 'sigreg_loss_weight': 0.0},
        ),
    )


@dataclass(frozen=True, kw_only=True, repr=False)
class NextLatentOptions(Options):
    dim: int = flag(1, 'Width of the net.', low=1)
    num_rollouts: int = flag(1, 'How many positions ahead.', low=1)
    loss_type: str | nn.Module = flag('smooth_l1', 'The loss of a latent.')
    dynamics_type: str = flag('residual', 'The network that predicts.', among=('residual', 'gru', 'custom'))
    dynamics_network: nn.Module | None = flag(None, 'One of your own.')
    dynamics_hidden_dim: int | None = flag(None, 'Its width inside.', low=1)
    dynamics_num_layers: int = flag(3, 'Its layers.', low=1)
    next_latent_loss_weight: float = flag(1.0, 'Weight of the loss on latents.', low=0.0)
    kl_loss_weight: float = flag(1.0, 'Weight of the loss on what they imply.', low=0.0)
    ignore_index: int = ignored_targets()
    pad_value: int = in_place_of_ignored()
    rollout_weights: Sequence[Any] | None = flag(None, 'A weight for each position ahead.')
    sigreg_loss_weight: float = flag(0.0, 'Weight of the regulariser.', low=0.0)
    sigreg_loss_kwargs: Mapping[str, Any] | None = flag(None, 'Its keywords.', parent='sigreg_loss_weight')
    dynamic_rollout_loss_weight: bool = flag(True, 'Rollouts behind a bad one count less.')
    dynamic_loss_decay: float = flag(1.0, 'How much less.', parent='dynamic_rollout_loss_weight', low=0.0)
    RULES = (
        *(
            idle(
                name,
                lambda given: given.dynamics_type != 'residual',
                "it is the size of the network that [dynamics_type]='residual' makes",
                {name: 5, 'dynamics_type': 'gru'},
            )
            for name in ('dynamics_hidden_dim', 'dynamics_num_layers')
        ),
    )


@dataclass(frozen=True, kw_only=True, repr=False)
class RecirculationOptions(Options):
    source_layer: int | Sequence[Any] = flag(0, 'The attention layers that are read.')
    destination_layer: int | Sequence[Any] = flag(0, 'Those whose input is changed.')
    alpha: float = flag(0.15, 'Weight of the source.')
    beta: float | None = flag(None, 'Weight of the destination.')
    ramp_steps: int = flag(10, 'alpha grows to its value over so many tokens.', low=0)
    use_learned: bool = flag(False, 'Weights per channel come from a small network.')
    learned_hidden: int | None = flag(None, 'Its width.', parent='use_learned', low=1)
    RULES = (
        *(
            idle(name, lambda given: given.use_learned, 'weights are learned', {name: 3, 'use_learned': True})
            for name in ('alpha', 'beta', 'ramp_steps')
        ),
    )


@dataclass(frozen=True, kw_only=True, repr=False)
class XMLatentOptions(Options):
    num_latents: int = flag(4, 'Vectors of the prefix.', low=1)
    dim: int | None = flag(None, "Width of the net's embeddings.", low=1)
    latent_dim: int | None = flag(None, 'Width of the latents.', low=1)
    candidates: int = flag(2, 'Prefixes that are tried.', low=1)
    max_batch_size: int | None = flag(None, 'Run at most this many rows at a time.', low=1)
    ignore_index: int = ignored_targets()
    latent_drop_prob: float = flag(0.0, 'How often there is no prefix.', low=0.0, below=1.0)
    always_latent_proj: bool = flag(False, 'A linear map, even between equal widths.')
    repulsive_loss_weight: float = flag(0.0, 'Reward for candidates that differ.')
    winner_fns: Sequence[Any] | None = flag(None, 'A winner function for each slot.')


@dataclass(frozen=True, kw_only=True, repr=False)
class FramesAutoencoderOptions(Options):
    """``ContinuousTransformerAutoencoder``."""

    dim: int = flag(1, 'Width.', low=1)
    enc_depth: int = flag(1, 'Layers of the encoder.', low=1)
    dec_depth: int = flag(1, 'Layers of the decoder.', low=1)
    max_seq_len: int = flag(1, 'Longest sequence.', low=0)
    dim_input: int | None = flag(None, 'Width of the vectors.', low=1)
    dim_latent: int | None = flag(None, 'Width of the latent.', low=1)
    bottleneck: nn.Module | None = flag(None, 'A module of your own.')
    bottleneck_type: str = flag('deterministic', 'The kind of bottleneck.', among=('deterministic', 'variational'))
    deterministic_bottleneck_kwargs: Mapping[str, Any] | None = flag(None, 'Keywords of the deterministic one.')
    variational_bottleneck_kwargs: Mapping[str, Any] | None = flag(None, 'Keywords of the variational one.')
    loss_type: str = flag('l1', 'How vectors are compared.', among=('l1', 'l2'))
    enc_kwargs: Mapping[str, Any] | None = flag(None, 'Keywords of the encoder.')
    dec_kwargs: Mapping[str, Any] | None = flag(None, 'Keywords of the decoder.')
    latents_dropout_prob: float = flag(0.5, 'How often the latent is hidden.', low=0.0, below=1.0)
    RULES = (
        *(
            idle(
                f'{kind}_bottleneck_kwargs',
                lambda given, kind=kind: given.bottleneck is not None or given.bottleneck_type != kind,  # type: ignore[misc]
                'there is another bottleneck',
                {f'{kind}_bottleneck_kwargs': {'x': 1}, 'bottleneck': nn.Identity()},
            )
            for kind in ('deterministic', 'variational')
        ),
        idle(
            'bottleneck_type',
            lambda given: given.bottleneck is not None,
            'a module of your own takes its place',
            {'bottleneck_type': 'variational', 'bottleneck': nn.Identity()},
        ),
    )


@dataclass(frozen=True, kw_only=True, repr=False)
class BottleneckOptions(Options):
    """``VariationalBottleneck``."""

    dim: int = flag(1, 'Width.', low=1)
    dim_latent: int = flag(1, 'Width of the latent.', low=1)
    kl_loss_weight: float = flag(1.0, 'Weight of the divergence.', low=0.0)


@dataclass(frozen=True, kw_only=True, repr=False)
class ProbeOptions(Options):
    """``TPREncoder``."""

    dim: int = flag(1, 'Width of the encodings.', low=1)
    num_fillers: int = flag(1, 'How many fillers.', low=1)
    num_roles: int = flag(1, 'How many roles.', low=1)
    filler_dim: int = flag(24, 'Width of a filler.', low=1)
    role_dim: int = flag(24, 'Width of a role.', low=1)
    mlp_dim: int | None = flag(None, 'Width of the network that reads out.', low=1)


@dataclass(frozen=True, kw_only=True, repr=False)
class DiscoverOptions(Options):
    """``DiscoverDecoder``."""

    num_fillers: int = flag(1, 'Ids below are tokens of sequences.', low=1)
    bos_id: int = flag(0, 'The id that decoding begins with.', low=0)
    pad_id: int = flag(0, 'The id behind the end.', low=0)
    max_seq_len: int = flag(1, 'The longest sequence that is decoded.', low=1)
    enc_pos: str | int = flag('last', 'The position whose embedding is the encoding.')


@dataclass(frozen=True, kw_only=True, repr=False)
class NextStateLossOptions(Options):
    """``TTTNextLatentPredictionLoss``."""

    dim: int = flag(1, 'Width of the hidden states.', low=1)
    hidden_dim: int | None = flag(None, 'Width of the predictor inside.', low=1)
    num_layers: int = flag(3, 'Its layers.', low=1)
    loss_type: str = flag('smooth_l1', 'How states are compared.', among=('smooth_l1', 'mse'))


@dataclass(frozen=True, kw_only=True, repr=False)
class TargetLossOptions(Options):
    """``TTTMetaLearningTargetKLLoss``."""

    dim: int = flag(1, 'Width of the hidden states.', low=1)
    num_classes: int = flag(1, 'Width of the prediction.', low=1)
    depth: int = flag(1, 'Layers of the encoder.', low=1)
    heads: int = flag(4, 'Its heads.', low=1)
    dim_head: int = flag(64, 'Their width.', low=1)


@dataclass(frozen=True, kw_only=True, repr=False)
class BitsOptions(Options):
    """``BinaryMapper``."""

    bits: int = flag(1, 'Bits of a code.', low=1, high=24)
    kl_loss_threshold: float = flag(0.69, 'Nats that a code may carry for free.', low=0.0)
