"""What may not get worse: bytes kept for the backward, operations per decoded token, graphs, what an import brings along."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from tests.kept import Alive
from tests.scripts import load_script
from x_transformers import AutoregressiveWrapper, Decoder, Encoder, TransformerWrapper
from x_transformers.attention.attend import Attend
from x_transformers.attention.geometry import ScoreShape
from x_transformers.attention.kernels.choose import use_kernel
from x_transformers.attention.mask import Mask

HEADS = {'heads': 8}


@pytest.fixture(scope='module')
def floor():
    return load_script('benchmarks/floor.py')


@pytest.fixture(scope='module')
def worker():
    path = list(sys.path)
    yield load_script('benchmarks/worker.py')
    sys.path[:] = path


def model(*, length=64, depth=2, **flags):
    torch.manual_seed(0)
    stack = Decoder(dim=64, depth=depth, **HEADS, **flags)
    return AutoregressiveWrapper(TransformerWrapper(num_tokens=32, max_seq_len=length, attn_layers=stack))


def ids(rows, length):
    return torch.randint(0, 32, (rows, length), generator=torch.Generator().manual_seed(0))


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize('recipe', ['plain', 'modern'])
def test_no_more_is_kept_for_the_backward_than_by_the_hand_written_model(floor, worker, recipe):
    x = ids(2, 64)
    ours = model(**(worker.MODERN if recipe == 'modern' else {}))
    theirs = floor.Floor(vocabulary=32, length=64, modern=recipe == 'modern', dim=64, depth=2, **HEADS)
    kept = worker.saved_megabytes(worker.training(lambda: ours(x), ours), ours)
    least = worker.saved_megabytes(worker.training(lambda: theirs.loss(x), theirs), theirs)
    assert least > 0
    assert kept <= 1.05 * least


# tensors of all tokens that are there at once: the streams twice, their norm, queries, keys, values and what is seen; in the
# modern recipe two streams, norm and output of a gated feed-forward, and the inner features of the tokens of one piece
@pytest.mark.parametrize(('recipe', 'tensors'), [('plain', 7.2), ('modern', 4.0 + 4.5)])
def test_what_a_prefill_holds_at_once(worker, recipe, tensors):
    length = 2048
    x, ours = ids(1, length), model(length=length, attn_dim_head=8, **(worker.MODERN if recipe == 'modern' else {})).eval()
    with torch.no_grad(), Alive() as alive:
        ours.net(x)
    assert 4 * length * 64 * 4 < alive.most <= tensors * length * 64 * 4


# what a training step may keep for its backward, in shares of what it keeps without the feature: the feature's own tensors
# (unit queries and keys, four streams), nothing for each pair of tokens
SHARES = {
    'alibi': 1.0,
    't5_bias': 1.0,
    'dynamic_bias': 1.02,
    'mem_kv16': 1.2,
    'value_residual': 1.10,
    'shift_tokens': 1.02,
    'macaron': 1.10,
    'sandwich_norm': 1.15,
    'qk_norm': 1.37,
    'streams4': 2.0,
    'window128': 1.0,
    'softclamp': 1.0,
    'head_sink': 1.0,
    'sigmoid': 1.0,
    'talking_heads': 1.0,
    'sparse_topk8': 1.0,
}


def test_every_feature_of_the_benchmarks_has_a_gate(worker):
    assert {'plain', *SHARES} == set(worker.FEATURES)


@pytest.mark.parametrize('feature', SHARES)
def test_what_a_feature_keeps_for_the_backward(worker, feature):
    flags, length = worker.FEATURES[feature], 512

    def kept(**flags):
        net = model(length=length, **flags)
        x = ids(1, length)
        return worker.saved_megabytes(worker.training(lambda: net(x), net), net)

    without = kept(**dict.fromkeys(worker.BESIDE.get(feature, {}), ('f', 'a', 'f') * 2))
    # a bias by distance is kept once for all layers, for the queries of one block
    strip = 8 * 128 * (length + 127) * 4 / 2**20 if feature in ('alibi', 't5_bias', 'dynamic_bias') else 0.0
    assert kept(**flags) <= 1.001 * SHARES[feature] * without + strip


def test_a_window_costs_as_much_as_it_shows():
    """Attention's products: in proportion to the length, where without a window they grow with its square."""
    attend, mask = Attend(causal=True), Mask(causal=True, past=128)

    def products(length):
        q = torch.randn(1, 2, length, 8, requires_grad=True)
        with FlopCounterMode(display=False) as counter:
            attend.run(q, q, q, mask=mask, geometry=ScoreShape(length, length))[0].sum().backward()
        return counter.get_total_flops()

    # but for the first queries, which have fewer keys behind them
    assert products(4096) <= 2.1 * products(2048)
    # seven products of 8 channels for each query and the keys of its block: 64 and 128 before
    assert products(4096) <= 7 * 2 * 2 * 8 * 4096 * (64 + 128)


