"""Promises to code outside: keywords in their order, attributes, import paths, pickles, what the sources never contain."""

from __future__ import annotations

import ast
import importlib
import inspect
import io
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import x_transformers
from tests.citations import missing
from tests.laws import groups
from x_transformers import (
    Attention,
    AttentionPool,
    AutoregressiveWrapper,
    Decoder,
    Encoder,
    FeedForward,
    TransformerWrapper,
    ViTransformerWrapper,
    XTransformer,
)
from x_transformers.attend import Attend
from x_transformers.continuous import ContinuousTransformerWrapper
from x_transformers.embedding.build import build_entrance, build_positions, build_stack
from x_transformers.embedding.call import CALLED, call_of
from x_transformers.flags.attention import AttentionFlags
from x_transformers.flags.feedforward import FeedForwardFlags
from x_transformers.flags.other_inputs import ContinuousFlags, MultiInputFlags, XValFlags
from x_transformers.flags.parts import PARTS, SET_BY_STACK
from x_transformers.flags.stack import StackFlags
from x_transformers.flags.vision import VisionFlags
from x_transformers.flags.wrapper import WrapperFlags
from x_transformers.multi_input import MultiInputTransformerWrapper
from x_transformers.returns import RETURNED, ReturnSpec
from x_transformers.stack_wrapper import Ends, StackWrapper
from x_transformers.x_transformers import AttentionLayers, RotaryEmbedding, apply_rotary_pos_emb
from x_transformers.xval import XValTransformerWrapper

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / 'src' / 'x_transformers'
SMALL: dict[str, Any] = {'dim': 16, 'depth': 2, 'heads': 2, 'attn_dim_head': 8, 'verbose': False}


def words(text: str) -> list[str]:
    return text.split()


# ---------------------------------------------------------------- keywords, in the order of 2.16.1

