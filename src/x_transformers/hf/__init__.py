"""Published weights, in and out: models in the format of the Hugging Face library become models of this one, and back.

``transformers`` itself is not needed: folders with ``config.json`` and safetensors files are read and written directly.
"""

from __future__ import annotations

from x_transformers.hf.convert import explain, from_hf, keywords, to_hf

__all__ = ['explain', 'from_hf', 'keywords', 'to_hf']
