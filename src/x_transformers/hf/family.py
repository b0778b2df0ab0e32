"""The definition of a family of models: its configuration as keywords, and rules for the names of its weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from x_transformers.flags.base import FlagError
from x_transformers.hf.maps import SAME, Map

Plain = dict[str, Any]

# keys that say nothing about what a model in evaluation computes
SILENT = re.compile(
    r'(_name_or_path|architectures|model_type|transformers_version|torch_dtype|dtype|use_cache|initializer_\w+|\w*dropout\w*'
    r'|\w+_token_id|tokenizer_class|return_dict|output_\w+|id2label|label2id|num_labels|problem_type|chunk_size_feed_forward'
    r'|pretraining_tp|is_encoder_decoder|task_specific_params|use_return_dict|torchscript|\w*pdrop|router_aux_loss_coef'
    r'|attn_implementation|_attn_implementation\w*|gradient_checkpointing|auto_map|finetuning_task|bos|eos|pad|name|init_std'
    r'|\w*layerdrop|position_embedding_type_default|mlp_type_default|drop_path_rate|unsloth_\w+|prefix|pruned_heads)'
)

# kinds of the usual value, and what a value of another kind is told that it must be
KINDS: tuple[tuple[type | tuple[type, ...], str], ...] = (
    ((int, float), 'a number, or true or false'),
    (str, 'a word'),
    (Mapping, 'a table'),
    ((list, tuple), 'a list'),
)


class Config:
    """A config.json that is read key by key, so that what nobody has read can be told."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = dict(values)
        self.read: set[str] = set()
        self.wrong: list[str] = []
        # keys of which not every value is looked at
        self.unchecked: set[str] = set()

    @property
    def kind(self) -> str:
        return str(self.values.get('model_type'))

    @property
    def architecture(self) -> str:
        names = self.values.get('architectures') or ['']
        return names if isinstance(names, str) else str(names[0])

    def get(self, key: str, usual: Any = None) -> Any:
        self.read.add(key)
        value = self.values.get(key)
        if value is None:
            return usual
        if usual is None or isinstance(value, (Mapping, list, tuple)):
            self.unchecked.add(key)
        kind = next((name for kinds, name in KINDS if isinstance(usual, kinds) and not isinstance(value, kinds)), None)
        # sizes of images may be pairs
        if kind is None or (isinstance(value, (list, tuple)) and isinstance(usual, int)):
            return value
        self.wrong.append(f'`{key}` must be {kind}, got {value!r}')
        return usual

    def need(self, key: str) -> Any:
        """A size."""
        self.read.add(key)
        value = self.values.get(key)
        if isinstance(value, int) and value > 0:
            return value
        self.wrong.append(f'`{key}` is missing' if value is None else f'`{key}` must be a whole number above 0, got {value!r}')
        return 1

    def only(self, key: str, value: Any, missing: str, *others: Any) -> None:
        """``missing`` is what this library lacks for any other value of the key."""
        found = self.get(key, value)
        if found != value and found not in others:
            self.wrong.append(f'`{key}` is {found!r}: {missing}')

    def skip(self, *keys: str) -> None:
        """Keys that change nothing."""
        self.read.update(keys)

    def finish(self) -> None:
        """Raise FlagError for all keys that cannot be expressed, and for those that nobody knows."""
        for key, value in self.values.items():
            if key not in self.read and not SILENT.fullmatch(key) and value not in (None, False, [], {}):
                self.wrong.append(f'`{key}` is {value!r}, which this family does not know')
        if self.wrong:
            raise FlagError(*(f'{self.kind}: {what}.' for what in dict.fromkeys(self.wrong)))


@dataclass(frozen=True)
class KeyRule:
    """Names of theirs, names of ours and what happens between them. ``{i}`` is a layer's number, in ours as they count:
    ``{a}`` and ``{f}`` its attention and feed-forward, ``{s}``, ``{c}`` and ``{g}`` where there is cross attention, too."""

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    map: Map = SAME

    def at(self, layer: int) -> KeyRule:
        places = {'i': layer, 'a': 2 * layer, 'f': 2 * layer + 1, 's': 3 * layer, 'c': 3 * layer + 1, 'g': 3 * layer + 2}
        theirs = tuple(name.format(**places) for name in self.theirs)
        return KeyRule(theirs, tuple(name.format(**places) for name in self.ours), self.map)