ATTENTION = """
dim dim_head dim_context heads causal flash pre_talking_heads post_talking_heads pre_scale_post_talking_heads head_scale
qk_norm qk_norm_groups qk_norm_scale qk_norm_dim_scale value_rmsnorm l2_distance sigmoid gumbel_softmax gumbel_softmax_temp
gumbel_softmax_hard custom_attn_fn hard sparse_topk sparse_topk_straight_through num_mem_kv dropout sublayer_dropout on_attn
gate_value_heads swiglu_values gate_values zero_init_output max_attend_past qkv_receive_diff_residuals
orthog_projected_values orthog_projected_values_per_head onnxable attend_sdp_kwargs add_zero_kv head_learned_sink
rotate_num_heads data_dependent_alibi data_dependent_alibi_per_row data_dependent_alibi_per_row_dim_head
data_dependent_alibi_kwargs use_cope cope_max_pos cope_soft_onehot_pos cope_talking_heads softclamp_logits
logit_softclamp_value learned_value_residual_mix laser laser_softclamp_value use_latent_q dim_latent_q use_latent_kv
dim_latent_kv latent_rope_subheads hybrid_module hybrid_mask_kwarg hybrid_fold_axial_dim hybrid_learned_mix one_kv_head
kv_heads value_dim_head dim_out selective cog_signed flash_pack_seq
"""
STACK = """
dim depth heads causal cross_attend only_cross use_scalenorm use_rmsnorm use_dynamic_tanh dynamic_tanh_init_alpha use_derf
use_simple_rmsnorm use_adaptive_layernorm use_adaptive_rmsnorm use_adaptive_layerscale norm_add_unit_offset dim_condition
adaptive_condition_mlp adaptive_condition_mlp_expansion alibi_pos_bias alibi_num_heads rel_pos_bias rel_pos_num_buckets
rel_pos_max_distance dynamic_pos_bias dynamic_pos_bias_log_distance dynamic_pos_bias_mlp_depth dynamic_pos_bias_norm
rel_pos_kwargs rotary_pos_emb rotary_emb_dim rotary_xpos rotary_interpolation_factor rotary_xpos_scale_base
rotary_base_rescale_factor rotate_num_heads polar_pos_emb polar_bias_uniform_init weight_tie_layers custom_layers
layers_execute_order sandwich_coef par_ratio macaron residual_attn cross_residual_attn pre_norm pre_norm_has_final_norm
sandwich_norm gate_residual scale_residual scale_residual_constant residual_fn_kwargs shift_tokens softclamp_output
softclamp_output_value zero_init_branch_output layer_dropout cross_attn_tokens_dropout disable_abs_pos_emb use_layerscale
layerscale_init_value unet_skips integrate_layers layer_integrate_use_softmax num_residual_streams
hyper_conn_sinkhorn_iters qkv_receive_diff_residuals reinject_input learned_reinject_input_gate add_value_residual
learned_value_residual_mix verbose
"""
WRAPPER = """
num_tokens max_seq_len attn_layers embed_num_tokens emb_dim max_mem_len shift_mem_down emb_dropout post_emb_norm
num_memory_tokens memory_tokens_interspersed_every tie_embedding logits_dim return_only_embed num_output_heads
use_abs_pos_emb scaled_sinu_pos_emb l2norm_embed recycling train_max_recycle_steps emb_frac_gradient attn_z_loss_weight
average_pool_embed use_cls_token num_cls_tokens attn_pool num_pooled_tokens attn_pool_depth dim_pooled_tokens
squeeze_out_last_dim token_emb mixture_of_softmax mixture_of_softmax_k sigsoftmax_logits ff_deep_embed to_logits
add_continuous_pred_head input_not_include_cache
"""
FEED_FORWARD = """
dim dim_out mult glu glu_mult_bias swish relu_squared solu custom_activation post_act_ln dropout sublayer_dropout no_bias
zero_init_output
"""
VISION = 'image_size patch_size attn_layers channels num_classes post_emb_norm num_register_tokens emb_dropout'
POOL = """
dim num_pooled_tokens dim_context add_residual depth heads dim_head use_transformer_blocks squeeze_output attn_kwargs
"""
ATTEND = """
dropout causal heads pre_talking_heads post_talking_heads pre_scale_post_talking_heads sparse_topk
sparse_topk_straight_through scale qk_norm l2_distance sigmoid gumbel_softmax gumbel_softmax_temp gumbel_softmax_hard
cog_signed custom_attn_fn hard selective flash softclamp_logits logit_softclamp_value add_zero_kv head_learned_sink cope
onnxable sdp_kwargs flash_pack_seq
"""
ATTENTION_CALL = """
x context mask context_mask attn_mask rel_pos attn_bias rotary_pos_emb context_rotary_pos_emb polar_pos_emb pos prev_attn mem
mem_mask return_intermediates cache value_residual additional_key_values additional_key_value_mask kv_input_residual
flash_pack_seq_kwargs
"""
STACK_CALL = """
x context mask context_mask attn_mask self_attn_kv_mask mems mem_masks seq_start_pos seq_pos_offset cache
input_not_include_cache cache_age return_hiddens rotary_pos_emb polar_pos_emb pos context_pos attn_bias deep_embeds_and_ids
self_attn_additional_kv additional_kv_mask detach_additional_kv route_additional_kv_to_top condition in_attn_cond
layers_execute_order self_attn_kv_residuals cross_attn_kv_residuals flash_pack_seq_kwargs flash_pack_seq_context_kwargs
"""
WRAPPER_CALL = """
x return_embeddings return_logits_and_embeddings return_intermediates return_embeddings_and_intermediates
return_logit_entropies return_next_embed_pred mask return_mems return_attn mems mem_masks recycle_steps pos prepend_embeds
prepend_mask embed_ids sum_embeds return_attn_z_loss attn_z_loss_weight seq_start_pos cache input_not_include_cache
token_emb_kwargs to_logits_kwargs
"""


def keywords(thing: Any) -> list[str]:
    return [name for name in inspect.signature(thing).parameters if name not in ('self', 'kwargs')]


@pytest.mark.parametrize(
    ('thing', 'names'),
    [
        (AttentionLayers, STACK),
        (TransformerWrapper, WRAPPER),
        (FeedForward, FEED_FORWARD),
        (ViTransformerWrapper, VISION),
        (AttentionPool, POOL),
        (Attention.forward, ATTENTION_CALL),
        (AttentionLayers.forward, STACK_CALL),
        (TransformerWrapper.forward, WRAPPER_CALL),
    ],
    ids=lambda value: getattr(value, '__qualname__', ''),
)
def test_keywords_stand_in_their_order_and_ours_behind(thing: Any, names: str) -> None:
    wanted = names.split()
    assert keywords(thing)[: len(wanted)] == wanted


