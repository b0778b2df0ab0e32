"""Language models in model folders, for text generation."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from x_transformers.autoregressive_wrapper import AutoregressiveWrapper
from x_transformers.module import Module
from x_transformers.saving.folder import CONFIG, FORMAT
from x_transformers.saving.tensors import json_object


def is_model_folder(folder: Path) -> bool:
    """Whether ``save_pretrained`` or ``hf import`` has written it; a run folder is known by its training."""
    config = json_object(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    return config.get('format') == FORMAT and 'training' not in config


def language_model(folder: Path, device: torch.device | str) -> AutoregressiveWrapper:
    model: nn.Module = Module.from_pretrained(folder, device=device)
    return (model if isinstance(model, AutoregressiveWrapper) else AutoregressiveWrapper(model)).eval()