def rule(theirs: str | tuple[str, ...], ours: str | tuple[str, ...], map: Map = SAME) -> KeyRule:
    return KeyRule((theirs,) if isinstance(theirs, str) else theirs, (ours,) if isinstance(ours, str) else ours, map)


def weight_and_bias(theirs: str, ours: str, map: Map = SAME, bias: bool | Map = True) -> list[KeyRule]:
    """Weight and bias of one linear map or norm."""
    rules = [rule(f'{theirs}.weight', f'{ours}.weight', map)]
    return rules if bias is False else [*rules, rule(f'{theirs}.bias', f'{ours}.bias', map if bias is True else bias)]


def layer_norm_rules(theirs: str, ours: str, bias: bool = True) -> list[KeyRule]:
    rules = [rule(f'{theirs}.weight', f'{ours}.gamma')]
    return [*rules, rule(f'{theirs}.bias', f'{ours}.beta')] if bias else rules


def for_layers(rules: Iterable[KeyRule], count: int) -> list[KeyRule]:
    """Each rule with a layer's number in it for every layer."""
    made = []
    for entry in rules:
        numbered = any('{' in name for name in (*entry.theirs, *entry.ours))
        made += [entry.at(layer) for layer in range(count)] if numbered else [entry]
    return made


@dataclass(frozen=True)
class Family:
    """``kinds``: the model_type of its configs. ``prefix``: what stands in front of the names in models with a head, and is
    missing in models without one. ``unused``: a pattern of names of theirs that ours have no use for."""

    kinds: tuple[str, ...]
    keywords: Callable[[Config], Plain]
    rules: Callable[[Config, Plain], list[KeyRule]]
    prefix: str = ''
    unused: str = ''
    exported_as: str = ''
    """The architecture of what is written, where only a part of a model is read."""
    config_of: Callable[[Plain], Plain] | None = None
    """A config for a model that was made here, from its keywords; it counts only if ``keywords`` leads back to them."""


# ---------------------------------------------------------------- what several families say alike


ACTIVATIONS: dict[str, Plain] = {
    'gelu': {},
    'silu': {'ff_swish': True},
    'swish': {'ff_swish': True},
    'relu': {'ff_custom_activation': 'relu'},
    'gelu_new': {'ff_custom_activation': 'gelu_tanh'},
    'gelu_pytorch_tanh': {'ff_custom_activation': 'gelu_tanh'},
    'gelu_fast': {'ff_custom_activation': 'gelu_tanh'},
    'quick_gelu': {'ff_custom_activation': 'quick_gelu'},
    'relu2': {'ff_relu_squared': True},
}
NAMES_OF_ACTIVATIONS = {
    'gelu': 'gelu',
    'silu': 'silu',
    'relu': 'relu',
    'gelu_new': 'gelu_tanh',
    'gelu_pytorch_tanh': 'gelu_tanh',
}


def activation_named(stack: Plain) -> str:
    """Their name of a stack's activation. Raises FlagError if there is none."""
    names = {name for made in ACTIVATIONS.values() for name in made}
    flags = {name: stack[name] for name in names if stack.get(name)}
    found = next((name for name, made in ACTIVATIONS.items() if made == flags), None)
    if found is None:
        raise FlagError(f'the activation must be one of {", ".join(ACTIVATIONS)}, got {flags}. Use one of these.')
    return found


BIASES: Plain = {'attn_qkv_bias': True, 'attn_out_bias': True}


def activation(config: Config, key: str, usual: str) -> Plain:
    name = config.get(key, usual)
    if name not in ACTIVATIONS:
        config.wrong.append(f'`{key}` is {name!r}: there is no flag for this activation, only for {", ".join(ACTIVATIONS)}')
        return {}
    return dict(ACTIVATIONS[name])


def layer_normed(
    config: Config, stack: str, *, dim: int, depth: int, heads: int, inner: int, act: tuple[str, str], eps: float, **more: Any
) -> Plain:
    """The keywords of a pre-norm stack of this class, with layer norms and plain feed-forwards, biases everywhere.

    ``inner``: the feed-forward's width; ``act``: the key of its activation, and the usual one; ``more``: changes to these.
    """
    return {
        'class': stack,
        'dim': dim,
        'depth': depth,
        'heads': heads,
        'attn_dim_head': dim // heads,
        **BIASES,
        'norm_add_unit_offset': False,
        'norm_bias': True,
        'norm_eps': eps,
        'ff_dim_inner': inner,
        **activation(config, *act),
        'verbose': False,
        **more,
    }


