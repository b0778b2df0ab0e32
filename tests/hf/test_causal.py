"""A model of ours in the hands of PEFT and of the Trainer of transformers."""

from __future__ import annotations

from typing import Any

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


def test_the_wrapper_answers_by_itself() -> None:
    model, ids = AutoregressiveWrapper(net(), ignore_index=19).eval(), torch.randint(19, (2, 9))
    labels = ids.clone()
    labels[:, 3], labels[0, 5] = -100, 19
    said = model(ids, labels=labels)
    wanted = model.net(ids)
    torch.testing.assert_close(said.logits, wanted)
    total = [F.cross_entropy(wanted[row, at - 1], ids[row, at]) for row in range(2) for at in range(1, 9)
             if at != 3 and (row, at) != (0, 5)]  # fmt: skip
    torch.testing.assert_close(said.loss, torch.stack(total).mean())
    torch.testing.assert_close(model(ids, labels=labels, num_items_in_batch=7).loss, torch.stack(total).sum() / 7)
    nothing = torch.full_like(ids, -100)
    assert model(ids, labels=nothing, num_items_in_batch=torch.tensor(7)).loss == 0
    torch.testing.assert_close(model(ids, labels=ids).loss, model(ids))
    torch.testing.assert_close(model(ids, labels=ids, lens=torch.tensor([9, 4])).loss, model(ids, lens=torch.tensor([9, 4])))
    assert list(model(input_ids=ids)) == ['logits']
    front = torch.randn(2, 3, 16)
    torch.testing.assert_close(model(ids, labels=ids, prepend_embeds=front).loss, model(ids, prepend_embeds=front))
    assert model(ids, labels=ids, prepend_embeds=front).logits.shape == wanted.shape
    with pytest.raises(AttributeError, match="there is no 'past', only loss, logits"):
        said.past  # noqa: B018


@pytest.mark.parametrize(
    ('given', 'error', 'says'),
    [
        ({'labels': torch.zeros(2, 8, dtype=torch.long)}, ValueError, r'labels must be whole numbers of the shape .* \(2, 8\)'),
        ({'labels': torch.zeros(2, 9)}, ValueError, r'labels must be .* of torch.float32'),
        ({'labels': [[0]]}, ValueError, 'labels must be .*, got list'),
        ({'labels': 'ids', 'targets': 'ids'}, ValueError, 'targets must not go with labels'),
        ({'labels': 'ids', 'return_outputs': True}, ValueError, 'return_outputs must not go with labels'),
        ({'labels': 'ids', 'input_ids': 'ids'}, TypeError, 'ids must be given once, .* got both'),
        ({'labels': 'ids', 'attention_mask': torch.ones(2, 8)}, ValueError, 'attention_mask must have the shape of the ids'),
        ({'attention_mask': torch.ones(2, 9)}, ValueError, 'attention_mask must go with labels or input_ids'),
        ({'num_items_in_batch': 3}, ValueError, 'num_items_in_batch must go with labels or input_ids'),
    ],
)
def test_what_does_not_go_with_labels_is_told(given: dict[str, Any], error: type[Exception], says: str) -> None:
    ids = torch.randint(20, (2, 9))
    with pytest.raises(error, match=says):
        AutoregressiveWrapper(net())(ids, **{name: ids if isinstance(value, str) else value for name, value in given.items()})


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
    model, row = AutoregressiveWrapper(net()), torch.arange(12) % 5
    options = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=30, learning_rate=0.01, per_device_train_batch_size=2, report_to=[], use_cpu=True,
        save_strategy='no', disable_tqdm=True,
    )  # fmt: skip
    before = float(model(row[None]))
    rows = [{'input_ids': row, 'labels': row}] * 8
    trainer = transformers.Trainer(model, options, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    after = float(model.eval()(row[None]))
    assert after < 0.2 * before
    # it divides by all labels, also by the first of each row, which nothing predicts
    assert trainer.evaluate()['eval_loss'] == pytest.approx(after * 11 / 12, rel=1e-3)