@pytest.mark.parametrize(('thing', 'names'), [(Attention, ATTENTION), (Attend, ATTEND)], ids=['Attention', 'Attend'])
def test_keywords_that_can_only_be_named_are_all_there(thing: Any, names: str) -> None:
    assert set(names.split()) <= set(keywords(thing))


def test_signatures_of_subclasses_and_of_other_constructors() -> None:
    assert keywords(Decoder) == [name for name in keywords(AttentionLayers) if name != 'causal']
    assert inspect.signature(Attention).parameters['dim_head'].default == 64
    assert inspect.signature(TransformerWrapper).parameters['num_tokens'].default is inspect.Parameter.empty
    assert inspect.signature(FeedForward).parameters['mult'].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD

    class Same(Attention):
        pass

    class Other(Attention):
        def __init__(self, width: int) -> None:
            super().__init__(width)

    assert keywords(Same) == keywords(Attention)
    assert keywords(Other) == ['width']
    assert 'numerical_token_id' in keywords(x_transformers.XValTransformerWrapper)
    assert 'probabilistic' in keywords(x_transformers.ContinuousTransformerWrapper)
    assert 'num_tokens' in keywords(x_transformers.MultiInputTransformerWrapper)


# ---------------------------------------------------------------- what others do with parts


def test_rotary_as_speech_packages_use_it() -> None:
    """They import these two alone, make angles from a length, and turn (b h n d) or (b n d) of which some channels rotate."""
    rotary = RotaryEmbedding(8)
    freqs, scale = rotary.forward_from_seq_len(6)
    assert freqs.shape == (1, 6, 8)
    assert scale == 1.0
    t = torch.randn(2, 3, 6, 12)
    turned = apply_rotary_pos_emb(t, freqs, scale)
    torch.testing.assert_close(turned[..., 8:], t[..., 8:], rtol=0, atol=0)
    for place in range(6):
        for pair in range(4):
            angle = torch.tensor(place * 10000 ** (-2 * pair / 8))
            even, odd = t[..., place, 2 * pair], t[..., place, 2 * pair + 1]
            torch.testing.assert_close(turned[..., place, 2 * pair], even * angle.cos() - odd * angle.sin())
            torch.testing.assert_close(turned[..., place, 2 * pair + 1], odd * angle.cos() + even * angle.sin())
    # without heads, the last rows for a shorter t, and the inverse scale for keys as those packages write it
    torch.testing.assert_close(apply_rotary_pos_emb(t[:, 0, -2:], freqs, scale), turned[:, 0, -2:])
    torch.testing.assert_close(apply_rotary_pos_emb(t, freqs, scale**-1), turned)
    torch.testing.assert_close(rotary(torch.arange(6))[0], freqs)
    assert apply_rotary_pos_emb(t.bfloat16(), freqs).dtype == torch.bfloat16
    assert list(rotary.state_dict()) == ['inv_freq']


def test_layers_unpack_as_norms_branch_and_residual() -> None:
    stack = Decoder(**SMALL, cross_attend=True)
    x, context = torch.randn(2, 5, 16), torch.randn(2, 4, 16)
    streams = x
    for kind, (norms, branch, residual) in zip(stack.layer_types, stack.layers, strict=True):
        before, behind, after = norms
        assert behind is None
        assert after is None
        branch_input, rest, extra = residual.prepare(streams)
        given = {'context': context} if kind == 'c' else {}
        streams = residual(branch(before(branch_input), **given), rest, **extra)
    torch.testing.assert_close(stack.final_norm(streams), stack(x, context=context))


def test_layer_dropouts_are_read_at_each_call() -> None:
    stack = Decoder(**SMALL).train()
    x = torch.randn(2, 5, 16)
    plain = stack(x)
    assert list(stack.layer_dropouts) == [0.0] * 4
    stack.layer_dropouts = [1.0] * 4
    torch.testing.assert_close(stack(x), stack.final_norm(x))
    stack.layer_dropouts[:] = [0.0] * 4
    torch.testing.assert_close(stack(x), plain)


