"""Hooks of the site generator: pages that are made from the code while the site is built, and links that leave docs/."""

from __future__ import annotations

import inspect
import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent

# files that lie above docs/ and become pages of the site
OUTER = {'CONTRIBUTING.md': 'contributing.md', 'CHANGELOG.md': 'changelog.md', 'README.md': 'readme.md'}


def api_page() -> str:
    """Every public class and function, with its docstring."""
    import x_transformers

    classes, functions = [], []
    for name in sorted(x_transformers.__all__, key=str.lower):
        value = getattr(x_transformers, name)
        (classes if inspect.isclass(value) else functions).append(name)
    lines = ['# API reference', '', 'Everything that `import x_transformers` offers. Keywords stand on the flag pages.']
    # what a call of Encoder, Decoder, PrefixDecoder and CrossAttender takes stands at the class that they share
    lines += ['', '## Stacks', '', '::: x_transformers.x_transformers.AttentionLayers']
    for title, names in (('Classes', classes), ('Functions and modules', functions)):
        lines += ['', f'## {title}']
        for name in names:
            if not inspect.ismodule(getattr(x_transformers, name)):
                lines += ['', f'::: x_transformers.{name}']
    return '\n'.join(lines) + '\n'


def on_files(files: Files, config: MkDocsConfig) -> Files:
    sys.path.insert(0, str(ROOT / 'tools'))  # the generator restores the path after it has loaded this file
    import explore
    import flag_pages

    for name, text in flag_pages.generated().items():
        files.append(File.generated(config, f'flags/{name}', content=text))
    files.append(File.generated(config, 'explore.md', content=explore.page()))
    files.append(File.generated(config, 'api.md', content=api_page()))
    for outer, inner in OUTER.items():
        files.append(File.generated(config, inner, content=(ROOT / outer).read_text(encoding='utf-8')))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links above docs/ lead to the copies on the site, or are shown as paths where the target is no page."""
    inner = page.file.src_uri in OUTER.values()
    folder = posixpath.dirname(page.file.src_uri)

    def link(found: re.Match[str]) -> str:
        label, target = found[1], found[2]
        path, _, anchor = target.partition('#')
        if inner:
            path = path.removeprefix('docs/') if path.startswith('docs/') else f'../{path}' if path else path
        whole = posixpath.normpath(posixpath.join(folder, path))
        if whole.startswith('../'):
            name = whole.removeprefix('../')
            if name not in OUTER:
                return f'`{name}`' if not label.startswith('!') else label
            path = posixpath.relpath(OUTER[name], folder or '.')
        return f'{label}({path}{"#" + anchor if anchor else ""})'

    return re.sub(r'(!?\[[^\]]*\])\((?!\w+://|mailto:|#)([^)\s]+)\)', link, markdown)
