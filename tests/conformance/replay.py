"""Recorded behaviour of x-transformers 2.16.1, replayed: weights and inputs go in, the recorded numbers must come out.

A case is ``NAME.json`` (what to build and call, what to compare) beside ``NAME.safetensors`` (``state.*``, ``in.*``,
``out.*``).
"""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn


def follow(value: Any, path: str) -> Any:
    """``1.hiddens.0``: numbers index, names are keys or attributes."""
    for part in path.split('.') if path else ():
        if isinstance(value, dict):
            value = value[part]
        else:
            value = value[int(part)] if part.isdigit() else getattr(value, part)
    return value


def public(name: str, module: str | None = None) -> Any:
    for where in filter(None, ('x_transformers', module)):
        found = getattr(importlib.import_module(where), name, None)
        if found is not None:
            return found
    raise AttributeError(f'{name} is not public')


@dataclass
class Case:
    spec: dict[str, Any]
    tensors: dict[str, Tensor]
    built: dict[str, Any] = field(default_factory=dict)
    bound: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path) -> Case:
        return cls(json.loads(path.read_text()), load_file(path.with_suffix('.safetensors')))

    def input(self, name: str) -> Tensor:
        if name not in self.inputs:
            wants_grad = name in self.spec.get('input_grads', ())
            self.inputs[name] = self.tensors[f'in.{name}'].clone().requires_grad_(wants_grad)
        return self.inputs[name]

    def value(self, item: Any) -> Any:
        if isinstance(item, list):
            return [self.value(each) for each in item]
        if not isinstance(item, dict):
            return item
        match item:
            case {'tensor': name}:
                tensor, span = self.input(name), item.get('along_dim1')
                return tensor if span is None else tensor[:, span[0] : span[1]]
            case {'class': name}:
                return self.call(public(name, item.get('module')), item)
            case {'torch': name}:
                return self.call(follow(torch, name), item)
            case {'torch_ref': name}:
                return follow(torch, name)
            case {'function': name}:
                return public(name, item.get('module'))
            case {'object': name}:
                return follow(self.built[name], item.get('path', ''))
            case {'bound': name}:
                return follow(self.bound[name], item.get('path', ''))
            case {'tuple': items}:
                return tuple(self.value(each) for each in items)
        return {key: self.value(each) for key, each in item.items()}

    def call(self, target: Any, item: dict[str, Any]) -> Any:
        return target(*self.value(item.get('args', [])), **self.value(item.get('kwargs', {})))

    def state_of(self, name: str) -> dict[str, Tensor]:
        prefix = f'state.{self.spec.get("state_of", {}).get(name, name)}.'
        return {key.removeprefix(prefix): value.clone() for key, value in self.tensors.items() if key.startswith(prefix)}

    def build(self) -> None:
        """Construct, load strictly, and check that the same state comes back out."""
        strict = self.spec.get('strict', True)
        for name, item in self.spec['build'].items():
            self.built[name] = self.value(item)
        for name, made in self.built.items():
            state = self.state_of(name)
            if state:
                made.load_state_dict(state, strict=strict)
            if state and strict:
                again = made.state_dict()
                assert again.keys() == state.keys(), f'{name}: keys differ: {sorted(again.keys() ^ state.keys())}'
                assert all(torch.equal(again[key], state[key]) for key in state), f'{name}: loaded values changed'
            if isinstance(made, nn.Module):
                made.train(self.spec.get('mode') == 'train')

    def gradient_summary(self) -> Tensor:
        """Norms and the largest magnitudes over all parameters: independent of names and layout."""
        parameters = {
            id(parameter): parameter.grad
            for made in self.built.values()
            if isinstance(made, nn.Module)
            for _, parameter in made.named_parameters()
            if parameter.grad is not None
        }
        flat = torch.cat([grad.double().flatten() for grad in parameters.values()] or [torch.zeros(1).double()])
        return torch.stack((flat.norm(), flat.abs().sum(), *flat.abs().topk(min(8, len(flat))).values)).float()

    def run(self) -> list[str]:
        """What differs from the record; empty if nothing does."""
        self.build()
        problems: list[str] = []
        for number, call in enumerate(self.spec['calls']):
            target = self.value(call['on'])
            result = self.call(getattr(target, call['method']) if 'method' in call else target, call)
            self.bound[call.get('bind', '')] = result
            where = self.value(call['where']) if 'where' in call else ...
            for path in call.get('compare', ()):
                got = follow(result, path)
                got = got.detach().clone() if isinstance(got, Tensor) else torch.tensor(got)
                problems += self.compare(f'{number}:{path}', got[where])
            if 'backward' in call:
                out = follow(result, call['backward'])[where]
                (out * torch.arange(out.numel()).cos().view(out.shape)).sum().backward()
                problems += self.compare(f'{number}:grad', self.gradient_summary())
                for name in self.spec.get('input_grads', ()):
                    grad = self.inputs[name].grad
                    problems += self.compare(f'{number}:grad.in.{name}', torch.zeros(()) if grad is None else grad.clone())
        return problems

    def compare(self, key: str, got: Tensor) -> list[str]:
        want, kind = self.tensors[f'out.{key}'], 'grad_' if ':grad' in key else ''
        atol, rtol = self.spec.get(f'{kind}atol', 1e-5), self.spec.get(f'{kind}rtol', 1e-4)
        if got.shape != want.shape or got.dtype != want.dtype:
            return [f'{key}: {got.dtype} {tuple(got.shape)}, recorded {want.dtype} {tuple(want.shape)}']
        if torch.allclose(got.double(), want.double(), atol=atol, rtol=rtol, equal_nan=True):
            return []
        gap = (got.double() - want.double()).abs().max().item()
        return [f'{key}: differs by {gap:.3g}']
