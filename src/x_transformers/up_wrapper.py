"""Universal pre-training on the output of random machines, https://arxiv.org/abs/2506.20057."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from x_transformers.autoregressive_wrapper import AutoregressiveWrapper
from x_transformers.embedding.ids import token_ids
from x_transformers.flags.calls import MachineGenerateOptions
from x_transformers.flags.fit import check_future, check_module, check_net
from x_transformers.flags.objectives import MachineOptions, PretrainOptions, options
from x_transformers.generation.prompts import checked_length
from x_transformers.generation.sampling import check_temperature, gumbel_sample
from x_transformers.layers.arguments import check_number
from x_transformers.module import Module
from x_transformers.tensor_types import Float, Int


def random_sequences(
    num_tokens: int,
    seq_len: int,
    num_samples_random: int,
    num_samples_constant: int,
    shuffle: bool = True,
    device: torch.device | str | None = None,
) -> Int[Tensor, 'b n']:
    """Rows of uniform ids and rows that repeat one id, the same random one in all of them."""
    for name, count, low in (
        ('num_tokens', num_tokens, 1),
        ('seq_len', seq_len, 0),
        ('num_samples_random', num_samples_random, 0),
        ('num_samples_constant', num_samples_constant, 0),
    ):
        check_number(name, count, low=low)
    noise = torch.randint(0, num_tokens, (num_samples_random, seq_len), device=device)
    token = torch.randint(0, num_tokens, (1, 1), device=device)
    rows = torch.cat((noise, token.expand(num_samples_constant, seq_len)))
    return rows[torch.randperm(len(rows), device=device)] if shuffle else rows


class SyntheticDataGenerator(Module):
    """A recurrent network with random weights: the machine that generates the training data.

    Args:
        dim, num_tokens: width of the embedding, size of the vocabulary.
        max_seq_len: ``generate`` returns at most this many tokens.
        hidden_size: of the recurrent network; ``dim`` by default.
        use_gru: a GRU in place of an LSTM.
        network_klass: another recurrent class, called as ``klass(dim, hidden_size, batch_first=True)``.
        rescale_recurrent: also scale the recurrent weights by a random factor, as the paper does; the original scales only the
            output map.
    """

    def __init__(
        self,
        dim: int,
        num_tokens: int,
        max_seq_len: int = 512,
        hidden_size: int | None = None,
        use_gru: bool = False,
        network_klass: Any = None,
        rescale_recurrent: bool = False,
    ) -> None:
        super().__init__()
        options(MachineOptions, 'SyntheticDataGenerator', locals())
        self.num_tokens, self.max_seq_len = num_tokens, max_seq_len
        self.rescale_recurrent = rescale_recurrent
        hidden_size = hidden_size or dim
        klass = network_klass or (nn.GRU if use_gru else nn.LSTM)
        self.embed = nn.Embedding(num_tokens, dim)
        self.net = klass(dim, hidden_size, batch_first=True)
        self.to_logits = nn.Linear(hidden_size, num_tokens, bias=False)
        self.init_own()

    def init_own(self) -> None:
        """Scale what the children drew: the factors decide how chaotic the machine is."""
        weights = [module.weight for module in self.modules() if isinstance(module, nn.Linear)]
        if self.rescale_recurrent:
            weights += [weight for name, weight in self.net.named_parameters() if 'weight' in name]
        with torch.no_grad():
            for weight in dict.fromkeys(weights):
                weight.mul_(weight.new_empty(()).uniform_(0.0, 1.1))

    def reset_(self) -> None:
        """Draw another machine."""
        self.reset_parameters()

    def forward(self, input: Int[Tensor, 'b n'], hiddens: Any = None) -> tuple[Float[Tensor, 'b n v'], Any]:
        """Logits, and the state to go on from."""
        embedded = self.embed(token_ids(input, 'input'))
        out, hidden = self.net(embedded) if hiddens is None else self.net(embedded, hiddens)
        logits: Tensor = self.to_logits(out)
        return logits, hidden

    @torch.no_grad()
    def generate(
        self,
        length: int,
        seed: Int[Tensor, 'b n'] | None = None,
        condition: Int[Tensor, 'b m'] | None = None,
        temperature: float = 1e-4,
        generator: torch.Generator | None = None,
    ) -> Int[Tensor, 'b k']:
        """Go on from seed and condition for ``length`` tokens; the newest ``max_seq_len`` of prefix and samples."""
        options(MachineGenerateOptions, 'generate', locals())
        seed = None if seed is None else token_ids(seed, 'seed')
        condition = None if condition is None else token_ids(condition, 'condition')
        parts = [part for part in (seed, condition) if part is not None]
        if not parts:
            raise ValueError('seed or condition must be given, got neither.')
        for name, part in (('seed', seed), ('condition', condition)):
            if part is not None and (part.ndim != 2 or len(part) != len(parts[0])):
                raise ValueError(f'{name} must be tokens of shape ({len(parts[0])}, length), got {tuple(part.shape)}')
        check_temperature(temperature)
        prefix = torch.cat(parts, dim=-1)
        out = [prefix]
        step, hidden = prefix, None
        for _ in range(checked_length(length)):
            logits, hidden = self.forward(step, hidden)
            step = gumbel_sample(logits[:, -1], temperature=temperature, generator=generator)[:, None]
            out.append(step)
        return torch.cat(out, dim=-1)[:, -self.max_seq_len :]


class UniversalPretrainWrapper(Module):
    """Trains a model on a buffer of sequences that random machines rewrite (algorithm 1 of the paper).

    Args:
        model: a causal ``TransformerWrapper``.
        data_generator: the machine; one of the model's width by default.
        buffer_size: rows of the buffer, 20 batches by default; must be larger than a batch.
        num_reset: rows replaced by fresh noise at each step, half of them constant; even.
        batch_size, seq_len, seed_length: of what is drawn, made and cropped.
        reset_turing_machine_every: draw another machine after so many steps; 0 never.
        keep_buffer_on_cpu: the buffer stays out of the state dict and on the CPU.
        allow_future: also train a model whose stack shows each token those after it, such as an ``Encoder``.
    """

    step: Tensor
    synth_data_buffer: Tensor

    def __init__(
        self,
        model: nn.Module,
        data_generator: SyntheticDataGenerator | None = None,
        buffer_size: int | None = None,
        num_reset: int = 20,
        batch_size: int = 32,
        seq_len: int = 512,
        seed_length: int = 8,
        reset_turing_machine_every: int = 0,
        keep_buffer_on_cpu: bool = False,
        *,
        allow_future: bool = False,
    ) -> None:
        super().__init__()
        check_module(model, 'UniversalPretrainWrapper', 'model', needs=('attn_layers', 'num_tokens'))
        stack: Any = model.attn_layers
        self.num_tokens = int(model.num_tokens)  # type: ignore[arg-type]
        buffer_size = 20 * batch_size if buffer_size is None else buffer_size
        options(PretrainOptions, 'UniversalPretrainWrapper', locals())
        check_net(model, 'UniversalPretrainWrapper', name='model', told_nothing=True)
        check_future(model, {}, 'UniversalPretrainWrapper', allowed=allow_future)
        if data_generator is None:
            data_generator = SyntheticDataGenerator(stack.dim, self.num_tokens, max_seq_len=seq_len)
        check_machine(data_generator, model, seq_len)
        self.model = model
        self.data_generator = data_generator
        self.seq_len, self.batch_size, self.seed_length = seq_len, batch_size, seed_length
        self.num_reset = num_reset
        self.reset_turing_machine_every = reset_turing_machine_every
        self.keep_buffer_on_cpu = keep_buffer_on_cpu
        self.ar_wrapped = AutoregressiveWrapper(model, allow_future=allow_future)
        if keep_buffer_on_cpu:
            # no buffer of the module: neither moved with it nor saved
            self.synth_data_buffer = torch.empty(buffer_size, seq_len, dtype=torch.long, device='cpu')
        else:
            self.register_buffer('synth_data_buffer', torch.empty(buffer_size, seq_len, dtype=torch.long))
        self.register_buffer('step', torch.empty((), dtype=torch.long))
        self.init_own()

    def init_own(self) -> None:
        """Half of the buffer is noise, half constant rows."""
        buffer = self.synth_data_buffer
        half = len(buffer) // 2
        buffer.copy_(random_sequences(self.num_tokens, self.seq_len, half, len(buffer) - half, device=buffer.device))
        self.step.zero_()

    @property
    def device(self) -> torch.device:
        return self.step.device

    def draw(self, count: int) -> Int[Tensor, 'k']:
        """Distinct row numbers, on the buffer's own device."""
        return torch.randperm(len(self.synth_data_buffer), device=self.synth_data_buffer.device)[:count]

    def crops(self, rows: Int[Tensor, 'b n']) -> Int[Tensor, 'b k']:
        """A random window of ``seed_length`` tokens of each row."""
        starts = torch.randint(0, self.seq_len - self.seed_length, (len(rows), 1), device=rows.device)
        return rows.gather(1, starts + torch.arange(self.seed_length, device=rows.device))

    @torch.no_grad()
    def advance(self) -> None:
        """One step of the machine: new rows in place of those it was conditioned on, fresh noise in some others."""
        buffer = self.synth_data_buffer
        conditioned = self.draw(self.batch_size)
        conditions = buffer[conditioned].to(self.device)
        seeds = self.crops(buffer[self.draw(self.batch_size)]).to(self.device)
        generated = self.data_generator.generate(self.seq_len, seed=seeds, condition=conditions)[:, -self.seq_len :]
        self.step.add_(1)
        if self.reset_turing_machine_every > 0 and int(self.step) % self.reset_turing_machine_every == 0:
            self.data_generator.reset_()
        half = self.num_reset // 2
        buffer[self.draw(self.num_reset)] = random_sequences(self.num_tokens, self.seq_len, half, half, device=buffer.device)
        buffer[conditioned] = generated.to(buffer.device)

    def forward(self) -> Float[Tensor, '']:
        """Run the machine, then return the autoregressive loss on a batch drawn from the buffer."""
        self.advance()
        loss: Tensor = self.ar_wrapped(self.synth_data_buffer[self.draw(self.batch_size)].to(self.device))
        return loss


def check_machine(machine: SyntheticDataGenerator, model: nn.Module, seq_len: int) -> None:
    broken = []
    if machine.num_tokens > int(model.num_tokens):  # type: ignore[arg-type]
        broken.append(f'data_generator writes {machine.num_tokens} kinds of tokens, the model knows {model.num_tokens}')
    if machine.max_seq_len < seq_len:
        broken.append(f'data_generator.max_seq_len must be at least seq_len {seq_len}, got {machine.max_seq_len}')
    longest = getattr(model, 'max_seq_len', 0)
    if getattr(model, 'has_absolute_positions', False) and longest < seq_len:
        broken.append(f'seq_len is {seq_len}, but the model has absolute positions for {longest} tokens only')
    if broken:
        raise ValueError('; '.join(broken))