def test_attributes_of_stacks_and_of_wrappers_around_wrappers() -> None:
    stack = Decoder(**SMALL, cross_attend=True)
    assert tuple(stack.layer_types) == ('a', 'c', 'f') * 2
    assert tuple(stack.layers_execute_order) == tuple(range(6))
    assert (stack.dim, stack.causal, stack.num_attn_layers, stack.can_cache_kv) == (16, True, 2, True)
    read = words("""
        attn_heads attn_dim_head layers disable_abs_pos_emb rotary_pos_emb polar_pos_emb rel_pos final_norm
        pre_norm sandwich_norm residual_attn cross_residual_attn cross_attend need_condition
        norm_need_condition dim_condition post_branch_fn_needs_condition adaptive_mlp num_residual_streams
        stream_emb layer_integrators skip_combines unet_skips reinject_input reinject_input_proj
        add_value_residual cross_attn_tokens_dropout
    """)
    assert not [name for name in read if not hasattr(stack, name)]
    net = TransformerWrapper(num_tokens=7, max_seq_len=12, attn_layers=Decoder(**SMALL))
    model = AutoregressiveWrapper(net)
    assert model.net is net
    assert model.max_seq_len == 12
    assert net.can_cache_kv
    assert not TransformerWrapper(num_tokens=7, max_seq_len=12, attn_layers=Decoder(**SMALL, attn_selective=True)).can_cache_kv
    both = XTransformer(
        dim=16, enc_num_tokens=7, enc_max_seq_len=8, enc_depth=1, dec_num_tokens=7, dec_max_seq_len=8, dec_depth=1
    )
    assert both.decoder.net.attn_layers.cross_attend
    assert both.encoder.attn_layers.dim == 16


@pytest.mark.parametrize(
    'build',
    [
        lambda: Decoder(**SMALL, rotary_embedding=True),
        lambda: Encoder(**SMALL, attn_qk_nrom=True),
        lambda: Attention(8, qk_nrom=True),
        lambda: FeedForward(8, gluu=True),
        lambda: TransformerWrapper(num_tokens=7, max_seq_len=8, attn_layers=Decoder(**SMALL), tie_embeddings=True),
        lambda: ViTransformerWrapper(image_size=4, patch_size=2, attn_layers=Encoder(**SMALL), channel=1),
    ],
)
def test_unknown_keywords_are_assertion_errors_too(build: Any) -> None:
    for kind in (AssertionError, TypeError, ValueError):
        with pytest.raises(kind, match='unrecognized kwargs'):
            build()


# ---------------------------------------------------------------- pickles


def models() -> Iterator[nn.Module]:
    torch.manual_seed(0)
    stack = Decoder(**SMALL, rotary_pos_emb=True, num_residual_streams=2, attn_qk_norm=True)
    yield AutoregressiveWrapper(TransformerWrapper(num_tokens=7, max_seq_len=8, attn_layers=stack))


def test_modules_travel_through_files() -> None:
    for model in models():
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        again = torch.load(file, weights_only=False)
        x = torch.randint(0, 7, (2, 6))
        torch.testing.assert_close(again(x), model(x))


@pytest.mark.parametrize(
    ('path', 'name'),
    [
        ('x_transformers', name)
        for name in words("""
            Attention FeedForward AttentionLayers Encoder Decoder CrossAttender PrefixDecoder
            TransformerWrapper XTransformer ViTransformerWrapper RMSNorm LayerNorm TokenEmbedding
            AbsolutePositionalEmbedding RotaryEmbedding Residual LayerIntermediates HyperConnection
            GLU CoPE AttentionPool
        """)
    ]
    + [('attend', 'Attend'), ('attend', 'Intermediates'), ('autoregressive_wrapper', 'AutoregressiveWrapper')],
)
def test_paths_in_old_pickles_are_found(path: str, name: str) -> None:
    """A pickle names a class by module and name; those of 2.16.1 were pickled as members of its big files."""
    by_old_path = f'cx_transformers.{path}\n{name}\n.'.encode()
    found = pickle.loads(by_old_path)
    assert found is getattr(importlib.import_module(f'x_transformers.{path}'), name)
    # ours are found where they live
    assert pickle.loads(pickle.dumps(found)) is found


