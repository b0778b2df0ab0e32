"""The parameters of objectives, declared like flags: a kind, a range, a parent, a sentence.

Constructors and calls keep their own signatures, as they take parameters by position, too; ``options`` checks what they were
given against the fields here. A field that says "Of the net" is no parameter: others depend on it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from x_transformers.flags.base import FlagError, Flags, flag
from x_transformers.flags.rule import Rule, broken_rules, orphans, out_of_range
from x_transformers.notices import warn_inert, written

OF_NET = 'Of the net.'


@dataclass(frozen=True, kw_only=True, repr=False)
class Options(Flags):
    """Base of the parameters of one constructor or of one call."""

    RULES: ClassVar[tuple[Rule, ...]] = ()


def options(kind: type[Options], where: str, given: Mapping[str, Any]) -> None:
    """Check parameters: one error for all that cannot be, one warning for all that do nothing.

    ``given`` may hold more than the parameters of ``kind``, such as ``locals()`` of a constructor. In a program that is being
    compiled nothing is checked; there ``given`` must be a dictionary, as the compiler cannot read ``locals()`` where a function
    inside shares a variable.
    """
    if torch.compiler.is_compiling():
        return
    own = {name: given[name] for name in kind.flag_fields() if name in given}
    fitting: dict[str, Any] = {}
    wrong: list[str] = []
    for name, value in own.items():
        read, complaints = kind.read({name: value}, where=where)
        wrong += complaints
        fitting |= {} if complaints else read
    parsed = kind(**fitting)
    wrong += [*out_of_range(parsed, written).values(), *broken_rules(kind.RULES, parsed, 0, written)]
    if wrong:
        raise FlagError(*(sentence if sentence.startswith(where) else f'{where}: {sentence}' for sentence in wrong))
    warn_inert(where, [*orphans(parsed, written), *broken_rules(kind.RULES, parsed, 0, written, inert=True)])


def share(default: float, says: str, **more: Any) -> Any:
    return flag(default, says, low=0.0, high=1.0, **more)


def ignored_targets() -> Any:
    return flag(-100, 'Targets left out of the loss.')


def in_place_of_ignored() -> Any:
    return flag(0, 'The id that stands for them in the input.')


def future() -> Any:
    return flag(False, 'Train nets that see what they are to predict.')


# ---------------------------------------------------------------- language models


@dataclass(frozen=True, kw_only=True, repr=False)
class AutoregressiveOptions(Options):
    ignore_index: int = ignored_targets()
    pad_value: int = in_place_of_ignored()
    mask_prob: float = flag(0.0, 'Share of the tokens that nobody may attend to.', low=0.0, below=1.0)
    add_attn_z_loss: bool = flag(
        False, 'Add the z-loss of the attention.',
        refused={
            'tensor': 'it reads the attention maps of all heads',
            'context': 'it is a mean over the whole sequence',
            'pipeline': 'it reads the attention maps of all layers',
        },
    )  # fmt: skip
    next_embed_loss_weight: float = flag(
        0.1, 'Weight of the loss on the next embedding.', parent='add_continuous_pred_head'
    )  # fmt: skip
    multi_token_loss_weight: float = flag(
        1.0, 'Weight of the loss of each head for a later token.', parent='multi_token_heads', low=0.0
    )  # fmt: skip
    looped_loss_threshold_exit: float = flag(0.05, 'Gates open where a step gains less.', parent='looped')
    looped_loss_slope: float = flag(50.0, 'How surely.', parent='looped', above=0.0)
    looped_exit_loss_weight: float = flag(1.0, 'Weight of the loss of the gates.', parent='looped', low=0.0)
    looped: bool = flag(False, OF_NET)
    multi_token_heads: int = flag(1, OF_NET)
    allow_future: bool = future()
    add_continuous_pred_head: bool = flag(False, OF_NET)


FAST = ('ttt_module_paths', 'ttt_low_rank_paths')


@dataclass(frozen=True, kw_only=True, repr=False)
class XLOptions(Options):
    ignore_index: int = ignored_targets()
    pad_value: int = in_place_of_ignored()
    weight_by_valid: bool = flag(False, 'Weigh segments by the targets that count.')
    allow_future: bool = future()
    max_seq_len: int = flag(1, OF_NET + ' The length of a segment.', low=1)
    tbptt_steps: int = flag(1, 'Gradients reach back over this many segments.', low=1)
    ttt_module_paths: Sequence[Any] = flag((), 'Modules that are trained while the sequence is read.')
    ttt_low_rank_paths: Sequence[Any] = flag((), 'Linear maps of which a low-rank part is.')
    ttt_lr: float = flag(1e-3, 'Step size of an update.', parent=FAST, low=0.0)
    ttt_wd: float = flag(0.01, 'Weight decay.', parent=FAST, low=0.0)
    ttt_use_muon: bool = flag(False, 'Orthogonalize gradients of matrices.')
    ttt_muon_steps: int = flag(5, 'Iterations of that.', parent='ttt_use_muon', low=1)
    ttt_muon_lr: float = flag(1e-2, 'The step size of matrices.', parent='ttt_use_muon', low=0.0)
    ttt_custom_loss_module: nn.Module | None = flag(None, 'What is trained on.')
    ttt_next_latent_loss: bool = flag(False, 'Train on predicting the next hidden state.')
    episodic_mem_len: int = flag(0, 'Learned keys and values for each self attention.', low=0)
    ttt_low_rank_replaces: bool = flag(False, 'The low-rank part stands alone.', parent='ttt_low_rank_paths')


@dataclass(frozen=True, kw_only=True, repr=False)
class XValOptions(Options):
    ignore_index: int = ignored_targets()
    pad_value: int = in_place_of_ignored()
    numerical_loss_weight: float = flag(1.0, 'Weight of the squared error of the numbers.')
    allow_future: bool = future()


@dataclass(frozen=True, kw_only=True, repr=False)
class ContinuousOptions(Options):
    loss_fn: Callable[..., Any] | None = flag(None, 'From predictions and targets to unreduced losses.')
    use_l1_loss: bool = flag(False, 'The absolute error.')
    equal_loss_weight_batch: bool = flag(False, 'Every row weighs the same.')
    mask_by_target: bool = flag(False, 'A position counts if what it predicts is no padding.')
    allow_future: bool = future()
    probabilistic: bool = flag(False, OF_NET)
    RULES = (
        Rule(
            ('use_l1_loss', 'loss_fn', 'probabilistic'),
            lambda given, _: given.use_l1_loss and (given.loss_fn is not None or given.probabilistic),
            'there is one loss, and a net with probabilistic=True has the Gaussian likelihood',
            {'use_l1_loss': True, 'probabilistic': True},
            only_changed=True,
        ),
    )


@dataclass(frozen=True, kw_only=True, repr=False)
class XTransformerOptions(Options):
    dim: int = flag(1, 'Width of encoder and decoder.', low=1)
    tie_token_emb: bool = flag(False, "The decoder uses the encoder's token embedding.")
    ignore_index: int = ignored_targets()
    pad_value: int = in_place_of_ignored()
    cross_attn_tokens_dropout: float = flag(0.0, 'Part of the source that training does not show.', low=0.0, below=1.0)


# ---------------------------------------------------------------- other objectives

CRITIC = ('token_critic', 'self_token_critic')


@dataclass(frozen=True, kw_only=True, repr=False)
class MaskedOptions(Options):
    """``NonAutoregressiveWrapper``."""

    mask_id: int = flag(0, 'The token that stands for a hidden one.', low=0)
    steps: int = flag(18, 'Rounds of generation.', low=1)
    self_cond: bool = flag(False, 'Condition on the embeddings of the previous round.')
    self_cond_train_prob: float = share(0.75, 'How often so in training.', parent='self_cond')
    no_replace_prob: float = share(0.15, 'Share of the chosen positions that are left as they are.')
    random_token_prob: float = share(0.1, 'Share of the chosen positions that get a random token.')
    schedule: str | Callable[..., Any] = flag('linear', 'The share that is hidden, by the time.')
    can_mask_prev_unmasked: bool = flag(False, 'Hide what was accepted again.')
    token_critic: nn.Module | None = flag(None, 'A net that judges tokens.')
    self_token_critic: bool = flag(False, 'The generator is the critic.')
    critic_loss_weight: float = flag(1.0, "Weight of the critic's loss.", parent=CRITIC)
    use_simple_mdlm_loss_weight: bool = flag(True, 'Weight of masked diffusion.')
    mdlm_weight_of_the_original: bool = flag(
        False, 'The weight of the original, which is negative.', parent='use_simple_mdlm_loss_weight'
    )
    critic_sees_masked_only: bool = flag(True, 'Only what was filled in can be unreal.', parent=CRITIC)
    RULES = (
        Rule(
            CRITIC,
            lambda given, _: given.token_critic is not None and given.self_token_critic,
            'there is one critic',
            {'token_critic': nn.Identity(), 'self_token_critic': True},
        ),
    )


@dataclass(frozen=True, kw_only=True, repr=False)
class BlockDiffusionOptions(Options):
    """``BlockDiffusionWrapper``."""

    mask_id: int = flag(0, 'The token that stands for a hidden one.', low=0)
    block_size: int = flag(8, 'Tokens of a block.', low=1)
    time_low: float = flag(1e-3, 'The smallest share of a block that is hidden.', above=0.0, high=1.0)
    time_high: float = share(1.0, 'The largest share.')
    RULES = (
        Rule(
            ('time_low', 'time_high'),
            lambda given, _: given.time_low >= given.time_high,
            'shares are drawn from between them',
            {'time_low': 0.8, 'time_high': 0.3},
            'Choose a smaller [time_low].',
        ),
    )


@dataclass(frozen=True, kw_only=True, repr=False)
class BeliefStateOptions(Options):
    train_frac_forward_backward_pairs: float = flag(1.0, 'Share of the pairs that are trained on.', above=0.0, high=1.0)
    backward_ar_loss_weight: float = flag(1.0, 'Weight of predicting the previous token.')
    pred_distance: bool = flag(False, 'Predict how far apart prefix and suffix are.')
    pred_distance_loss_weight: float = flag(1.0, 'Weight of that loss.', parent='pred_distance')
    cond_on_distance: bool = flag(False, 'Tell the head that distance.')
    cond_on_distance_prob: float = flag(
        0.5, 'In this share of the training steps.', parent='cond_on_distance', above=0.0, below=1.0
    )
    max_pred_distance: int | None = flag(
        None, 'The largest distance.', parent=('pred_distance', 'cond_on_distance'), low=1
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True, repr=False)
class DPOOptions(Options):
    beta: float = flag(0.1, 'How strongly the policy is held to the reference.', above=0.0)
    pad_id: int | None = flag(None, 'Everything but this id is text.')
    select_by_target: bool = flag(False, 'Count log-probabilities of response tokens.')
    reduction: str = flag('mean', 'Over the tokens of a response.', among=('mean', 'sum'))
    allow_future: bool = future()


@dataclass(frozen=True, kw_only=True, repr=False)
class FreeTransformerOptions(Options):
    num_tokens: int = flag(1, 'Size of the vocabulary.', low=1)
    dim: int = flag(1, 'Width.', low=1)
    dec_head_depth: int = flag(0, 'Layers before the latent enters.', low=0)
    dec_tail_depth: int = flag(1, 'Layers behind it.', low=1)
    enc_depth: int = flag(1, 'Layers that find the latent.', low=1)
    max_seq_len: int = flag(1, 'Kept for callers that read it.')
    dim_latent: int | None = flag(None, 'Kept for callers that pass it.')
    binary_mapper_kwargs: Mapping[str, Any] | None = flag(None, 'Keywords of the codes.')
    enc_kwargs: Mapping[str, Any] | None = flag(None, 'Keywords of the encoder.')
    dec_kwargs: Mapping[str, Any] | None = flag(None, 'Keywords of the decoders.')
    latent_bits: int = flag(16, 'Bits of a code.', low=1, high=24)
    per_token_latents: bool = flag(True, 'A code for each token.')
    kl_loss_threshold: float = flag(0.69, 'Nats that a code may carry for free.', low=0.0)
    kl_loss_weight: float = flag(1.0, 'Weight of what it carries beyond.')
    latent_dropout_prob: float = share(0.0, 'Dropout on the code.')
    pad_id: int = flag(-1, 'Targets to ignore.')
    RULES = (
        Rule(
            ('dim_latent',),
            lambda given, _: given.dim_latent is not None,
            'a code has 2 ** `latent_bits` entries, whatever this says',
            {'dim_latent': 3},
            'Leave it out.',
            inert=True,
        ),
    )


@dataclass(frozen=True, kw_only=True, repr=False)
class GPTVAEOptions(Options):
    num_tokens: int = flag(1, 'Size of the vocabulary.', low=1)
    dim: int = flag(1, 'Width.', low=1)
    depth: int = flag(1, 'Layers of the decoder.', low=1)
    enc_depth: int = flag(1, 'Layers of the encoder.', low=1)
    max_seq_len: int = flag(1, 'Longest sequence.', low=0)
    dim_latent: int | None = flag(None, 'Width of the latent.', low=1)
    enc_kwargs: Mapping[str, Any] | None = flag(None, 'Keywords of the encoder.')
    dec_kwargs: Mapping[str, Any] | None = flag(None, 'Keywords of the decoder.')
    vae_kl_loss_weight: float = flag(1.0, 'Weight of the divergence.')
    vae_kl_div_floor: float = flag(0.0, 'What a latent dimension may cost for free.')
    latents_dropout_prob: float = share(0.5, 'Share of rows that must do without their prefix.')
    pad_id: int = flag(-1, 'Targets to ignore.')
    encoder: nn.Module | None = flag(None, 'A module in place of the default one.')
    RULES = (
        Rule(
            ('enc_kwargs', 'encoder'),
            lambda given, _: given.encoder is not None and bool(given.enc_kwargs),
            'they are for the default encoder',
            {'enc_kwargs': {'use_rmsnorm': True}, 'encoder': nn.Identity()},
            inert=True,
        ),
    )


@dataclass(frozen=True, kw_only=True, repr=False)
class NeoMLPOptions(Options):
    dim_in: int = flag(1, 'Input neurons.', low=1)
    dim_hidden: int = flag(1, 'Hidden neurons.', low=1)
    dim_out: int = flag(1, 'Output neurons.', low=1)
    dim_model: int = flag(1, "Width of a neuron's token.", low=1)
    depth: int = flag(1, 'Layers.', low=1)
    encoder_kwargs: Mapping[str, Any] | None = flag(None, 'Keywords of the encoder.')


@dataclass(frozen=True, kw_only=True, repr=False)
class TokenizerOptions(Options):
    """``EntropyBasedTokenizer``."""

    entropy_threshold: float = flag(0.0, 'A position with at least this entropy closes a segment.')
    max_token_size: int | None = flag(None, 'No segment is longer.', low=1)
    accumulate_entropy: bool = flag(False, 'Entropies add up until a segment is closed.')
    ignore_entropy_below: float = flag(0.0, 'Smaller entropies do not add up.')


@dataclass(frozen=True, kw_only=True, repr=False)
class MachineOptions(Options):
    """``SyntheticDataGenerator``."""

    dim: int = flag(1, 'Width of the embedding.', low=1)
    num_tokens: int = flag(1, 'Size of the vocabulary.', low=1)
    max_seq_len: int = flag(512, 'The most that is returned.', low=1)
    hidden_size: int | None = flag(None, 'Of the recurrent network.', low=1)
    use_gru: bool = flag(False, 'A GRU.')
    network_klass: Any = flag(None, 'Another recurrent class.')
    rescale_recurrent: bool = flag(False, 'Scale recurrent weights, too.')
    RULES = (
        Rule(
            ('use_gru', 'network_klass'),
            lambda given, _: given.use_gru and given.network_klass is not None,
            'your own class takes the place of the GRU',
            {'use_gru': True, 'network_klass': nn.RNN},
            inert=True,
        ),
    )


@dataclass(frozen=True, kw_only=True, repr=False)
class PretrainOptions(Options):
    """``UniversalPretrainWrapper``."""

    buffer_size: int = flag(640, 'Rows of the buffer.', low=1)
    num_reset: int = flag(20, 'Rows replaced by noise at each step.', low=0)
    batch_size: int = flag(32, 'Rows of a batch.', low=1)
    seq_len: int = flag(512, 'Their length.', low=2)
    seed_length: int = flag(8, 'Length of a seed.', low=1)
    reset_turing_machine_every: int = flag(0, 'Draw another machine after so many steps.', low=0)
    keep_buffer_on_cpu: bool = flag(False, 'The buffer is not saved.')
    allow_future: bool = future()
    RULES = (
        Rule(
            ('buffer_size', 'batch_size'),
            lambda given, _: given.buffer_size <= given.batch_size,
            'the buffer must be larger than a batch',
            {'buffer_size': 4, 'batch_size': 8},
            'Choose a larger one.',
        ),
        Rule(
            ('num_reset', 'buffer_size'),
            lambda given, _: given.num_reset % 2 != 0 or given.num_reset > given.buffer_size,
            'half of these rows are noise and half constant, so the number must be even, and at most that of the buffer',
            {'num_reset': 3},
            'Choose an even number.',
        ),
        Rule(
            ('seed_length', 'seq_len'),
            lambda given, _: given.seed_length >= given.seq_len,
            'a seed is cut out of a sequence',
            {'seed_length': 512},
            'Choose a smaller one.',
        ),
    )
