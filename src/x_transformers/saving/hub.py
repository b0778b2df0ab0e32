"""The Hugging Face Hub: download models and upload them as folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from x_transformers.saving.errors import FolderError
from x_transformers.saving.folder import card
from x_transformers.saving.made import Made
from x_transformers.saving.plain import to_plain

EXTRA = "this needs huggingface_hub: pip install 'x-transformers[hf]'."


def fetched(folder: str | Path) -> Path:
    """A folder as it is; a name such as ``owner/model``, which is no folder here, from the Hub."""
    path = Path(folder)
    parts = str(folder).split('/')
    is_name = isinstance(folder, str) and len(parts) == 2 and all(parts) and parts[0] not in ('.', '..', '~')
    if path.exists() or not is_name:
        return path
    try:
        from huggingface_hub import snapshot_download
    except ModuleNotFoundError:
        raise FolderError(f'{folder} is no folder here; to fetch it from the Hub, {EXTRA}') from None
    patterns = ['*.json', '*.safetensors', '*.model', '*.txt']
    try:
        return Path(snapshot_download(str(folder), allow_patterns=patterns))
    except Exception as error:
        raise FolderError(f'{folder} is no folder here, and cannot be fetched from the Hub: {error}') from error


def push(model: Made, save: Callable[[Path], None], repo_id: str, **keywords: Any) -> str:
    """``save`` writes the model into a folder."""
    try:
        from huggingface_hub import ModelHubMixin
    except ModuleNotFoundError:
        raise FolderError(f'push_to_hub: {EXTRA}') from None

    class Pushed(ModelHubMixin):
        """The model as the mixin sees it: something that can be written into a folder."""

        def _save_pretrained(self, save_directory: Path) -> None:
            save(save_directory)

        def generate_model_card(self, *args: Any, **kwargs: Any) -> Any:
            from huggingface_hub import ModelCard

            return ModelCard(card(model, to_plain(model)))

    return str(Pushed().push_to_hub(repo_id, **keywords))