def test_a_module_pickled_under_the_old_path_is_a_module() -> None:
    norm = x_transformers.RMSNorm(4)
    text = pickle.dumps(norm, protocol=0)
    old = text.replace(b'cx_transformers.norms\nRMSNorm', b'cx_transformers.x_transformers\nRMSNorm')
    assert old != text
    x = torch.randn(3, 4)
    torch.testing.assert_close(pickle.loads(old)(x), norm(x))


# ---------------------------------------------------------------- flags

ALL_FLAGS = (
    AttentionFlags,
    FeedForwardFlags,
    StackFlags,
    WrapperFlags,
    VisionFlags,
    ContinuousFlags,
    XValFlags,
    MultiInputFlags,
)
PREFIXES = {AttentionFlags: ('attn_', ''), FeedForwardFlags: ('ff_', '')}


def names_in_tests() -> set[str]:
    sources = [path.read_text(encoding='utf-8') for path in (ROOT / 'tests').rglob('*.py') if path != Path(__file__)]
    return set(re.findall(r'\w+', '\n'.join(sources)))


@pytest.mark.parametrize('cls', ALL_FLAGS, ids=lambda cls: cls.__name__)
def test_every_flag_has_a_sentence_and_a_test(cls: Any) -> None:
    used = names_in_tests()
    for name, field in cls.flag_fields().items():
        assert field.metadata['says'].endswith('.'), name
        assert any(prefix + name in used for prefix in PREFIXES.get(cls, ('',))), f'no test names {cls.__name__}.{name}'


# flags of a stack that no law group sets, and where they are tested
NO_LAW = {
    # the laws build their stacks with these
    'dim': 'tests/laws/combination.py::flags',
    'depth': 'tests/laws/combination.py::flags',
    'cross_attend': 'tests/laws/combination.py::flags',
    'verbose': 'tests/laws/combination.py::flags',
    # fixed by the classes of which laws are checked
    'causal': 'tests/layers/test_stack.py::test_attributes_that_others_read',
    'only_cross': 'tests/layers/test_plan.py::test_layouts',
    # widths that a stack does not allow to differ
    'attn_dim_out': 'tests/flags/test_rules.py::test_widths_of_branches_are_those_of_the_stack',
    'ff_dim_out': 'tests/flags/test_rules.py::test_widths_of_branches_are_those_of_the_stack',
    'attn_dim_context': 'tests/flags/test_rules.py::test_widths_of_branches_are_those_of_the_stack',
    # laws of their own
    'attn_flash_pack_seq': 'tests/layers/test_packing.py::test_packed_sequences_are_alone_under_every_flag',
    'gradient_checkpointing': 'tests/laws/laws.py::checkpoints_agree',
}


def test_every_flag_of_a_stack_has_a_law() -> None:
    ruled = {name for group in groups.GROUPS for name in group.flags}
    flags = set(StackFlags.flag_fields())
    flags |= {part + name for part in ('attn_', 'ff_') for name in PARTS[part].flag_fields() if name not in SET_BY_STACK}
    assert flags - ruled == set(NO_LAW), 'a new flag belongs into a group of tests/laws/groups.py'


@pytest.mark.parametrize(('name', 'citation'), NO_LAW.items())
def test_what_has_no_law_has_the_test_that_is_named(name: str, citation: str) -> None:
    assert not missing(citation, name)


# ---------------------------------------------------------------- sources


def sources() -> list[tuple[Path, ast.Module]]:
    return [(path, ast.parse(path.read_text(encoding='utf-8'))) for path in sorted(PACKAGE.rglob('*.py'))]


def test_no_assert_in_the_package() -> None:
    found = [f'{path.name}:{n.lineno}' for path, tree in sources() for n in ast.walk(tree) if isinstance(n, ast.Assert)]
    assert not found, 'python -O removes assertions: raise an error with a sentence'


