"""What a user gave wrongly is said in one grammar: ``NAME must …, got …. Do this.``"""

from __future__ import annotations

import ast
import textwrap
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / 'src/x_transformers'

# errors about values; those about files, folders and packages (CheckpointError, FolderError, …) say what was found there
ABOUT_VALUES = {
    'ValueError',
    'TypeError',
    'IndexError',
    'FlagError',
    'GenerateError',
    'MeshError',
    'MissingFlag',
    'UnknownFlag',
}
# sentences that are clearer otherwise, by some of their words
OTHERWISE = (
    'kernel cannot run this attention',  # followed by its reasons
    'not all processes can be reached',
    ' needs {names}',
    'no family has this model',
    'the config becomes flags that do not fit together',
    'the model differs from the config it came with',
    'there is no argument ',  # followed by the nearest names
    'has buffers that cannot be made again',
    'was made with unnamed arguments',
)


def text(node: ast.expr) -> str:
    """The words of a message, expressions in braces; empty if it is put together elsewhere."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ''
    if isinstance(node, ast.JoinedStr):
        return ''.join(
            part.value if isinstance(part, ast.Constant) else f'{{{ast.unparse(part.value)}}}'  # type: ignore[attr-defined]
            for part in node.values
        )
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return text(node.left) + text(node.right)
    return ''


def messages(source: str) -> Iterator[tuple[int, str]]:
    """(line, words) of every message about a value that stands where it is raised."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
            words = text(node.exc.args[0])
            # a name and a colon alone: the sentences come from elsewhere
            if ast.unparse(node.exc.func) in ABOUT_VALUES and words.rpartition(': ')[2] not in ('', '{wrong}'):
                yield node.lineno, words


def test_a_wrong_value_is_told_what_it_must_be() -> None:
    found = [
        (f'{path.relative_to(PACKAGE)}:{line}', words)
        for path in sorted(PACKAGE.rglob('*.py'))
        for line, words in messages(path.read_text(encoding='utf-8'))
    ]
    assert len(found) > 400
    other = {where: words for where, words in found if ' must ' not in words}
    wrong = [f'{where}: {words}' for where, words in other.items() if not any(each in words for each in OTHERWISE)]
    assert not wrong, 'say `NAME must …, got …. Do this.`, or name the sentence in OTHERWISE'
    unused = [each for each in OTHERWISE if not any(each in words for words in other.values())]
    assert not unused, 'these sentences are gone'


def test_a_message_of_another_form_is_seen() -> None:
    source = """
        raise ValueError('x: ' + f'bad {x!r}' + ', really')
        raise FlagError(*wrong)
        raise OSError('no file')
    """
    assert list(messages(textwrap.dedent(source))) == [(2, 'x: bad {x}, really')]
