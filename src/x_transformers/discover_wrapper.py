"""Tensor product probing: test whether encodings are sums of fillers bound to roles."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.flags.calls import FitOptions
from x_transformers.flags.later_objectives import DiscoverOptions, ProbeOptions
from x_transformers.flags.objectives import options
from x_transformers.helpers import values_known
from x_transformers.latent_prediction import check_parameters, mlp
from x_transformers.module import Module, empty_parameter
from x_transformers.tensor_types import Bool, Float, Int

SCHEMES = ('left_to_right', 'right_to_left', 'bidirectional', 'wickel', 'bag_of_words')


def _check_scheme(scheme: str) -> None:
    if scheme not in SCHEMES:
        raise ValueError(f'scheme must be one of {", ".join(SCHEMES)}, got {scheme!r}.')


def num_roles_for_scheme(scheme: str, max_seq_len: int, num_fillers: int) -> int:
    """How many roles a scheme has for sequences of at most ``max_seq_len`` of ``num_fillers`` fillers."""
    _check_scheme(scheme)
    if scheme == 'bidirectional':
        return max_seq_len * (max_seq_len + 1) // 2
    if scheme == 'wickel':
        return (num_fillers + 1) ** 2
    return 1 if scheme == 'bag_of_words' else max_seq_len


def role_ids_for_tokens(
    tokens: Int[Tensor, 'b n'], lens: Int[Tensor, ' b'], scheme: str, max_seq_len: int, num_fillers: int
) -> Int[Tensor, 'b n']:
    """The role of each token; padding, behind ``lens``, has role 0.

    ``left_to_right``: its place; ``right_to_left``: its place from the end; ``bidirectional``: both, paired by Cantor;
    ``wickel``: its two neighbours, with a filler of its own for the borders; ``bag_of_words``: one role for all.

    Raises ValueError if a row is longer than ``max_seq_len``.
    """
    _check_scheme(scheme)
    if tokens.ndim != 2 or lens.shape != tokens.shape[:1]:
        raise ValueError(f'tokens (b n) and lens (b) must agree, got {tuple(tokens.shape)} and {tuple(lens.shape)}.')
    if values_known(lens) and bool((lens > min(max_seq_len, tokens.shape[1])).any()):
        raise ValueError(
            f'lens must be at most max_seq_len={max_seq_len} and the width {tokens.shape[1]}, got {lens.tolist()}.'
        )
    place = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    last = lens.unsqueeze(-1) - 1
    inside = place <= last
    if scheme == 'left_to_right':
        roles = place
    elif scheme == 'right_to_left':
        roles = last - place
    elif scheme == 'bidirectional':
        roles = last * (last + 1) // 2 + place
    elif scheme == 'wickel':
        marked = tokens.long().masked_fill(~inside, num_fillers)
        before = F.pad(marked, (1, -1), value=num_fillers)
        behind = F.pad(marked, (-1, 1), value=num_fillers)
        roles = before * (num_fillers + 1) + behind
    else:
        roles = torch.zeros_like(place)
    return roles.masked_fill(~inside, 0)


class TPREncoder(Module):
    """An encoding as a sum of outer products of fillers and roles (https://arxiv.org/abs/2608.29530).

    ``forward(fillers, roles)``: sum over tokens of ``binding @ (filler x role)``, plus a bias; with ``mlp_dim`` read out by a
    small network. ``state`` is the sum itself.
    """

    def __init__(
        self,
        *,
        dim: int,
        num_fillers: int,
        num_roles: int,
        filler_dim: int = 24,
        role_dim: int = 24,
        mlp_dim: int | None = None,
    ) -> None:
        super().__init__()
        options(ProbeOptions, 'TPREncoder', locals())
        self.filler_emb = nn.Embedding(num_fillers, filler_dim)
        self.role_emb = nn.Embedding(num_roles, role_dim)
        self.binding = empty_parameter(dim, filler_dim, role_dim)
        self.bias = empty_parameter(dim)
        self.mlp = None if mlp_dim is None else mlp([dim, mlp_dim, dim], nn.SiLU)
        self.init_own()

    @torch.no_grad()
    def init_own(self) -> None:
        nn.init.zeros_(self.binding)
        nn.init.zeros_(self.bias)
        for table in (self.filler_emb, self.role_emb):
            nn.init.normal_(table.weight, std=0.05)

    def state(
        self, fillers: Int[Tensor, 'b n'], roles: Int[Tensor, 'b n'], mask: Bool[Tensor, 'b n'] | None = None
    ) -> Float[Tensor, 'b d']:
        """The sum of bound pairs, without the readout."""
        f, r = self.filler_emb(fillers), self.role_emb(roles)
        if mask is not None:
            f = f.masked_fill(~mask.unsqueeze(-1), 0.0)
        # fillers and roles meet before the binding: one matrix per row, however long it is
        return torch.einsum('b n f, b n r -> b f r', f, r).flatten(1) @ self.binding.flatten(1).t() + self.bias

    def readout(self, state: Float[Tensor, 'b d']) -> Float[Tensor, 'b d']:
        out: Tensor = state if self.mlp is None else self.mlp(state)
        return out

    def forward(
        self, fillers: Int[Tensor, 'b n'], roles: Int[Tensor, 'b n'], mask: Bool[Tensor, 'b n'] | None = None
    ) -> Float[Tensor, 'b d']:
        return self.readout(self.state(fillers, roles, mask))

    def fit(
        self,
        fillers: Int[Tensor, 'b n'],
        roles: Int[Tensor, 'b n'],
        encodings: Float[Tensor, 'b d'],
        mask: Bool[Tensor, 'b n'] | None = None,
        *,
        steps: int = 2000,
        batch_size: int = 1024,
        lr: float = 3e-3,
    ) -> float:
        """Minimize the squared distance to frozen encodings; a running mean of the loss."""
        options(FitOptions, 'fit', locals())
        optimizer = torch.optim.Adam(self.parameters(), lr=lr)
        target, running = encodings.detach(), 0.0
        for step in range(steps):
            index = torch.randint(fillers.shape[0], (min(batch_size, fillers.shape[0]),), device=fillers.device)
            predicted = self(fillers[index], roles[index], None if mask is None else mask[index])
            loss = F.mse_loss(predicted, target[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            share = 1.0 / min(step + 1, 100)
            running += share * (float(loss.detach()) - running)
        return running


class DiscoverDecoder(Module):
    """A decoder that encodes a sequence into its last embedding, and writes it again behind that embedding.

    Args:
        decoder: a ``TransformerWrapper`` around a ``Decoder``.
        num_fillers: ids below are tokens of sequences.
        bos_id, pad_id: the id that decoding begins with, and the one behind the end.
        max_seq_len: the longest sequence that is decoded.
        enc_pos: 'last', or the position whose embedding is the encoding.
    """

    def __init__(
        self, *, decoder: nn.Module, num_fillers: int, bos_id: int, pad_id: int, max_seq_len: int, enc_pos: str | int = 'last'
    ) -> None:
        super().__init__()
        options(DiscoverOptions, 'DiscoverDecoder', locals())
        known = getattr(decoder, 'num_tokens', max(bos_id, pad_id) + 1)
        check_parameters(
            'DiscoverDecoder',
            isinstance(enc_pos, str) and enc_pos != 'last' and f"enc_pos must be 'last' or a position, got {enc_pos!r}.",
            max(bos_id, pad_id) >= known and f'bos_id and pad_id must be below num_tokens={known}, got {bos_id} and {pad_id}.',
        )  # fmt: skip
        self.decoder: Any = decoder
        self.num_fillers, self.bos_id, self.pad_id = num_fillers, bos_id, pad_id
        self.max_seq_len, self.enc_pos = max_seq_len, enc_pos

    def encode(self, tokens: Int[Tensor, 'b n'], mask: Bool[Tensor, 'b n'] | None = None) -> Float[Tensor, 'b d']:
        """The embedding at the last token that the mask names, or at ``enc_pos``."""
        embeds: Tensor = self.decoder(tokens, mask=mask, return_embeddings=True)
        if self.enc_pos != 'last':
            return embeds[:, int(self.enc_pos)]
        if mask is None:
            return embeds[:, -1]
        place = torch.arange(tokens.shape[1], device=tokens.device)
        last = place.expand_as(mask).masked_fill(~mask, 0).amax(dim=-1)
        return embeds[torch.arange(embeds.shape[0], device=embeds.device), last]

    def teach(self, encodings: Float[Tensor, 'b d'], targets: Int[Tensor, 'b n']) -> Float[Tensor, 'b n v']:
        """Logits of each target, given the encoding and the targets before."""
        begin = torch.full_like(targets[:, :1], self.bos_id)
        logits: Tensor = self.decoder(torch.cat((begin, targets[:, :-1]), dim=1), prepend_embeds=encodings.unsqueeze(1))
        return logits[:, 1:]

    def forward(
        self, tokens: Int[Tensor, 'b n'], targets: Int[Tensor, 'b n'] | None = None, mask: Bool[Tensor, 'b n'] | None = None
    ) -> Tensor:
        """Encodings (b d), or with ``targets`` the logits (b n v) of decoding them."""
        encodings = self.encode(tokens, mask)
        return encodings if targets is None else self.teach(encodings, targets)

    @torch.no_grad()
    def decode(self, encodings: Float[Tensor, 'b d'], lens: Int[Tensor, ' b'] | None = None) -> Int[Tensor, 'b n']:
        """The likeliest tokens behind each encoding, ``pad_id`` behind ``lens``."""
        batch, device = encodings.shape[0], encodings.device
        length = self.max_seq_len if lens is None else int(lens.max())
        if length > self.max_seq_len:
            raise ValueError(f'lens must be at most max_seq_len={self.max_seq_len}, got {length}.')
        out = torch.full((batch, 1), self.bos_id, dtype=torch.long, device=device)
        for _ in range(length):
            logits = self.decoder(out, prepend_embeds=encodings.unsqueeze(1))
            out = torch.cat((out, logits[:, -1:].argmax(dim=-1)), dim=1)
        tokens = out[:, 1:]
        if lens is not None:
            tokens = tokens.masked_fill(torch.arange(length, device=device) >= lens.unsqueeze(-1), self.pad_id)
        return tokens

    @torch.no_grad()
    def surgery(
        self,
        encodings: Float[Tensor, 'b d'],
        probe: TPREncoder,
        old: tuple[Int[Tensor, 'b n'], Int[Tensor, 'b n']],
        new: tuple[Int[Tensor, 'b n'], Int[Tensor, 'b n']],
        lens: Int[Tensor, ' b'] | None = None,
        mask: Bool[Tensor, 'b n'] | None = None,
    ) -> Int[Tensor, 'b n']:
        """Exchange ``old`` (fillers, roles) for ``new`` ones in the encodings, by the probe's readouts, and decode."""
        return self.decode(encodings + probe(*new, mask) - probe(*old, mask), lens)
