"""Every flag where the weights are elsewhere until a layer runs: on the meta device, as accelerate leaves them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.laws.combination import Combination, rotated
from tests.laws.groups import LENGTH, TOKENS
from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper

accelerate = pytest.importorskip('accelerate', reason='it is an extra of the developers')
CPU = torch.device('cpu')


@torch.no_grad()
@pytest.mark.parametrize('case', [case for case in rotated() if not case.random], ids=str)
def test_every_flag_offloaded(case: Combination) -> None:
    model, ids = case.build(), torch.randint(0, TOKENS, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    given = case.inputs(2).part()
    wanted = model(ids, **given)
    accelerate.cpu_offload(model, CPU, preload_module_classes=model._no_split_modules)
    torch.testing.assert_close(model(ids, **given), wanted)
    assert all(parameter.is_meta for parameter in model.parameters())


def net(**wrapper: Any) -> TransformerWrapper:
    torch.manual_seed(0)
    layers = Decoder(dim=32, depth=3, heads=2, attn_dim_head=16, rotary_pos_emb=True, verbose=False)
    return TransformerWrapper(num_tokens=64, max_seq_len=32, attn_layers=layers, **wrapper).eval()


@torch.no_grad()
@pytest.mark.parametrize('tie_embedding', [False, True])
def test_a_map_of_devices_moves_whole_layers(tie_embedding: bool, tmp_path: Any) -> None:
    model, plain = net(tie_embedding=tie_embedding), net(tie_embedding=tie_embedding)
    size = accelerate.utils.compute_module_sizes(model)['']
    places = accelerate.infer_auto_device_map(
        model, max_memory={'cpu': size * 2 // 3}, no_split_module_classes=model._no_split_modules
    )
    layers = {name: place for name, place in places.items() if '.layers.' in name}
    assert set(layers) == {f'attn_layers.layers.{index}' for index in range(6)}
    assert set(layers.values()) == {'cpu', 'disk'}
    accelerate.dispatch_model(model, places, offload_dir=tmp_path, preload_module_classes=model._no_split_modules)
    on_disk = {name for name, parameter in model.named_parameters() if parameter.is_meta}
    assert 0 < len(on_disk) < len(list(model.parameters()))
    ids = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(ids), plain(ids))
    torch.testing.assert_close(AutoregressiveWrapper(model)(ids), AutoregressiveWrapper(plain)(ids))
    written = AutoregressiveWrapper(model).generate(ids, 6, temperature=0.0)
    assert torch.equal(written, AutoregressiveWrapper(plain).generate(ids, 6, temperature=0.0))
