"""The interface of lm-evaluation-harness: likelihoods of continuations and texts, and greedy texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from x_transformers.autoregressive_wrapper import AutoregressiveWrapper
from x_transformers.tensor_types import Float
from x_transformers.training.build import device_of, reading_arguments
from x_transformers.training.errors import TrainingError
from x_transformers.training.tokens import Tokenizer

MOST = 256  # tokens that are written where a task does not say how many


class Answers:
    """What a model says of texts. A text begins behind the token that ends documents, or a line break where there is none.

    Args:
        model: token ids in, the next ones predicted; it stays on its device.
        tokenizer: as ``x_transformers.training.tokens`` has them.
    """

    def __init__(self, model: AutoregressiveWrapper, tokenizer: Tokenizer) -> None:
        self.model, self.tokenizer = model.eval(), tokenizer
        self.longest = int(model.max_seq_len)
        self.start = tokenizer.end if tokenizer.end is not None else self.encode('\n')[-1]

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode([text.encode()])[0])

    @torch.no_grad()
    def scores(self, ids: Sequence[int], count: int) -> tuple[float, bool]:
        """(log probability of the last ``count`` ids, at most as many as the model sees; whether each is the likeliest)."""
        seen = torch.tensor([list(ids)[-self.longest - 1 :]], device=device_of(self.model))
        logits: Float[Tensor, '1 n v'] = self.model.net(seen[:, :-1], **reading_arguments(self.model))
        asked, wanted = logits[0, -count:].float(), seen[0, -count:]
        said = asked.log_softmax(dim=-1).gather(-1, wanted[:, None])
        return float(said.sum()), bool((asked.argmax(dim=-1) == wanted).all())

    def likelihood(self, context: str, continuation: str) -> tuple[float, bool]:
        """Of a continuation behind a context. Blanks at the end of the context belong to the continuation's first token."""
        stripped = context.rstrip()
        whole, front = self.encode(context + continuation), self.encode(stripped)
        return self.scores([self.start, *whole], max(len(whole) - len(front), 1))

    def of_text(self, text: str) -> float:
        """Log probability of a whole text: each token once, behind as many others as the model sees at a time."""
        ids, total, done = [self.start, *self.encode(text)], 0.0, 1
        while done < len(ids):
            end = min(done + self.longest, len(ids))
            total += self.scores(ids[:end], end - done)[0]
            done = end
        return total

    def written(self, context: str, until: Sequence[str], most: int = MOST) -> str:
        """Greedily, up to the first of ``until``."""
        prompt = [self.start, *self.encode(context)][-max(self.longest - most, 1) :]
        start = torch.tensor([prompt], device=device_of(self.model))
        ids = self.model.generate(start, most, temperature=0.0)[0].tolist()
        text = self.tokenizer.decode(ids).decode(errors='replace')
        return text[: min((at for stop in until if stop and (at := text.find(stop)) >= 0), default=len(text))]


def for_harness(model: AutoregressiveWrapper, tokenizer: Tokenizer) -> Any:
    """The model as ``lm_eval.simple_evaluate(model=...)`` takes it. Raises TrainingError where lm-eval is not installed."""
    try:
        base: Any = import_module('lm_eval.api.model').LM
    except ModuleNotFoundError:
        raise TrainingError('for_harness needs lm-evaluation-harness: pip install lm-eval.') from None
    answers = Answers(model, tokenizer)

    class Harness(base):  # type: ignore[misc]  # a class that is known only where the package is
        def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            return [answers.likelihood(*request.args) for request in requests]

        def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
            return [answers.of_text(request.args[0]) for request in requests]

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
            return [greedy(answers, *request.args) for request in requests]

    return Harness()


def greedy(answers: Answers, context: str, settings: Mapping[str, Any]) -> str:
    """Raises TrainingError where a task asks for samples."""
    if settings.get('do_sample') or settings.get('temperature'):
        raise TrainingError('generate_until must be greedy, got settings that ask for samples. Set temperature to 0.')
    until = settings.get('until') or []
    return answers.written(context, [until] if isinstance(until, str) else until, int(settings.get('max_gen_toks', MOST)))
