"""The options of calls of objectives, declared like flags: a kind, a range, a parent, a sentence.

Lengths, temperatures, end tokens, filters and lengths of prompts are checked where they are used, alike for all that write.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Generator, Tensor, nn

from x_transformers.flags.base import flag
from x_transformers.flags.objectives import CRITIC, OF_NET, Options
from x_transformers.flags.rule import Rule
from x_transformers.helpers import identity
from x_transformers.tensor_types import Float


@dataclass(frozen=True, kw_only=True, repr=False)
class DrawingOptions(Options):
    generator: Generator | None = flag(None, 'Makes what is drawn reproducible.')


@dataclass(frozen=True, kw_only=True, repr=False)
class WritingOptions(DrawingOptions):
    """Also ``XLAutoregressiveWrapper.generate``, as it is."""

    include_prompt: bool = flag(False, 'Return the prompt in front of what is new.')


@dataclass(frozen=True, kw_only=True, repr=False)
class CachedWritingOptions(WritingOptions):
    """Also ``XValAutoregressiveWrapper.generate``, as it is."""

    cache_kv: bool = flag(True, 'Remember keys and values, if the net can.')


# ---------------------------------------------------------------- language models


@dataclass(frozen=True, kw_only=True, repr=False)
class GenerationOptions(CachedWritingOptions):
    """The call ``AutoregressiveWrapper.generate``."""

    restrict_to_max_seq_len: bool = flag(True, 'Show the net only its last max_seq_len tokens.')
    amateur_model: Any = flag(None, 'Models for contrastive decoding.')
    contrastive_decode_kwargs: Mapping[str, Any] | Sequence[Any] | None = flag(
        {'alpha': 0.1, 'beta': 0.5}, 'alpha and beta for each of them.', parent='amateur_model'
    )
    draft_model: nn.Module | None = flag(None, 'A smaller model that guesses.')
    prompt_lookup: int | None = flag(None, 'Guess what followed so many tokens before.', low=1)
    self_speculative: bool = flag(False, 'Guess with the heads for later tokens.')
    lookahead: int = flag(4, 'Guesses at a time.', parent=('draft_model', 'prompt_lookup', 'self_speculative'), low=1)
    filter_kwargs: Mapping[str, Any] | None = flag(None, 'Keywords of the filter.')
    stream: bool = flag(False, 'Return an iterator over single tokens.')
    compile: bool = flag(False, 'Read with one compiled program.')
    return_intermediates: bool = flag(False, "Return the net's intermediates, too.")
    RULES = (
        Rule(
            ('filter_kwargs', 'amateur_model'),
            lambda given, _: given.amateur_model is not None and bool(given.filter_kwargs),
            'contrastive decoding has a cutoff of its own, and no filter',
            {'filter_kwargs': {'k': 3}, 'amateur_model': object()},
            inert=True,
        ),
        Rule(
            ('include_prompt', 'stream'),
            lambda given, _: given.include_prompt and given.stream,
            'an iterator is over new tokens only',
            {'include_prompt': True, 'stream': True},
            inert=True,
        ),
    )


@dataclass(frozen=True, kw_only=True, repr=False)
class BeamOptions(CachedWritingOptions):
    """The call ``AutoregressiveWrapper.beam_search``."""

    beams: int = flag(4, 'How many hypotheses are kept.', low=1)
    return_beams_and_scores: bool = flag(False, 'Return all of them and their scores.')
    stochastic: bool = flag(False, 'Draw the proposals.')
    temperature: float | Tensor = flag(1.0, 'Of proposals that are drawn.', parent='stochastic')
    filter_logits_fn: str | Callable[..., Any] = flag(identity, 'Which proposals may be drawn.', parent='stochastic')
    filter_kwargs: Mapping[str, Any] | None = flag(None, 'Keywords of the filter of such proposals.', parent='stochastic')
    restrict_to_max_seq_len: bool = flag(True, 'Show the net only its last max_seq_len tokens.')
    length_penalty: float = flag(0.0, 'Scores are divided by the length to this power.')
    generator: Generator | None = flag(None, 'Makes what is drawn reproducible.', parent='stochastic')


@dataclass(frozen=True, kw_only=True, repr=False)
class LabelledOptions(Options):
    """The call of ``AutoregressiveWrapper`` with labels."""

    return_outputs: bool = flag(False, 'Return logits and intermediates, too.')
    labels: Tensor | None = flag(None, 'What is predicted, by the names of other packages.')
    num_items_in_batch: int | Tensor | None = flag(None, 'What the sum of the losses is divided by.', parent='labels')


@dataclass(frozen=True, kw_only=True, repr=False)
class XLForwardOptions(Options):
    dropout_mems: bool = flag(False, 'Memories are not read.')
    ttt_recurrent_steps: int = flag(1, 'How often each segment is read.', low=1)


def spreads(temperature: float | Float[Tensor, '...']) -> bool:
    """Whether a temperature asks for a spread of its own; 0 takes the mean, as any net does that draws nothing."""
    return (not isinstance(temperature, Tensor) or temperature.numel() == 1) and temperature not in (0.0, 1.0)


@dataclass(frozen=True, kw_only=True, repr=False)
class FramesOptions(CachedWritingOptions):
    """The call ``ContinuousAutoregressiveWrapper.generate``."""

    temperature: float | Tensor = flag(1.0, 'Factor on the deviation.', low=0.0)
    generator: Generator | None = flag(None, 'Makes what is drawn reproducible.', parent='probabilistic')
    probabilistic: bool = flag(False, OF_NET)
    RULES = (
        Rule(
            ('temperature',),
            lambda given, _: not given.probabilistic and spreads(given.temperature),
            'nothing is drawn by a net without probabilistic=True',
            {'temperature': 0.5},
            'Leave it out.',
            inert=True,
        ),
    )


@dataclass(frozen=True, kw_only=True, repr=False)
class FramesForwardOptions(Options):
    rollout_steps: int = flag(1, 'With more than one, the net goes on from its own predictions.', low=1)


@dataclass(frozen=True, kw_only=True, repr=False)
class RolloutOptions(Options):
    rollout_steps: int = flag(2, 'Predictions, each of which is fed back.', low=2)


# ---------------------------------------------------------------- other objectives


@dataclass(frozen=True, kw_only=True, repr=False)
class MaskedForwardOptions(Options):
    only_train_generator: bool = flag(False, 'No loss of the critic.')
    only_train_critic: bool = flag(False, 'No loss of the generator.')
    generator_sample_temperature: float | None = flag(None, 'Of what the critic is shown.', low=0.0)


@dataclass(frozen=True, kw_only=True, repr=False)
class MaskedGenerateOptions(DrawingOptions):
    """The call ``NonAutoregressiveWrapper.generate``."""

    batch_size: int | None = flag(None, 'How many sequences.', low=1)
    start_temperature: float | Tensor = flag(1.0, 'Of the first round.', low=0.0)
    filter_thres: float | None = flag(0.7, 'The share of the vocabulary that is never sampled.', low=0.0, below=1.0)
    noise_level_scale: float = flag(1.0, 'Noise on what the critic says.', parent=CRITIC)
    token_critic: nn.Module | None = flag(None, OF_NET)
    self_token_critic: bool = flag(False, OF_NET)


@dataclass(frozen=True, kw_only=True, repr=False)
class BlockGenerateOptions(CachedWritingOptions):
    """The call ``BlockDiffusionWrapper.generate``."""

    steps: int | None = flag(None, 'Rounds for a block.', low=1)


@dataclass(frozen=True, kw_only=True, repr=False)
class BeliefGenerateOptions(CachedWritingOptions):
    """The call ``BeliefStateWrapper.generate_with_suffix_cond``."""

    cache_kv: bool = flag(False, 'Remember keys and values, if the decoder can.')
    decode_backwards: bool = flag(False, 'Write what stands before the prompts.')


@dataclass(frozen=True, kw_only=True, repr=False)
class FreeGenerateOptions(WritingOptions):
    """The call ``FreeTransformer.generate``."""

    include_prompt: bool = flag(True, 'Return the prompt in front of what is new.')
    use_kv_cache: bool = flag(True, 'Feed only new tokens.')


@dataclass(frozen=True, kw_only=True, repr=False)
class LatentsOptions(Options):
    """The call ``FreeTransformer.encode_to_latents``."""

    return_kl_loss: bool = flag(False, 'Return the divergence, too.')
    per_token_latents: bool | None = flag(None, 'A code for each token.')


@dataclass(frozen=True, kw_only=True, repr=False)
class BitsForwardOptions(Options):
    """The call of ``BinaryMapper``."""

    temperature: float | Tensor = flag(1.0, 'Of the bits that are drawn.', above=0.0)
    straight_through: bool | None = flag(None, 'Gradients reach the logits.')
    calc_aux_loss: bool | None = flag(None, 'Compute the divergence.')


@dataclass(frozen=True, kw_only=True, repr=False)
class PosteriorOptions(DrawingOptions):
    """The call ``GPTVAE.encode_to_latents``."""

    return_mean_log_var: bool = flag(False, 'Return what latents are drawn from, too.')


@dataclass(frozen=True, kw_only=True, repr=False)
class MachineGenerateOptions(DrawingOptions):
    """The call ``SyntheticDataGenerator.generate``."""


@dataclass(frozen=True, kw_only=True, repr=False)
class BandwidthGenerateOptions(WritingOptions):
    """The call ``FullBandwidth.generate``."""

    process_prompt: bool = flag(True, 'Read the prompt with feedback.')
    temporal_parallel_passes: int | None = flag(None, 'Passes over the prompt.', parent='process_prompt', low=1)
    should_fuse_latent: Callable[..., Any] | None = flag(None, 'Whether a new token is given what the last one knew.')


@dataclass(frozen=True, kw_only=True, repr=False)
class CandidatesForwardOptions(Options):
    """The call of ``XMLatentDecoder``."""

    return_loss: bool = flag(True, 'The loss of the winners.')
    active_latent_index: int | None = flag(None, 'The slot in which candidates differ.')


@dataclass(frozen=True, kw_only=True, repr=False)
class CandidatesGenerateOptions(Options):
    """The call ``XMLatentDecoder.generate_with_candidate_latents``."""

    winner_fn: Callable[..., Any] | None = flag(None, 'Chooses among candidates.')
    winner_fns: Sequence[Any] | None = flag(None, 'One for each slot.')
    active_latent_index: int | None = flag(None, 'Choose this slot only.')
    return_best_latents: bool = flag(False, 'Return the latents, too.')
    net_kwargs: Mapping[str, Any] | None = flag(None, 'Keywords for the net while candidates are compared.')
    RULES = (
        Rule(
            ('winner_fn', 'winner_fns'),
            lambda given, _: given.winner_fn is not None and given.winner_fns is not None,
            'each slot has a function of its own',
            {'winner_fn': min, 'winner_fns': [min]},
            inert=True,
        ),
    )


@dataclass(frozen=True, kw_only=True, repr=False)
class EncodeOptions(Options):
    """The call ``ContinuousTransformerAutoencoder.encode``."""

    return_aux_loss: bool = flag(False, "Return the bottleneck's loss, too.")
    return_unreduced_loss: bool = flag(False, 'One loss per row.', parent='return_aux_loss')


@dataclass(frozen=True, kw_only=True, repr=False)
class CutOptions(Options):
    """The call of ``EntropyBasedTokenizer``."""

    return_segmented_seq: bool = flag(False, 'Return the segments themselves.')
    decoder_forward_kwargs: Mapping[str, Any] | None = flag(None, 'Keywords of the decoder.')


@dataclass(frozen=True, kw_only=True, repr=False)
class MixOptions(Options):
    """The call ``Recirculation.mix``."""

    step: int = flag(0, 'How many tokens came before.', low=0)


@dataclass(frozen=True, kw_only=True, repr=False)
class LearnOptions(Options):
    """The call ``Recirculation.learn_parameters``."""

    steps: int = flag(100, 'Steps of training.', low=1)
    lr: float = flag(1e-3, 'Step size.', above=0.0)
    ignore_index: int = flag(-100, 'Targets left out of the loss.')


@dataclass(frozen=True, kw_only=True, repr=False)
class FitOptions(Options):
    """The call ``TPREncoder.fit``."""

    steps: int = flag(2000, 'Steps of training.', low=1)
    batch_size: int = flag(1024, 'Rows of each.', low=1)
    lr: float = flag(3e-3, 'Step size.', above=0.0)
