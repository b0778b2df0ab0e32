"""The definition of a flag, and the conversion of keywords to frozen flags.

A keyword of a constructor is declared once, as a field made by ``flag``: its default, one sentence, its paper, the flag it is a
sub-option of, the range of its values, and what it excludes. Signatures, the typed keywords for editors, docs/features.md and
the rules are made from the fields.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import json
import numbers
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import Any, Self, TypedDict, Union, Unpack, get_args, get_origin, get_type_hints

from x_transformers.flags.elsewhere import answer
from x_transformers.flags.plain import plain, value_from_plain
from x_transformers.notices import written

REQUIRED: Any = dataclasses.MISSING
"""The default of a flag that must be given."""


class FlagError(ValueError, AssertionError):
    """Flags that cannot be used: one sentence for each thing that is wrong."""

    def __init__(self, *sentences: str) -> None:
        super().__init__(*sentences)
        self.sentences = sentences

    def __str__(self) -> str:
        if len(self.sentences) == 1:
            return self.sentences[0]
        return '\n'.join((f'{len(self.sentences)} things are wrong with these flags:', *(f'- {s}' for s in self.sentences)))


class UnknownFlag(FlagError, TypeError):
    """A name that no flag has."""


class MissingFlag(FlagError, TypeError):
    """A flag without a default that was not given."""


# what else can be true of a flag; whoever acts on it asks the field, so that no list of names stands anywhere else
TRAITS = {
    'own_keys': 'keys must be made of the tokens of the queries: a call of Attention cannot give a context',
    'built_causal': 'it is built for a layer that is causal, or for one that is not: a call cannot choose',
    'needs_tokens': 'it chooses among keys, or runs over tokens: a sequence without tokens is refused',
    'row_order': 'it passes something from row to row, whatever positions and masks say; so do all that are self_only',
    'asked_for': 'a caller of the model asks for what it gives, which nobody does of a part of an encoder-decoder',
    'across_layers': 'it makes something for all layers together: they cannot be exchanged for those of another kind',
    'near_mems': 'it reads the rows directly in front, or counts them: padding cannot lie between memories and tokens',
    'no_cache': 'outputs of seen tokens depend on new ones, or on rows that no cache holds: a model cannot go on from one',
    'entering': 'it decides what enters a layer',
    'set_by_stack': 'a stack sets it on its attention layers, so that it has no name with a prefix there',
    'set_for_cross': 'so it does on cross attention',
    'no_blocks': 'it leaves no blocks in their own order: a call cannot repeat some',
    'of_logits': 'it acts on the logits, or makes them',
    'of_outputs': 'it makes other outputs than the embedding of each token, or another number of logits',
}


# groups of flags of which one can be on, and why
GROUPS = {
    'activation': 'there is one activation',
    'head': 'each is a way to make the logits',
    'layout': 'each lays out the layers in its own way',
    'norm': 'a stack has one kind of norm',
    'pool': 'each makes the output out of all tokens in its own way',
    'residual': 'each is a way to write a branch back to the residual',
    'weights': 'only one of them can be had',
}

# situations in which a flag may be refused, each with its reason at the field
SITUATIONS = {
    'tensor': 'heads and features are shared by processes',
    'sequence parallel': 'so are the rows between them',
    'context': 'each process has a slice of the sequence',
    'pipeline': 'each process has some of the layers',
    'per token': 'an objective reads a prediction for each token',
    'told nothing': 'a net is given nothing but tokens',
    'twice': 'each token stands in two rows, told apart by positions and a mask only',
}

Names = str | tuple[str, ...]
Why = str | tuple[str, str]
"""A reason; or a reason and the way out."""


class Said(TypedDict, total=False):
    """What a field says beside its default and its sentence.

    The last ones make rules (``rules_of`` in ``rule.py``). ``excludes``, ``idle_with`` and ``needs`` give, for a flag or
    several, the reason; and the way out, if it is not to leave out one of them. A group or a trait in the place of a name is
    all its flags.
    """

    paper: Names | None  # where the idea comes from
    parent: Names | None  # the flag, or flags of which one is enough, without which this one would do nothing
    low: float | None  # bounds of its value, both included
    high: float | None
    above: float | None  # bounds that are not included
    below: float | None
    among: tuple[Any, ...] | None  # all values that there are
    since: str  # the release of x-transformers that has it first, or 'here' for one that it never had
    self_only: bool  # it needs the order of one sequence, so that cross attention does not inherit it
    one_of: str | None  # a group of GROUPS
    traits: Names  # what else of TRAITS is true of it
    each: str | None  # of a stack's own: 'layer' if layers may differ in it, 'attention' if those with heads may, or 'mixer'
    often: bool  # the short help of the commands lists it
    formula: str | None  # what it computes, in a line
    family: str | None  # the heading of the documentation; a flag with a parent stands beside the parent
    excludes: Mapping[Names, Why]  # it cannot be on together with any of these
    idle_with: Mapping[Names, Why]  # together with any of these it does nothing, which a warning tells
    needs: Mapping[str, Why]  # it cannot be on without this one
    rules: tuple[Any, ...]  # each a Rule of ``rule.py``: what else it excludes
    alike: tuple[Any, ...]  # rules of stacks whose layers differ: what must be the same in all of them
    refused: Mapping[str, str | tuple[str, type]]  # in which of SITUATIONS, and why; values of that type are no matter
    example: Any  # a value that switches it on, where its default does not tell one


UNSAID: Said = {
    'paper': None, 'parent': None, 'low': None, 'high': None, 'above': None, 'below': None, 'among': None, 'since': '2.16.1',
    'self_only': False, 'one_of': None, 'traits': (), 'each': None, 'often': False, 'formula': None, 'family': None,
    'excludes': {}, 'idle_with': {}, 'needs': {}, 'rules': (), 'alike': (), 'refused': {}, 'example': None,
}  # fmt: skip


def flag(default: Any, says: str, **more: Unpack[Said]) -> Any:
    """One flag, as a dataclass field: its default, its sentence, and what else is to be said of it."""
    words = (
        ('traits', as_tuple(more.get('traits')), TRAITS),
        ('one_of', as_tuple(more.get('one_of')), GROUPS),
        ('refused', more.get('refused', ()), SITUATIONS),
    )
    for word, given, known in words:
        if unknown := set(given) - set(known):
            raise ValueError(
                f'{word} must be among {", ".join(known)}, got {", ".join(sorted(unknown))}. Describe new ones there.'
            )
    metadata = {**UNSAID, 'says': says, **more, 'traits': as_tuple(more.get('traits'))}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def as_tuple(value: str | tuple[str, ...] | None) -> tuple[str, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, str) else value


@cache
def _type_hints(cls: Any) -> dict[str, Any]:
    return get_type_hints(cls)


@cache
def _flag_fields(cls: Any) -> dict[str, dataclasses.Field[Any]]:
    fields = [field for field in dataclasses.fields(cls) if 'says' in field.metadata]
    # what 2.16.1 does not have stands behind what it has
    return {field.name: field for field in sorted(fields, key=lambda field: field.metadata['since'] != '2.16.1')}


def type_hints(cls: Any) -> dict[str, Any]:
    return _type_hints(cls)


def flag_fields(cls: Any) -> dict[str, dataclasses.Field[Any]]:
    return _flag_fields(cls)


def default_of(field: dataclasses.Field[Any]) -> Any:
    """A field's default; ``REQUIRED`` where there is none."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