ALLOWED = {'torch', 'einops', 'safetensors', 'x_transformers', *sys.stdlib_module_names}
# what may be used besides, imported when it is asked for: extras, by the folder, and kernels that look for their packages
ALLOWED_IN = {
    'cli': {'tyro', 'tqdm'},
    'training': {'tensorboard', 'numpy', 'pyarrow', 'sentencepiece', 'tiktoken', 'tokenizers', 'zstandard'},
    'evidence': {'jinja2', 'numpy', 'scipy', 'sklearn'},
    'export': {'onnxruntime', 'onnxscript'},
    'hf': {'tokenizers', 'transformers'},
    'saving': {'huggingface_hub', 'numpy'},
    'kernels': {'flash_attn'},
    'mixers': {'fla'},
    'drawing.py': {'cycler', 'matplotlib'},
}


def imported(tree: ast.AST) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module or '', node.lineno


def test_nothing_else_is_imported() -> None:
    strange = [
        f'{path.relative_to(PACKAGE)}:{line} {name}'
        for path, tree in sources()
        for name, line in imported(tree)
        if name.split('.')[0] not in ALLOWED.union(*(ALLOWED_IN.get(part, set()) for part in path.relative_to(PACKAGE).parts))
    ]
    assert not strange


# they train, or are asked for by those who do; nothing of the models imports them
TRAINS = {'training', 'cli', 'distributed', 'evidence'}


def test_only_what_trains_imports_the_trainer() -> None:
    inner = [
        f'{path.relative_to(PACKAGE)} imports {name}'
        for path, tree in sources()
        for name, _ in imported(tree)
        if name.startswith(tuple(f'x_transformers.{folder}' for folder in TRAINS))
        if path.relative_to(PACKAGE).parts[0] not in TRAINS
        if path.name != '__main__.py'
    ]
    assert not inner


