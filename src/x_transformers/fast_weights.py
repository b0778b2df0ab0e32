"""Test-time training: modules with weights per sample, trained while the model reads a sequence.

https://arxiv.org/abs/2512.23675
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import permutations
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap

from x_transformers.flags.constructors import SHARED
from x_transformers.flags.later_objectives import NextStateLossOptions, TargetLossOptions
from x_transformers.flags.objectives import options
from x_transformers.flags.signature import ClassSignature
from x_transformers.helpers import default
from x_transformers.latent_prediction import mlp
from x_transformers.layers.stack import Encoder
from x_transformers.module import Module, empty_parameter
from x_transformers.tensor_types import Bool, Float, Shaped

if TYPE_CHECKING:
    from typing import Unpack

    from x_transformers.flags.keywords import SharedKeywords

Parameters = dict[str, Tensor]
Path = str | tuple[str, str]

# of the iteration that brings singular values near one, https://kellerjordan.github.io/posts/muon
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


class FastWeights(Module):
    """A module whose parameters may differ from sample to sample: (b ...) in front of each.

    Without ``fast`` it is the module itself. Otherwise every sample of the first axis is run with its own parameters.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.fast: Parameters | None = None

    def start(self, batch: int, attached: bool) -> None:
        """A copy for each sample; if ``attached``, gradients add up in the parameters themselves."""
        self.fast = {
            name: (p if attached and p.requires_grad else p.detach().requires_grad_()).expand(batch, *p.shape)
            for name, p in self.module.named_parameters()
        }

    def forward(self, x: Shaped[Tensor, 'b ...'], *args: Any, **kwargs: Any) -> Any:
        if self.fast is None:
            return self.module(x, *args, **kwargs)
        if args or kwargs:
            raise ValueError(
                f'ttt_module_paths must name modules from one tensor to one tensor, got a {type(self.module).__name__}. '
                'Name the linear maps inside it.'
            )
        if x.shape[0] != next(iter(self.fast.values())).shape[0]:
            raise ValueError(f'x must have the batch of the fast weights, got {x.shape[0]} rows. Begin anew for another batch.')
        each = vmap(lambda parameters, row: functional_call(self.module, parameters, (row,)), randomness='different')
        return each(self.fast, x)


class LowRank(Module):
    """A linear map whose weight is its trained one plus ``weight_a @ weight_b``; only these two are trained on the way.

    ``replaces``: without the trained weight, as in 2.31.10. ``weight_a`` starts normal, ``weight_b`` at zero.
    """

    def __init__(self, linear: nn.Linear, rank: int, replaces: bool = False) -> None:
        super().__init__()
        self.weight_a = empty_parameter(linear.out_features, rank)
        self.weight_b = empty_parameter(rank, linear.in_features)
        self.weight = None if replaces else linear.weight
        self.bias = linear.bias
        self.init_own()

    @torch.no_grad()
    def init_own(self) -> None:
        nn.init.normal_(self.weight_a)
        nn.init.zeros_(self.weight_b)

    def forward(self, x: Float[Tensor, '... c']) -> Float[Tensor, '... d']:
        low: Tensor = (x @ self.weight_b.t()) @ self.weight_a.t()
        if self.weight is not None:
            return F.linear(x, self.weight, self.bias) + low
        return low if self.bias is None else low + self.bias


class EpisodicMemory(Module):
    """Learned keys and values for every self attention: [2, layers, heads, length, dim_head]."""

    def __init__(self, layers: int, heads: int, length: int, dim_head: int) -> None:
        super().__init__()
        self.mem_kv = empty_parameter(2, layers, heads, length, dim_head)
        self.init_own()

    @torch.no_grad()
    def init_own(self) -> None:
        nn.init.normal_(self.mem_kv, std=0.02)

    def forward(self, batch: Shaped[Tensor, '...']) -> Float[Tensor, '... 2 l h m d']:
        """``batch`` only says how many samples there are, on its first axis."""
        return self.mem_kv.expand(batch.shape[0], *self.mem_kv.shape) if batch.ndim else self.mem_kv


class EpisodicNet(Module):
    """A net whose self attentions also see an ``EpisodicMemory``."""

    def __init__(self, net: Any, length: int) -> None:
        super().__init__()
        flags = net.attn_layers.flags.attention
        if flags.dim_head != flags.value_dim:
            raise ValueError(
                f'keys and values must have one width with episodic_mem_len, got {flags.dim_head} and {flags.value_dim}. '
                'Leave out attn_value_dim_head.'
            )
        self.net = net
        self.episodic_mems: nn.Module = EpisodicMemory(
            net.attn_layers.num_attn_layers, flags.num_kv_heads, length, flags.dim_head
        )

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__('net'), name)

    def forward(self, x: Shaped[Tensor, 'b ...'], *args: Any, **kwargs: Any) -> Any:
        batch = x.new_empty(x.shape[0], dtype=torch.float32)
        keys, values = self.episodic_mems(batch).unbind(dim=1)
        pairs = list(zip(keys.unbind(dim=1), values.unbind(dim=1), strict=True))
        return self.net(x, *args, self_attn_additional_kv=pairs, **kwargs)