# ---------------------------------------------------------------- kinds of values


def one_kind(kind: Any) -> tuple[str, Callable[[Any], bool]]:
    """(words for one kind of value, whether a value is of it)."""
    origin = get_origin(kind) or kind
    if origin is Any:
        return 'anything', lambda value: True
    if origin is bool:
        return 'True or False', lambda value: isinstance(value, bool)
    if origin is int:
        return 'a whole number', lambda value: isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if origin is float:
        # what is no number is not equal to itself
        return 'a number', lambda value: isinstance(value, numbers.Real) and not isinstance(value, bool) and value == value
    if origin is str:
        return 'a string', lambda value: isinstance(value, str)
    if origin is tuple:
        words, fits = one_kind(get_args(kind)[0])
        return f'a tuple (each entry {words})', lambda value: isinstance(value, tuple) and all(map(fits, value))
    if origin is Mapping:
        return 'a dictionary', lambda value: isinstance(value, Mapping)
    if origin is Sequence:
        return 'a list or a tuple', lambda value: isinstance(value, Sequence) and not isinstance(value, str)
    if origin is Callable:
        return 'a function or a module', callable
    if origin is types.NoneType:
        return 'None', lambda value: value is None
    if isinstance(origin, type):
        return f'a {origin.__module__.split(".")[0]} {origin.__name__}', lambda value: isinstance(value, origin)
    return 'anything', lambda value: True


