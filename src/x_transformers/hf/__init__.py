"""Import and export of published weights in the Hugging Face format.

``transformers`` itself is not needed: folders with ``config.json`` and safetensors files are read and written directly.
"""

from __future__ import annotations

from x_transformers.hf.convert import explain, from_hf, keywords, to_hf

__all__ = ['explain', 'from_hf', 'keywords', 'to_hf']