# ---------------------------------------------------------------- where the fast weights are


def module_at(net: nn.Module, path: str, name: str = 'ttt_module_paths') -> nn.Module:
    if not isinstance(path, str):
        raise ValueError(f'{name} must hold dotted paths of modules, got {path!r}. Name some of net.named_modules().')
    try:
        return net.get_submodule(path)
    except AttributeError:
        raise ValueError(f'{name} must name a module of the net, got {path!r}. Name one of net.named_modules().') from None


def put(net: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition('.')
    holder = net.get_submodule(parent) if parent else net
    if name not in holder._modules and isinstance(holder, EpisodicNet):
        holder = holder.net
    setattr(holder, name, module)


def make_fast(net: nn.Module, path: str) -> FastWeights:
    """The module at a dotted path of the net, wrapped in its place."""
    module = module_at(net, path)
    if isinstance(module, FastWeights):
        return module
    if not any(True for _ in module.parameters()):
        raise ValueError(
            f'ttt_module_paths: {path} must have parameters, got {module}. Name a module that has something to train.'
        )
    fast = FastWeights(module)
    put(net, path, fast)
    return fast


def pair_of(path: Any) -> tuple[str, str]:
    """(whose gradient, what it moves): a module and itself, unless a pair is given."""
    return tuple(path) if isinstance(path, (tuple, list)) and len(path) == 2 else (path, path)


def check_apart(paths: Iterable[str]) -> None:
    """Raise ValueError if a module and one inside of it are both to be trained on the way."""
    names = sorted(set(paths))
    for inner, outer in permutations(names, 2):
        if inner.startswith(f'{outer}.'):
            raise ValueError(
                f'ttt_module_paths and ttt_low_rank_paths must name modules apart from each other, got {outer!r} and '
                f'{inner!r}, which is a part of it. Leave out one of them.'
            )


def check_low_rank(net: nn.Module, path: str, rank: int) -> nn.Linear:
    """The linear map at this path, of which a part of this rank can be trained."""
    module = module_at(net, path, 'ttt_low_rank_paths')
    if not isinstance(module, nn.Linear):
        raise ValueError(f'ttt_low_rank_paths: {path} must be a linear map, got {type(module).__name__}.')
    if not 1 <= rank <= min(module.weight.shape):
        raise ValueError(f'ttt_low_rank_paths: the rank of {path} must lie in 1 to {min(module.weight.shape)}, got {rank}.')
    return module


def make_low_rank(net: nn.Module, path: str, rank: int, replaces: bool = False) -> None:
    put(net, path, LowRank(check_low_rank(net, path, rank), rank, replaces))


# ---------------------------------------------------------------- the update


def orthogonalized(gradient: Float[Tensor, 'b ... r c'], steps: int) -> Float[Tensor, 'b ... r c']:
    """The nearest matrix with singular values of one, roughly, by Newton and Schulz."""
    a, b, c = NEWTON_SCHULZ
    x: Tensor = gradient / gradient.flatten(-2).norm(dim=-1)[..., None, None].clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


class TestTimeTraining:
    """Which weights are trained along a sequence, and how.

    ``pairs`` name sources, whose gradients are taken, and targets, which they move.
    """

    __test__ = False  # not a test, whatever its name begins with

    def __init__(
        self,
        pairs: Sequence[tuple[FastWeights, FastWeights]],
        *,
        lr: float,
        weight_decay: float,
        muon_steps: int | None,
        muon_lr: float,
    ) -> None:
        self.pairs = pairs
        self.lr, self.weight_decay, self.muon_steps, self.muon_lr = lr, weight_decay, muon_steps, muon_lr
        for source, target in pairs:
            shapes = [[tuple(p.shape) for p in trained(each.module).values()] for each in (source, target)]
            if shapes[0] != shapes[1]:
                raise ValueError(
                    f'ttt_module_paths: source and target must have parameters of the same shapes, got {shapes[0]} and '
                    f'{shapes[1]}. Pair modules of one kind.'
                )

    @property
    def modules(self) -> list[FastWeights]:
        return list(dict.fromkeys(module for pair in self.pairs for module in pair))

    @contextmanager
    def of(self, batch: int, attached: bool) -> Iterator[None]:
        """Weights per sample, which are gone afterwards."""
        for module in self.modules:
            module.start(batch, attached)
        try:
            yield
        finally:
            for module in self.modules:
                module.fast = None

    def update(self, losses: Float[Tensor, ' b'], *, second_order: bool, keep_graph: bool) -> None:
        """One step down the gradient of each sample's loss."""
        sources = [source.fast or {} for source, _ in self.pairs]
        names = [list(trained(source.module)) for source, _ in self.pairs]
        wanted = [fast[name] for fast, each in zip(sources, names, strict=True) for name in each]
        gradients = iter(
            torch.autograd.grad(
                losses.sum(), wanted, create_graph=second_order, retain_graph=second_order or keep_graph, allow_unused=True
            )
        )
        for (_, target), each in zip(self.pairs, names, strict=True):
            moved = dict(target.fast or {})
            for own, gradient in zip(trained(target.module), [next(gradients) for _ in each], strict=True):
                if gradient is not None:
                    moved[own] = self._moved(moved[own], gradient)
            target.fast = moved

    def _moved(self, weight: Float[Tensor, 'b ...'], gradient: Float[Tensor, 'b ...']) -> Float[Tensor, 'b ...']:
        lr = self.lr
        if self.muon_steps is not None and gradient.ndim >= 3:
            lr, gradient = self.muon_lr, orthogonalized(gradient, self.muon_steps)
        moved = weight - lr * gradient - lr * self.weight_decay * weight
        return moved if moved.requires_grad else moved.requires_grad_()

    def detach(self) -> None:
        """Forget how the weights came about."""
        for module in self.modules:
            module.fast = {name: t.detach().requires_grad_() for name, t in (module.fast or {}).items()}


def trained(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that move: of a low-rank map its two factors, of any other module all."""
    named = dict(module.named_parameters())
    if isinstance(module, LowRank):
        return {name: named[name] for name in ('weight_a', 'weight_b')}
    return named


def sample_losses(losses: Float[Tensor, 'b ...'], counts: Bool[Tensor, 'b n']) -> Float[Tensor, ' b']:
    """Losses per token or per sample as losses per sample: means over the tokens that count."""
    if losses.ndim == 1:
        return losses
    return losses.masked_fill(~counts, 0.0).sum(dim=-1) / counts.sum(dim=-1).clamp(min=1)


# ---------------------------------------------------------------- losses of one's own


class TTTNextLatentPredictionLoss(Module):
    """How well the next hidden state is predicted from the present one; one loss per token.

    The state behind the last token of the window is taken to be the first. forward: (intermediates, mask) -> (b n), 0 where the
    state that is predicted is padding.
    """

    def __init__(self, dim: int, hidden_dim: int | None = None, num_layers: int = 3, loss_type: str = 'smooth_l1') -> None:
        super().__init__()
        options(NextStateLossOptions, 'TTTNextLatentPredictionLoss', locals())
        hidden = default(hidden_dim, dim)
        self.predictor = nn.Sequential(nn.LayerNorm(dim), *mlp([dim, *[hidden] * (num_layers - 1), dim]))
        self.measure = F.smooth_l1_loss if loss_type == 'smooth_l1' else F.mse_loss

    def forward(self, intermediates: Any, mask: Bool[Tensor, 'b n'] | None = None) -> Float[Tensor, 'b n']:
        hidden = intermediates.last_hidden
        target = hidden.detach().roll(-1, dims=1)
        losses: Tensor = self.measure(self.predictor(hidden), target, reduction='none').mean(dim=-1)
        # a prediction counts if what it predicts is no padding
        return losses if mask is None else losses.masked_fill(~mask.roll(-1, dims=1), 0.0)


class TTTMetaLearningTargetKLLoss(Module):
    """Divergence of a prediction from each hidden state from one that sees them all; one loss per token.

    forward: (intermediates, mask) -> (b n).

    Args:
        dim, num_classes: width of the hidden states, and of the prediction.
        depth, heads, dim_head: of the encoder that sees them all; ``kwargs``: its other flags.
    """

    __signature__: Any = ClassSignature(SHARED)

    def __init__(
        self, dim: int, num_classes: int, depth: int = 1, heads: int = 4, dim_head: int = 64, **kwargs: Unpack[SharedKeywords]
    ) -> None:
        super().__init__()
        options(TargetLossOptions, 'TTTMetaLearningTargetKLLoss', locals())
        self.encoder = Encoder(dim=dim, depth=depth, heads=heads, attn_dim_head=dim_head, **kwargs)
        self.to_meta_prediction = nn.Linear(dim, num_classes)
        self.to_prediction = nn.Linear(dim, num_classes)

    def forward(self, intermediates: Any, mask: Bool[Tensor, 'b n'] | None = None) -> Float[Tensor, 'b n']:
        hidden = intermediates.last_hidden
        wanted = self.to_meta_prediction(self.encoder(hidden, mask=mask)).log_softmax(dim=-1)
        predicted = self.to_prediction(hidden).log_softmax(dim=-1)
        losses: Tensor = (predicted.exp() * (predicted - wanted)).sum(dim=-1)
        return losses
