"""Maximal update parametrization (2203.03466): its rules, and that activations do not grow with the width."""

from __future__ import annotations

import math

import pytest
import torch

from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper
from x_transformers.training.errors import TrainingError
from x_transformers.training.mup import mup_init_, narrower_model, shares
from x_transformers.training.optimizers import make_optimizers, parameter_groups
from x_transformers.training.options import TrainerOptions

BASE, VOCABULARY = 32, 17


def made(width, wrapper=None, **flags):
    torch.manual_seed(0)
    stack = Decoder(dim=width, depth=2, heads=width // 16, attn_dim_head=16, verbose=False, **flags)
    return AutoregressiveWrapper(
        TransformerWrapper(num_tokens=VOCABULARY, max_seq_len=16, attn_layers=stack, **(wrapper or {}))
    )


def test_each_role_has_its_factors():
    model = made(128, ff_glu=True, attn_gate_value_heads=True)
    found = {name: shares(model, BASE)[parameter] for name, parameter in model.named_parameters()}
    layers = 'net.attn_layers.layers.'
    for name in ('0.1.to_q.weight', '0.1.to_out.weight', '1.1.ff.0.proj.weight', '1.1.ff.2.weight'):
        assert found[layers + name] == (1 / 4, 1.0), name
    # what does not grow: logits of a vocabulary
    assert found['net.to_logits.weight'] == (1 / 4, 0.5)
    # tables, of which positions are read times width ** -0.5
    assert found['net.token_emb.emb.weight'] == (1.0, 2.0)
    assert found['net.pos_emb.emb.weight'] == (2.0, 2.0)
    # gains and biases; heads grow with the width, and so do maps to them
    assert found[layers + '0.0.0.gamma'] == (1.0, 1.0)
    assert found[layers + '1.1.ff.2.bias'] == (1.0, 1.0)
    assert found[layers + '0.1.to_v_head_gate.weight'] == (1 / 4, 1.0)


def test_at_the_base_width_nothing_changes():
    model = made(BASE)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    mup_init_(model, BASE)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    plain, other = (parameter_groups(model, lr=0.1, weight_decay=0.2, mup=mup, mup_base=BASE) for mup in (False, True))
    assert [(len(group['params']), group['lr'], group['weight_decay']) for group in plain] == [
        (len(group['params']), group['lr'], group['weight_decay']) for group in other
    ]


def test_the_trainer_s_optimizer_learns_by_the_rules():
    model = made(64)
    options = TrainerOptions(lr=0.1, mup=True, mup_base=BASE)
    (optimizer,) = make_optimizers(model, options)
    rates = {parameter: group['peak'] for group in optimizer.param_groups for parameter in group['params']}
    assert rates[model.net.attn_layers.layers[0].inside.to_q.weight] == pytest.approx(0.05)
    assert rates[model.net.token_emb.emb.weight] == pytest.approx(0.1)
    assert rates[model.net.pos_emb.emb.weight] == pytest.approx(0.1 * math.sqrt(2))
    assert len(rates) == len(list(model.parameters()))


def test_the_narrower_model_has_heads_in_proportion_and_takes_no_memory():
    model = narrower_model(made(64), BASE)
    assert model.net.attn_layers.dim == BASE
    assert model.net.attn_layers.attn_heads == 2
    assert all(parameter.is_meta for parameter in model.parameters())


def sizes(width, mup, lr=0.01, steps=5):
    """How much hidden states and logits have moved after some steps of AdamW, per number."""
    model = made(width)
    if mup:
        mup_init_(model, BASE)
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=lr, weight_decay=0.0, mup=mup, mup_base=BASE), lr=lr)
    ids = torch.randint(0, VOCABULARY, (8, 16), generator=torch.Generator().manual_seed(1))

    @torch.no_grad()
    def seen():
        logits, record = model.net(ids[:, :-1], return_intermediates=True)
        return [*record.layer_hiddens[1:], logits]

    before = seen()
    for _ in range(steps):
        optimizer.zero_grad()
        model(ids).backward()
        optimizer.step()
    return torch.tensor([(new - old).abs().mean() for new, old in zip(seen(), before, strict=True)])


def test_coordinates_do_not_grow_with_the_width():
    """The check of the paper's appendix D.1: with the rules every activation moves as far at any width, without it does not."""
    widths = (32, 64, 128, 256)
    slopes = {}
    for mup in (True, False):
        moved = torch.stack([sizes(width, mup) for width in widths]).log2()
        # per doubling of the width, in powers of two
        slopes[mup] = (moved[-1] - moved[0]) / math.log2(widths[-1] / widths[0])
    assert slopes[True].abs().max() < 0.2, slopes
    assert slopes[False].max() > 0.4, slopes


@pytest.mark.parametrize(
    ('build', 'base', 'says'),
    [
        (lambda: made(64, {'tie_embedding': True}), 32, 'tie_embedding'),
        (lambda: made(64), 24, 'whole heads'),
        (lambda: torch.nn.Linear(3, 3), 24, 'made of flags'),
    ],
)
def test_what_has_no_rules_is_refused(build, base, says):
    with pytest.raises(TrainingError, match=says):
        shares(build(), base)


def test_other_optimizers_are_refused():
    with pytest.raises(TrainingError, match='--mup must go with --optimizer adamw'):
        TrainerOptions(mup=True, optimizer='muon').check()


def test_a_run_starts_by_the_rules_and_goes_on(tmp_path):
    from x_transformers.training.options import TrainOptions
    from x_transformers.training.run import RunConfig, prepare_run

    text = tmp_path / 'text.txt'
    text.write_text('the quick brown fox jumps over the lazy dog. ' * 200)
    flags = {'dim': 64, 'depth': 1, 'heads': 4, 'attn_dim_head': 16, 'max_seq_len': 16}
    weights = {}
    for mup in (False, True):
        (tmp_path / str(mup)).mkdir()
        options = TrainOptions(
            data=(str(text),), run_dir=str(tmp_path / str(mup)), seq_len=16, batch=2, steps=2, device='cpu', log=(),
            mup=mup, optimizer='adamw', mup_base=BASE, data_cache=str(tmp_path / 'cache'),
        )  # fmt: skip
        run = prepare_run(RunConfig(flags, options), lambda line: None)
        weights[mup] = run.trainer.model.net.to_logits.weight.detach().clone()
    assert torch.allclose(weights[True], weights[False] * 0.5**0.5)