@pytest.mark.parametrize('module', ['x_transformers', 'attend', 'autoregressive_wrapper', 'continuous', 'up_wrapper', 'dpo'])
def test_modules_load_nothing_heavy(module: str) -> None:
    heavy = ('torch._dynamo', 'torch._inductor', 'torch.nn.attention.flex_attention', 'matplotlib', 'tqdm', 'tyro', 'sklearn')
    code = (
        'import sys, torch; before = set(sys.modules); '
        f'import x_transformers.{module}; '
        f'print([m for m in {heavy!r} if m in sys.modules and m not in before])'
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == '[]'


SHAPED = re.compile(r"\b(?:Bool|Complex|Float|Int|Shaped)\[Tensor, '[^']*'\]")


def without_shape(tree: ast.AST) -> Iterator[str]:
    """(function, argument) of every tensor whose annotation tells neither kind nor axes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            args = node.args
            for arg in [*args.posonlyargs, *args.args, *args.kwonlyargs, *filter(None, (args.vararg, args.kwarg))]:
                said = '' if arg.annotation is None else ast.unparse(arg.annotation)
                if re.search(r'\bTensor\b', SHAPED.sub('', said)):
                    yield f'{node.name}: {arg.arg}'


MODELS = (TransformerWrapper, MultiInputTransformerWrapper, ContinuousTransformerWrapper, XValTransformerWrapper)


@pytest.mark.parametrize('model', MODELS)
def test_models_are_composed_of_their_ends(model: Any) -> None:
    """A model is its constructor and its forward: it overrides nothing of the forward that all share."""
    assert not (vars(model).keys() & vars(StackWrapper).keys()) - {'__init__', '__module__', '__doc__', '__annotations__'}


@pytest.mark.parametrize('model', MODELS)
def test_every_argument_of_a_forward_is_declared(model: Any) -> None:
    """They are collected by name, so that one that nobody declares would be dropped in silence."""
    of_loops = {name for name in keywords(model.forward) if name.startswith('looped_')}
    known = {*CALLED, *(full for _, full in RETURNED), *of_loops}
    known |= {'x', 'x_num', 'input_not_include_cache', 'attn_z_loss_weight', 'transform_block_inputs'}
    assert set(keywords(model.forward)) <= known


def test_a_model_of_ones_own_is_two_functions() -> None:
    class Grid(StackWrapper):
        def __init__(self, stack: AttentionLayers) -> None:
            super().__init__(
                Ends(lambda model, x, call, rows: model.project_in(x), lambda model, h, call, whole: (h.sum(-1), h))
            )
            self.flags = ContinuousFlags(attn_layers=stack)
            self.project_in = nn.Linear(3, stack.dim)
            build_positions(self, self.flags, stack)
            build_entrance(self, self.flags, stack)
            build_stack(self, self.flags, stack)
            self.init_own()

        def forward(self, x: Tensor, mask: Any = None, mems: Any = None, mem_masks: Any = None, cache: Any = None) -> Any:
            kwargs, input_not_include_cache = {}, None
            return self.run(call_of(self, x, locals()), ReturnSpec())

    model = Grid(Encoder(**SMALL)).eval()
    x = torch.randn(2, 5, 3)
    assert torch.allclose(model(x), model.attn_layers(model.project_in(x)).sum(-1))


def test_tensor_arguments_tell_their_shapes() -> None:
    """``tests/shapes.py`` checks that they are true."""
    found = [f'{path.relative_to(PACKAGE)}: {each}' for path, tree in sources() for each in without_shape(tree)]
    assert not found, "write Float[Tensor, 'b n d'], or Shaped[Tensor, '...'] where every tensor will do"


def test_an_argument_without_shape_is_found() -> None:
    source = "def f(a: Tensor, b: Float[Tensor, 'b n'], *c: tuple[Tensor, int], d: Callable[[Tensor], int] | None = None): ..."
    assert list(without_shape(ast.parse(source))) == ['f: a', 'f: d', 'f: c']


# what users import from several modules, as upstream has it or as the package documents it, and what every command has
PUBLIC_TWICE = words("""
LossBreakdown Losses Step cast_tuple explain gumbel_noise gumbel_sample log masked_mean top_k
main parse parser __getattr__
""")


def defined(tree: ast.Module) -> Iterator[str]:
    """Functions and classes of a module, and the names that it gives to types; those of one letter are variables."""
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Assign):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
            yield from (name for name in names if name[0].isupper() and not name.isupper())


def test_a_name_means_one_thing() -> None:
    found: dict[str, set[str]] = {}
    for path, tree in sources():
        for name in defined(tree):
            found.setdefault(name, set()).add(path.relative_to(PACKAGE).as_posix())
    twice = {name: sorted(paths) for name, paths in found.items() if len(paths) > 1}
    assert not twice.keys() - set(PUBLIC_TWICE), f'{twice}: call one of them by what it does here'
    assert not set(PUBLIC_TWICE) - twice.keys(), 'these are defined once'


def test_functions_fit_a_screen_and_files_a_sitting() -> None:
    """A function's docstring is not counted; generated files neither."""
    long = []
    for path, tree in sources():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                lines = node.end_lineno - body[0].lineno + 1 if body else 0
                if lines > 60:
                    long.append(f'{path.name}: {node.name} has {lines} lines')
        count = len(path.read_text(encoding='utf-8').splitlines())
        if count > 450 and path.name != 'keywords.py':
            long.append(f'{path.name} has {count} lines')
    assert not long


def test_helpers_that_audio_packages_import() -> None:
    from x_transformers.autoregressive_wrapper import align_right, eval_decorator, top_k
    from x_transformers.x_transformers import pad_at_dim

    assert top_k(torch.tensor([[1.0, 3.0, 2.0]]), k=1).isfinite().tolist() == [[False, True, False]]
    assert pad_at_dim(torch.ones(2, 3), (1, 0), dim=0).shape == (3, 3)
    right: Tensor = align_right(torch.tensor([[1, 2, 0]]), torch.tensor([2]), pad_id=9)
    assert right[0].tolist()[-2:] == [1, 2]

    class Model(nn.Module):
        @eval_decorator
        def sample(self) -> bool:
            return self.training

    model = Model().train()
    assert model.sample() is False
    assert model.training


def test_no_forward_reads_its_local_names() -> None:
    """The compilers of older versions of torch cannot, in a function that another calls."""
    found = [
        path.name
        for path, tree in sources()
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef) and function.name == 'forward'
        for node in ast.walk(function)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == 'locals'
    ]
    assert not found, 'write the names out'
