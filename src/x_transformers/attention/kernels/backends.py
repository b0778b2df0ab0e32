"""The backends of torch's attention that may be used, by the names that ``sdp_kwargs`` takes."""

from __future__ import annotations

from collections.abc import Mapping

from x_transformers.flags.base import FlagError

BACKENDS = {
    'enable_flash': 'FLASH_ATTENTION',
    'enable_math': 'MATH',
    'enable_mem_efficient': 'EFFICIENT_ATTENTION',
    'enable_cudnn': 'CUDNN_ATTENTION',
}


def allowed_backends(sdp_kwargs: Mapping[str, bool]) -> tuple[str, ...] | None:
    """Names for torch's selector; None if all are allowed, so that nothing need be selected."""
    unknown = sorted(set(sdp_kwargs) - set(BACKENDS))
    if unknown:
        raise FlagError(f'sdp_kwargs must name some of {", ".join(BACKENDS)}, got {", ".join(unknown)}. Leave it out.')
    if all(sdp_kwargs.get(name, True) for name in BACKENDS):
        return None
    allowed = tuple(BACKENDS[name] for name, on in sdp_kwargs.items() if on)
    if not allowed:
        raise FlagError('sdp_kwargs must leave one backend on, got none. Leave at least enable_math on.')
    return allowed
