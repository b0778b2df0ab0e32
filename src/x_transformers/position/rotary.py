"""Rotary positions: pairs of channels of queries and keys rotate by angles that grow with the position."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from x_transformers.flags.base import FlagError
from x_transformers.flags.rotary_scaling import BY_LENGTH, ScalingSettings
from x_transformers.module import ExactBuffers, last_rows
from x_transformers.position.rotary_scaling import attention_factor, length_scaled, scaled_frequencies
from x_transformers.tensor_types import Bool, Complex, Float, Int, Shaped


class RotaryEmbedding(ExactBuffers):
    """Angles of rotary positions, https://arxiv.org/abs/2104.09864.

    ``dim`` channels turn, neighbours together, the pair k by ``base ** (-2k / dim)`` a position. ``base_rescale_factor``
    stretches the slow pairs for longer sequences (NTK-aware scaling), ``interpolation_factor`` all of them
    (https://arxiv.org/abs/2306.15595). ``use_xpos`` adds a decay with distance (https://arxiv.org/abs/2212.10554).

    The decay is counted from the middle of the positions, which cancels out between queries and keys; where a query meets
    what is not turned (learned keys), or places of another sequence, ``centred=False`` keeps it from depending on the length.

    ``scaling`` changes the frequencies for longer sequences (see ``rotary_scaling``). ``layout``: which channels turn together,
    neighbours (``interleaved``) or the k-th of both halves (``halves``).

    forward: positions (n) or (b n) -> angles (1|b n dim), each twice, and the scale: 1.0, or with xpos (1|b n dim).
    Raises FlagError if ``interpolation_factor`` is less than 1 or ``dim`` less than 1.
    """

    exact_buffers = ('inv_freq', 'scale')
    # whether queries and keys that are all moved by as much meet as before
    by_distance = True
    inv_freq: Tensor
    scale: Tensor | None

    def __init__(
        self,
        dim: int,
        use_xpos: bool = False,
        scale_base: float = 512,
        interpolation_factor: float = 1.0,
        base: float = 10000,
        base_rescale_factor: float = 1.0,
        *,
        centred: bool = True,
        scaling: ScalingSettings | None = None,
        layout: str = 'interleaved',
    ) -> None:
        super().__init__()
        self.centred = centred
        self.scaling, self.layout = scaling, layout
        self.attention_factor = attention_factor(scaling)
        self.depends_on_length = scaling is not None and scaling['type'] in BY_LENGTH
        if interpolation_factor < 1.0:
            raise FlagError(
                f'interpolation_factor must be at least 1, as it shrinks the positions, got {interpolation_factor}. Give a '
                'larger one.'
            )
        if dim < 1:
            raise FlagError(f'rotary positions turn at least one pair of channels: dim must be at least 1, not {dim}')
        self.dim = dim
        # a single pair turns by 1 a position whatever the base; the exponent below would divide by zero
        self.base = base * base_rescale_factor ** (dim / (dim - 2)) if dim > 2 else base
        self.interpolation_factor = interpolation_factor
        self.scale_base = scale_base
        pairs = (dim + 1) // 2
        self.register_buffer('inv_freq', torch.empty(pairs))
        self.register_buffer('scale', torch.empty(pairs) if use_xpos else None)
        self.init_own()

    def init_own(self) -> None:
        if self.inv_freq.is_meta:
            # there is nothing to fill, and to count there torch would load its symbolic packages: 80 MB
            return
        channels = torch.arange(0, self.dim, 2, device=self.inv_freq.device).float()
        inv_freq = 1.0 / self.base ** (channels / self.dim)
        self.inv_freq.copy_(scaled_frequencies(inv_freq, self.scaling, base=self.base, dim=self.dim))
        if self.scale is not None:
            self.scale.copy_((channels + 0.4 * self.dim) / (1.4 * self.dim))

    def forward_from_seq_len(self, seq_len: int) -> tuple[Float[Tensor, '1 n r'], Float[Tensor, '1 n r'] | float]:
        return self.forward(torch.arange(seq_len, device=self.inv_freq.device))

    def forward(
        self,
        t: Int[Tensor, 'n'] | Int[Tensor, 'b n'],
        offset: int = 0,
        *,
        centred: bool = True,
        seen: Bool[Tensor, 'b j'] | None = None,
    ) -> tuple[Float[Tensor, '#b n r'], Float[Tensor, '#b n r'] | float]:
        """``offset`` is accepted for the signature's sake and changes nothing, as in the original.

        ``seen``: which of the last positions are tokens, for frequencies that depend on the length.
        """
        angles, scale = self.halves(t, centred=centred, seen=seen)
        return twice(angles, self.layout), twice(scale, self.layout) if isinstance(scale, Tensor) else scale

    def halves(
        self,
        t: Int[Tensor, 'n'] | Int[Tensor, 'b n'],
        *,
        centred: bool = True,
        seen: Bool[Tensor, 'b j'] | None = None,
    ) -> tuple[Float[Tensor, '#b n p'], Float[Tensor, '#b n p'] | float]:
        """Angle and scale of each pair once. Never less exact than float32: half precision cannot count to 4096."""
        dtype = torch.promote_types(self.inv_freq.dtype, torch.float32)
        t = (t if t.ndim == 2 else t.unsqueeze(0)).to(dtype)
        inv_freq = self.inv_freq.to(dtype)
        if self.depends_on_length and self.scaling is not None:
            inv_freq = length_scaled(inv_freq, self.scaling, t, seen, dim=self.dim)
        angles = t.unsqueeze(-1) * inv_freq / self.interpolation_factor
        if self.scale is None:
            return angles, self.attention_factor
        middle = ((t.max() + 1) / 2).floor() if self.centred and centred else 0.0
        return angles, self.scale.to(dtype) ** ((t - middle) / self.scale_base).unsqueeze(-1)


# ---------------------------------------------------------------- turning


def twice(table: Float[Tensor, '... p'], layout: str) -> Float[Tensor, '... r']:
    """What belongs to a pair, for both of its channels."""
    return table.repeat_interleave(2, dim=-1) if layout == 'interleaved' else torch.cat((table, table), dim=-1)


def per_pair(table: Float[Tensor, '... r'], layout: str) -> Float[Tensor, '... p']:
    """The reverse of ``twice``."""
    return table[..., ::2] if layout == 'interleaved' else table[..., : table.shape[-1] // 2]


def turn_halves(
    t: Float[Tensor, '... n d'], cos: Float[Tensor, '... n p'], sin: Float[Tensor, '... n p']
) -> Float[Tensor, '... n d']:
    """Turn the k-th channels of both halves of the first 2 p channels together."""
    pairs = cos.shape[-1]
    wide = t.to(torch.promote_types(t.dtype, cos.dtype))
    a, b, rest = wide[..., :pairs], wide[..., pairs : 2 * pairs], wide[..., 2 * pairs :]
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=-1).to(t.dtype)


def rotate_half(x: Float[Tensor, '... d']) -> Float[Tensor, '... d']:
    """Neighbouring channels ``(a, b)`` become ``(-b, a)``: a quarter of a turn."""
    a, b = x[..., ::2], x[..., 1::2]
    return torch.stack((-b, a), dim=-1).flatten(-2)


def apply_rotary_pos_emb(
    t: Float[Tensor, '... n d'], freqs: Float[Tensor, '... m r'], scale: Float[Tensor, '... m r'] | float = 1
) -> Float[Tensor, '... n d']:
    """Turn the first r channels of ``t`` by the last n rows of ``freqs``, times ``scale``; the other channels stay.

    Angles and scales are as ``RotaryEmbedding`` gives them: the two channels of a pair share theirs. (b n r) goes with
    t (b h n d). Computed in the wider dtype of ``t`` and ``freqs``, returned in that of ``t``.
    Raises ValueError if ``freqs`` has too few rows or too many channels.
    """
    n = t.shape[-2]
    check_table(freqs.shape[-2], freqs.shape[-1], n, t.shape[-1])
    freqs = _with_head_axis(last_rows(freqs, n), t)
    scale = _with_head_axis(last_rows(scale, n), t) if isinstance(scale, Tensor) else scale
    width, dim = freqs.shape[-1], t.shape[-1]
    if torch.compiler.is_compiling() or width % 2 == 1 or dim % 2 == 1:
        turned = turn_by_cos_sin(t[..., :width], freqs.cos() * scale, freqs.sin() * scale)
        return turned if width == dim else torch.cat((turned, t[..., width:]), dim=-1)
    pair_scale = scale[..., ::2] if isinstance(scale, Tensor) else scale
    return turn(t, as_turns(freqs[..., ::2], pair_scale, dim))


def as_turns(angles: Float[Tensor, '... p'], scale: Float[Tensor, '... p'] | float, dim: int) -> Tensor:
    """Complex numbers that turn each pair by its angle and stretch it by its scale, for heads of ``dim`` channels.

    Pairs beyond the angles are multiplied by 1: this is faster than to cut a head in two and to put it together again.
    """
    length = scale.to(angles.dtype) if isinstance(scale, Tensor) else torch.full_like(angles, scale)
    rest = dim // 2 - angles.shape[-1]
    if rest > 0:
        angles, length = F.pad(angles, (0, rest)), F.pad(length, (0, rest), value=1.0)
    return torch.polar(length, angles)


def turn(t: Float[Tensor, '... n d'], turns: Complex[Tensor, '... n p']) -> Float[Tensor, '... n d']:
    """Multiply the pairs of ``t``, as complex numbers, by ``turns`` (… n d/2): the fastest rotation without a compiler."""
    dtype = turns.dtype.to_real()
    dtype = dtype if t.dtype == dtype else torch.promote_types(t.dtype, dtype)
    wide = t if t.dtype == dtype else t.to(dtype)
    *strides, last = wide.stride()
    odd = wide.storage_offset()
    for stride in strides:
        odd |= stride
    if last != 1 or odd % 2:
        wide = wide.contiguous()
    pairs = torch.view_as_complex(wide.view(*wide.shape[:-1], wide.shape[-1] // 2, 2))
    turned = torch.view_as_real(pairs * (turns if turns.dtype == pairs.dtype else turns.to(pairs.dtype))).flatten(-2)
    return turned if turned.dtype == t.dtype else turned.to(t.dtype)


def turn_by_cos_sin(
    t: Float[Tensor, '... n d'], cos: Float[Tensor, '... n d'], sin: Float[Tensor, '... n d']
) -> Float[Tensor, '... n d']:
    """The same in real numbers, which compilers fuse."""
    wide = t.to(torch.promote_types(t.dtype, cos.dtype))
    return (wide * cos + rotate_half(wide) * sin).to(t.dtype)


def check_table(rows: int, width: int, n: int, dim: int) -> None:
    """Raise ValueError unless a table of angles has rows for n tokens and no more channels than a head."""
    if rows < n:
        raise ValueError(
            f'rotary positions must cover all {n} keys, memories and cached ones too, got {rows}. Pass those of all.'
        )
    if width > dim:
        raise ValueError(
            f'rotary_emb_dim must be at most the {dim} channels of a head, got {width}. Reduce it, or enlarge attn_dim_head.'
        )


def _with_head_axis(table: Shaped[Tensor, '... n r'], t: Float[Tensor, '... n d']) -> Tensor:
    return table.unsqueeze(1) if table.ndim == 3 and t.ndim == 4 else table