class Fresh(TorchDispatchMode):
    """Calls by operation, and the bytes of what they allocate."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[str(func)] += 1
        out = func(*args, **(kwargs or {}))
        old = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in old:
                self.bytes += t.untyped_storage().nbytes()
        return out


def watch_tokens(generate, first, last):
    """What the tokens after the ``first`` cost, up to the ``last``: each on the average."""
    with Fresh() as few:
        generate(first)
    with Fresh() as many:
        generate(last)
    count = last - first
    return (many.calls.total() - few.calls.total()) / count, (many.bytes - few.bytes) / count


@pytest.mark.parametrize('recipe', ['plain', 'modern'])
def test_a_decoded_token_takes_few_operations(floor, worker, recipe):
    ours = model(depth=6, **(worker.MODERN if recipe == 'modern' else {}))
    theirs = floor.Floor(vocabulary=32, length=64, modern=recipe == 'modern', dim=64, depth=6, **HEADS)
    prompt = ids(1, 8)
    calls, _ = watch_tokens(lambda n: ours.generate(prompt, n, temperature=0.0), 4, 12)
    least, _ = watch_tokens(lambda n: theirs.generate(prompt, n), 4, 12)
    assert calls <= 1.25 * least


def test_a_decoded_token_takes_at_most_1200_operations_those_made_of_others_counted_too():
    ours, prompt = model(depth=6), ids(1, 8)

    def count(steps):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            ours.generate(prompt, steps, temperature=0.0)
        return sum(event.count for event in profile.key_averages() if event.key.startswith('aten::'))

    assert 100 < (count(12) - count(4)) / 8 <= 1200


@pytest.mark.parametrize('flags', [{}, {'rotary_pos_emb': True, 'attn_kv_heads': 2, 'use_rmsnorm': True}])
def test_what_a_token_allocates_does_not_grow_with_the_context(flags):
    ours = model(length=512, depth=2, **flags)

    def allocated_after(context):
        prompt = ids(1, context)
        # the first token moves the prompt's keys to where there is room; those after it only add theirs
        return watch_tokens(lambda n: ours.generate(prompt, n, temperature=0.0, filter_kwargs={}), 34, 36)[1]

    room = 4 * 64 * 2 * 8  # keys and values of two layers: what one more row of room takes, at 8 heads of 64 channels
    assert abs(allocated_after(400) - allocated_after(40)) <= 2 * room


# ---------------------------------------------------------------- graphs


def graphs_of(run, *given):
    """(what the compiled function returns, how many graphs it was made of)."""
    made = []

    def backend(graph, example):
        made.append(graph)
        return graph.forward

    torch._dynamo.reset()
    try:
        return torch.compile(run, fullgraph=True, backend=backend)(*given), len(made)
    finally:
        torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize('name', ['plain', 'modern', 'window', 'padding', 'window and padding', 'encoder with padding'])
def test_a_compiled_model_is_one_graph(worker, name):
    torch.manual_seed(0)
    flags = worker.MODERN if name == 'modern' else {'attn_max_attend_past': 4} if 'window' in name else {}
    kind = Encoder if 'encoder' in name else Decoder
    stack = kind(dim=64, depth=2, **HEADS, **flags)
    net = TransformerWrapper(num_tokens=32, max_seq_len=16, attn_layers=stack)
    given = {'mask': torch.arange(16) < torch.tensor([[16], [9]])} if 'padding' in name else {}
    run = net if kind is Encoder else AutoregressiveWrapper(net)
    x = ids(2, 16)
    out, count = graphs_of(lambda t: run(t, **given), x)
    assert count == 1
    torch.testing.assert_close(out, run(x, **given))


# ---------------------------------------------------------------- kernels


@pytest.mark.filterwarnings('ignore:flex_attention called without torch.compile')
@pytest.mark.parametrize('kernel', ['sdpa', 'blocks', 'flex'])
@pytest.mark.parametrize('flags', [{}, {'attn_max_attend_past': 4}, {'alibi_pos_bias': True}, {'attn_kv_heads': 2}])
def test_the_first_loss_is_the_same_on_every_kernel(kernel, flags):
    # flex has no double precision
    ours, x = model(length=16, **flags).to(torch.float32 if kernel == 'flex' else torch.float64), ids(2, 16)
    with use_kernel('reference'):
        expected = ours(x)
    expected.backward()
    grads = {name: p.grad for name, p in ours.named_parameters()}
    ours.zero_grad(set_to_none=True)
    with torch.set_grad_enabled(kernel != 'flex'), use_kernel(kernel):
        loss = ours(x)
    torch.testing.assert_close(loss, expected)
    if kernel != 'flex':
        # flex has no backward on a CPU
        loss.backward()
        for name, p in ours.named_parameters():
            torch.testing.assert_close(p.grad, grads[name], msg=lambda text, name=name: f'{name}: {text}')


# ---------------------------------------------------------------- start


def test_an_import_brings_nothing_heavy_along():
    heavy = ['torch._dynamo', 'torch._inductor', 'torch.nn.attention.flex_attention', 'matplotlib', 'einops', 'tyro', 'tqdm']
    code = (
        'import sys, torch; before = set(sys.modules); from x_transformers import Decoder, TransformerWrapper; '
        'Decoder(dim=8, depth=1, heads=1); torch.set_default_device("meta"); '
        'TransformerWrapper(num_tokens=8, max_seq_len=8, attn_layers=Decoder(dim=8, depth=1)); '
        'print(*(set(sys.modules) - before))'
    )
    new = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.split()
    assert 'x_transformers' in new
    assert [name for name in heavy if name in new] == []
    assert [name for name in new if name.split('.')[0] == 'sympy'] == []