def kinds_of(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def is_switch(value: Any) -> bool:
    """What Python and NumPy take for True or False: 0, 1 and NumPy's own."""
    of_numpy = type(value).__module__ == 'numpy' and type(value).__name__ in ('bool', 'bool_')
    return of_numpy or (isinstance(value, numbers.Integral) and value in (0, 1))


def tidied(value: Any, hint: Any) -> Any:
    """A list, or a string of letters, for a flag that takes a tuple becomes one; 0 and 1 are a switch that is off or on."""
    takes = [get_origin(kind) or kind for kind in kinds_of(hint)]
    if bool in takes and not {int, float} & set(takes) and is_switch(value):
        return bool(value)
    if tuple in takes and isinstance(value, (list, str)) and not (isinstance(value, str) and str in takes):
        return tuple(value)
    return value


def shown(value: Any) -> str:
    """A value in a sentence: short."""
    if isinstance(value, (bool, int, float, str, tuple, type(None))):
        return repr(value)
    if isinstance(value, Mapping):
        return repr(dict(value))
    return getattr(value, '__name__', type(value).__name__)


def is_part(flags: Flags, name: str, value: Any) -> bool:
    """Whether a flag is no setting but the module that is set."""
    return name in flags.flag_fields() and flags.default(name) is REQUIRED and hasattr(value, 'forward')


# ---------------------------------------------------------------- the base of all flags


class Flags:
    """Base of the flag classes, which are frozen dataclasses with keyword-only fields."""

    @classmethod
    def flag_fields(cls) -> dict[str, dataclasses.Field[Any]]:
        """The flags among the fields, by name, in the order of the signature."""
        return flag_fields(cls)

    @classmethod
    def self_only(cls) -> tuple[str, ...]:
        """The flags that need the order of one sequence, so that cross attention has none of them."""
        return tuple(name for name, field in cls.flag_fields().items() if field.metadata['self_only'])

    @classmethod
    def one_of(cls, group: str) -> tuple[str, ...]:
        """The flags of a group of which one can be on."""
        return tuple(name for name, field in cls.flag_fields().items() if field.metadata['one_of'] == group)

    @classmethod
    def having(cls, trait: str) -> tuple[str, ...]:
        """The flags of which this one of ``TRAITS`` is true."""
        return tuple(name for name, field in cls.flag_fields().items() if trait in field.metadata['traits'])

    @classmethod
    def switched_on(cls, name: str) -> dict[str, Any]:
        """Keywords that switch a flag on, with one that it is a sub-option of and those that it needs.

        None at all for a name that is no flag of this class.
        """
        values: dict[str, Any] = {}
        waiting = [name] if name in cls.flag_fields() else []
        while waiting:
            each = waiting.pop()
            metadata, default = cls.flag_fields()[each].metadata, default_of(cls.flag_fields()[each])
            values[each] = metadata['example']
            if values[each] is None and isinstance(default, bool):
                values[each] = not default
            elif values[each] is None:
                values[each] = default + 1 if isinstance(default, (int, float)) else max(2, metadata['low'] or 0)
            above = [*as_tuple(metadata['parent'])[:1], *metadata['needs']]
            waiting += [other for other in above if other not in values and other in cls.flag_fields()]
        return values

    @classmethod
    def elsewhere(cls) -> Mapping[str, str]:
        """Names that are keywords of another constructor, and of which."""
        return {}

    @classmethod
    def default(cls, name: str) -> Any:
        return default_of(cls.flag_fields()[name])

    @classmethod
    def parse(cls, keywords: Mapping[str, Any], *, where: str, prefix: str = '') -> Self:
        """Flags from keywords.

        Args:
            given: names (without ``prefix``) and values.
            where: who is asking, for the error's sentence: ``'Attention'``.
            prefix: what the user writes in front of each name: ``'attn_'``.

        Raises:
            UnknownFlag: naming all unknown names at once, each with the nearest known one.
            MissingFlag: a flag without a default is absent.
            FlagError: a value of the wrong kind.
        """
        unknown = [name for name in keywords if name not in cls.flag_fields()]
        if unknown:
            known = [prefix + name for name in cls.flag_fields()]
            raise unknown_flags([prefix + name for name in unknown], where=where, known=known, elsewhere=cls.elsewhere())
        cls.check_complete(keywords, where=where, prefix=prefix)
        values, wrong = cls.read(keywords, where=where, prefix=prefix)
        if wrong:
            raise FlagError(*wrong)
        return cls(**values)

    @classmethod
    def check_complete(cls, keywords: Mapping[str, Any], *, where: str, prefix: str = '') -> None:
        missing = [name for name, field in cls.flag_fields().items() if default_of(field) is REQUIRED and name not in keywords]
        if missing:
            names = ', '.join(f'`{written(prefix + name)}`' for name in missing)
            raise MissingFlag(f'{where} needs {names}.')

    @classmethod
    def by_position(cls, values: tuple[Any, ...], *, behind: str, where: str) -> dict[str, Any]:
        """Names for values that were given by position, behind the flag of that name, in the order of 2.16.1.

        Raises FlagError if there are more values than it had parameters.
        """
        names = [name for name, field in cls.flag_fields().items() if field.metadata['since'] == '2.16.1']
        names = names[names.index(behind) + 1 :]
        if len(values) > len(names):
            raise FlagError(
                f'{where}: at most {len(names)} values must be given by position behind `{behind}`, got {len(values)}. Name '
                'the others.'
            )
        return dict(zip(names, values, strict=False))

    @classmethod
    def read(cls, keywords: Mapping[str, Any], *, where: str, prefix: str = '') -> tuple[dict[str, Any], list[str]]:
        """(tidied values, a sentence for each value of the wrong kind)."""
        values: dict[str, Any] = {}
        wrong: list[str] = []
        for name, value in keywords.items():
            hint = type_hints(cls)[name]
            values[name] = tidied(value, hint)
            kinds = [one_kind(kind) for kind in kinds_of(hint)]
            if not any(fits(values[name]) for _, fits in kinds):
                wanted = ' or '.join(words for words, _ in kinds)
                wrong.append(
                    f'{where}: `{written(prefix + name)}` must be {wanted}, '
                    f'got {shown(value)} (of type {type(value).__name__}).'
                )
        return values, wrong

    @classmethod
    def signature(cls) -> inspect.Signature:
        """The constructor's keywords, in their documented order, with defaults."""
        hints = type_hints(cls)
        parameters = []
        for name, field in cls.flag_fields().items():
            default = default_of(field)
            parameters.append(
                inspect.Parameter(
                    name,
                    inspect.Parameter.KEYWORD_ONLY,
                    default=inspect.Parameter.empty if default is REQUIRED else default,
                    annotation=hints[name],
                )
            )
        return inspect.Signature(parameters)

    def changed(self) -> dict[str, Any]:
        """The flags whose value is not the default."""
        return {name: getattr(self, name) for name in self.flag_fields() if self.is_changed(name)}

    def keywords(self) -> dict[str, Any]:
        """The keywords from which ``parse`` makes these flags again."""
        return self.changed()

    def to_json(self) -> str:
        """The keywords as a JSON object, for ``from_json``. What has no default and is a module, ``attn_layers``, is left out.

        Raises FlagError naming every keyword that JSON cannot hold, such as a function.
        """
        wrong: list[str] = []
        held = {
            name: plain(value, f'{type(self).__name__}: {name}', wrong)
            for name, value in self.keywords().items()
            if not is_part(self, name, value)
        }
        if wrong:
            raise FlagError(*wrong)
        return json.dumps(held, indent=2)

    @classmethod
    def from_json(cls, text: str, **more: Any) -> Self:
        """The flags that ``to_json`` has written; ``more`` are laid over its keywords. Raises as ``parse``, and FlagError for
        what is no JSON object."""
        try:
            held = json.loads(text)
        except ValueError as error:
            raise FlagError(f'{cls.__name__}: `text` must be a JSON object of keywords, but cannot be read: {error}.') from None
        if not isinstance(held, dict):
            raise FlagError(f'{cls.__name__}: `text` must be a JSON object of keywords, got a {type(held).__name__}.')
        return cls.parse({name: value_from_plain(value) for name, value in held.items()} | more, where=cls.__name__)

    def is_changed(self, name: str) -> bool:
        value, usual = getattr(self, name), self.default(name)
        if (usual is None and isinstance(value, Mapping) and not value) or (value is None and isinstance(usual, Mapping)):
            # no keywords are the default of 2.16.1 where there is None here, and None stands for others
            return False
        return value is not usual and (isinstance(value, bool) != isinstance(usual, bool) or bool(value != usual))

    def __repr__(self) -> str:
        inside = ', '.join(f'{name}={shown(value)}' for name, value in self.changed().items())
        return f'{type(self).__name__}({inside})'


def unknown_flags(
    names: Iterable[str], *, where: str, known: Iterable[str], elsewhere: Mapping[str, str] | None = None
) -> UnknownFlag:
    """One error for all unknown names, each with the nearest known one. ``elsewhere``: whose keyword a name is, if not here."""
    known = list(known)
    sentences = []
    for name in names:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
        whose = (elsewhere or {}).get(name)
        owner = None if whose is None else f'it is a keyword of {whose}.'
        hint = answer(name, known) or owner or (f'did you mean `{near[0]}`?' if near else 'no flag has a similar name.')
        sentences.append(f'{where}: unrecognized kwargs: there is no flag `{name}`; {hint}')
    return UnknownFlag(*sentences)