def rotary(config: Config, dim_head: int, kind: str | None = None, *, share: float | None = 1.0) -> Plain:
    """``rotary_theta``, ``rotary_scaling`` and ``rotary_emb_dim``.

    ``kind``: of layer, where kinds have settings of their own. ``share``: of a head's channels that turn, which a config of a
    family with None says itself.
    """
    given = dict(config.get('rope_parameters', {}))
    if kind is not None and isinstance(given.get(kind), Mapping):
        given = dict(given[kind])
    old = config.get('rope_scaling')
    if not given and old:
        if not isinstance(old, Mapping):
            config.wrong.append(f'`rope_scaling` must be a table, got {old!r}')
        given = dict(old) if isinstance(old, Mapping) else {}
    theta = given.pop('rope_theta', None) or config.get('rope_theta', 10000.0)
    config.skip('rope_theta', 'partial_rotary_factor', 'max_position_embeddings', 'original_max_position_embeddings')
    own = given.pop('partial_rotary_factor', None) or config.get('partial_rotary_factor')
    if share is not None and own not in (None, share):
        config.wrong.append(f'`partial_rotary_factor` is {own!r}: in this family it is {share}')
    channels = int(dim_head * (share or own or 1.0))
    if channels % 2 or channels < 2:
        part = '' if channels == dim_head else f' and `partial_rotary_factor` or `rotary_pct` {channels / dim_head:.3g}'
        config.wrong.append(
            f'`head_dim`, or `hidden_size` by heads, is {dim_head}{part}, so that {channels} channels turn: they turn in pairs'
        )
    name = given.pop('rope_type', None) or given.pop('type', None) or 'default'
    given.pop('type', None)
    made: Plain = {'rotary_theta': float(theta), 'rotary_emb_dim': channels}
    if name in ('default', 'mrope'):
        if name == 'mrope':
            config.wrong.append("`rope_type` is 'mrope': there are no positions of several axes")
        return made
    longest = config.get('max_position_embeddings')
    original = given.pop('original_max_position_embeddings', None) or config.get('original_max_position_embeddings') or longest
    if name not in ('linear', 'dynamic', 'yarn', 'llama3', 'longrope'):
        config.wrong.append(f'`rope_type` is {name!r}: rotary_scaling has linear, dynamic, yarn, llama3 and longrope')
        return made
    if name != 'linear':
        # this one counts from the longest sequence, whatever else is said
        given['original_length'] = longest if name == 'dynamic' else original
    if name == 'longrope' and given.get('factor') is None and longest:
        given['factor'] = max(longest / original, 1.0)
    made['rotary_scaling'] = {'type': name, **{key: value for key, value in given.items() if value is not None}}
    return made


def one_or_each(values: list[Any]) -> Any:
    """One value, if it is the same in all layers."""
    return values[0] if all(value == values[0] for value in values) else values


def rotary_by_kind(
    config: Config, dim_head: int, kinds: list[str], thetas: Mapping[str, tuple[str, float]], *, scaled: tuple[str, ...]
) -> Plain:
    """``rotary_theta`` and ``rotary_scaling`` of each layer, where kinds of layers have their own.

    ``thetas``: of each kind the key of its base in older configs, and its usual base; ``scaled``: the kinds that
    ``rope_scaling`` of an older config is about.
    """
    given = config.get('rope_parameters', {})
    by_kind = {}
    for kind, (key, usual) in thetas.items():
        made = rotary(config, dim_head, kind)
        own = given.get(kind)
        if not isinstance(own, Mapping) or own.get('rope_theta') is None:
            made['rotary_theta'] = float(config.get(key, usual))
        if kind not in scaled and not isinstance(own, Mapping):
            made.pop('rotary_scaling', None)
        by_kind[kind] = made
    of_layers = [by_kind.get(kind, {}) for kind in kinds]
    each = {name: one_or_each([made.get(name) for made in of_layers]) for name in ('rotary_theta', 'rotary_scaling')}
    return {**each, 'rotary_emb_dim': dim_head}


def check_head(config: Config, *heads: str) -> None:
    """``heads``: how the architectures end that are read, beside those without a head."""
    name = config.architecture
    if name and not headless(name) and not name.endswith(heads):
        config.wrong.append(f'`architectures` is {name}: models are read with the head of {" or ".join(heads)}, or with none')


def headless(architecture: str) -> bool:
    """Whether an architecture is a model without a head, by its name."""
    return architecture.endswith(('Model', 'Encoder')) and not architecture.endswith(('HeadModel', 'HeadsModel'))
