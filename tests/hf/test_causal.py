"""A model of ours in the hands of PEFT and of the Trainer of transformers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper
from x_transformers.hf.causal import CausalLM

pytestmark = pytest.mark.filterwarnings('ignore')


def net() -> TransformerWrapper:
    torch.manual_seed(0)
    layers = Decoder(dim=16, depth=2, heads=2, attn_dim_head=8, rotary_pos_emb=True)
    return TransformerWrapper(num_tokens=20, max_seq_len=32, attn_layers=layers)


def test_the_loss_is_that_of_the_labels() -> None:
    model, ids = CausalLM(net()).eval(), torch.randint(20, (2, 9))
    mask = torch.arange(9) < torch.tensor([[9], [5]])
    labels = ids.masked_fill(~mask, -100)
    said = model(input_ids=ids, attention_mask=mask.long(), labels=labels)
    wanted = model.model.net(ids, mask=mask)
    torch.testing.assert_close(said['logits'], wanted)
    rows = torch.cat((wanted[0, :8], wanted[1, :4])), torch.cat((ids[0, 1:], ids[1, 1:5]))
    torch.testing.assert_close(said['loss'], F.cross_entropy(*rows))
    assert set(model(ids)) == {'logits'}
    torch.testing.assert_close(model(ids, labels=ids)['loss'], AutoregressiveWrapper(model.model.net).eval()(ids))
    halved = model(ids, labels=ids, num_items_in_batch=32)['loss']
    torch.testing.assert_close(halved, model(ids, labels=ids)['loss'] / 2)
    with pytest.raises(ValueError, match='got inputs_embeds, too'):
        model(ids, inputs_embeds=torch.zeros(1))


@pytest.mark.slow
def test_lora_of_a_causal_language_model() -> None:
    peft = pytest.importorskip('peft', reason='peft is an extra of the developers')
    model = peft.get_peft_model(CausalLM(net()), peft.LoraConfig(task_type='CAUSAL_LM', r=4, target_modules=['to_q', 'to_v']))
    ids = torch.randint(20, (2, 9))
    model(input_ids=ids, labels=ids)['loss'].backward()
    learned = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert len(learned) == 8
    assert all('lora_' in name for name in learned)
    plain = CausalLM(net()).eval().generate(ids, 5, temperature=0.0)
    # an adapter starts as nothing
    assert torch.equal(model.eval().generate(ids, 5, temperature=0.0), plain)


@pytest.mark.slow
def test_the_trainer_of_transformers(tmp_path) -> None:
    transformers = pytest.importorskip('transformers', reason='its Trainer is meant (extra: dev)')
    model, row = CausalLM(net()), torch.arange(12) % 5
    options = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=30, learning_rate=0.01, per_device_train_batch_size=2, report_to=[], use_cpu=True,
        save_strategy='no', disable_tqdm=True,
    )  # fmt: skip
    before = float(model(row[None], labels=row[None])['loss'])
    transformers.Trainer(model, options, train_dataset=[{'input_ids': row, 'labels': row}] * 8).train()
    assert float(model.eval()(row[None], labels=row[None])['loss']) < 0.2 * before
