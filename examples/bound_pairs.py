"""Are encodings sums of bound pairs? A decoder packs four digits into one vector, and a probe takes the vector apart.

The probe explains a vector as a sum of digits bound to places (TPREncoder). If that is what the vector is, taking one digit out
and putting another in must make the decoder write the other digit (DiscoverDecoder.surgery).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from common import Run
from torch import Tensor

from x_transformers import Decoder, TransformerWrapper
from x_transformers.discover_wrapper import DiscoverDecoder, TPREncoder, num_roles_for_scheme, role_ids_for_tokens

DIGITS, LENGTH, DIM = 8, 4, 64


def digits(rows: int) -> Tensor:
    return torch.randint(DIGITS, (rows, LENGTH))


def places(x: Tensor) -> Tensor:
    lens = torch.full((x.shape[0],), LENGTH)
    return role_ids_for_tokens(x, lens, 'left_to_right', max_seq_len=LENGTH, num_fillers=DIGITS)


def main() -> None:
    run = Run(__doc__, steps=600)
    net = TransformerWrapper(
        num_tokens=DIGITS + 2,
        max_seq_len=LENGTH + 2,
        attn_layers=Decoder(dim=DIM, depth=2, heads=4, attn_dim_head=16, use_rmsnorm=True),
    )
    model = DiscoverDecoder(decoder=net, num_fillers=DIGITS, bos_id=DIGITS, pad_id=DIGITS + 1, max_seq_len=LENGTH)

    def loss() -> Tensor:
        x = digits(64)
        return F.cross_entropy(model(x, x).transpose(1, 2), x)

    run.train(model, loss, lr=3e-3)
    x = digits(2048)
    with torch.no_grad():
        encodings = model.encode(x)
    written = (model.decode(encodings[:256]) == x[:256]).all(dim=-1).float().mean()
    guessing = f'guessing reaches {DIGITS**-LENGTH:.4f}'
    run.check('share of sequences written again', written, at_least=0.95, baseline=guessing)

    roles = num_roles_for_scheme('left_to_right', LENGTH, DIGITS)
    probe = TPREncoder(dim=DIM, num_fillers=DIGITS, num_roles=roles)
    error = probe.fit(x, places(x), encodings, steps=max(1, run.steps))
    print(f'the probe leaves {error / encodings.var().item():.3f} of the variance unexplained')
    test, other = digits(256), digits(256)
    changed = torch.where(torch.arange(LENGTH) == 2, other, test)
    with torch.no_grad():
        encoded = model.encode(test)
    made = model.surgery(encoded, probe, (test, places(test)), (changed, places(changed)))
    right = (made[:, 2] == changed[:, 2]).float().mean()
    run.check('share of exchanged digits written', right, at_least=0.6, baseline=f'guessing reaches {1 / DIGITS}')


if __name__ == '__main__':
    main()
