"""Text from a trained character model, printed as it is generated.

    python -m experiments.charlm.sample prompt="ROMEO:" tokens=500 temperature=0.8 top_k=20 --stats
    python -m experiments.charlm.sample run=<id>

Without `run`, the weights are those of `model` that come with the repository (results/weights/charlm-*).
The prompt is read in parallel, then one character follows another: a recurrent model carries its state (and its
convolution's window), of the same size however long the text gets; a Transformer keeps keys and values, and when its
learned positions are used up it reads the later half of the text again, at the first positions. --stats adds the speed
and the size of the state.
"""

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from minrnn.mixers.base import state_map
from minrnn.models import TokenModel

from .. import trained
from ..config import one_of
from ..launch import command, settings_of
from . import model


@dataclass
class Choice(trained.Choice):
    weights: str = "best"  # or last, of a run
    device: str = "cpu"

    def __post_init__(self):
        one_of(self, "", "weights", ("best", "last"))
        try:
            torch.zeros(1, device=self.device)
        except (RuntimeError, AssertionError) as error:
            text = str(error).splitlines()[0]
            raise ValueError(f"device: {self.device!r} cannot be used here ({text})") from None

    def chosen(self) -> trained.Trained:
        return self.find("charlm", self.weights, self.device)


@dataclass
class Settings(Choice):
    prompt: str = ""  # empty: a line end, or the first character of a vocabulary without one
    tokens: int = 500
    temperature: float = 0.8  # 0: always the likeliest character
    top_k: int = 0  # choose among the likeliest top_k; 0: all
    seed: int = 0

    def __post_init__(self):
        if self.tokens < 1 or not self.temperature >= 0 or self.top_k < 0:
            raise ValueError(
                "expected tokens >= 1, temperature >= 0 and top_k >= 0, "
                f"got {self.tokens}, {self.temperature} and {self.top_k}"
            )
        super().__post_init__()


parse = partial(settings_of, Settings, __doc__)


def load(settings: Settings) -> tuple[TokenModel, str]:
    """The model and its vocabulary."""
    found = settings.chosen()
    vocabulary = found.facts["vocabulary"]
    return found.fill(model(found.cfg, len(vocabulary)).to(settings.device)), vocabulary


@torch.inference_mode()
def generate(model: TokenModel, prompt: Tensor, settings: Settings) -> Iterator[tuple[int, object]]:
    """Yields generated ids one at a time, each with the state before it."""
    generator = torch.Generator(prompt.device).manual_seed(settings.seed)
    most = model.positions.num_embeddings if model.positions is not None else None
    tokens = prompt.tolist()
    logits, state = start(model, prompt, most)
    for _ in range(settings.tokens):
        token = choose(logits[0], settings, generator)
        yield token.item(), state
        tokens.append(token.item())
        if most is not None and int(state[0]) == most:
            logits, state = start(model, torch.tensor(tokens[-most // 2 :], device=prompt.device), most)
        else:
            logits, state = model.step(token[None], state)


def start(model: TokenModel, prompt: Tensor, most: int | None) -> tuple[Tensor, object]:
    """Logits (1, vocabulary) and the state after the prompt, which is read in parallel."""
    tokens = prompt[None] if most is None else prompt[None, -most:]
    logits, state = model(tokens, model.initial_state(1), last=1)
    return logits[:, 0], state


def choose(logits: Tensor, settings: Settings, generator: torch.Generator) -> Tensor:
    if settings.temperature == 0:
        return logits.argmax()
    logits = logits / settings.temperature
    if 0 < settings.top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(settings.top_k).values[-1], -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[0]


def state_bytes(state: object) -> int:
    sizes = []
    state_map(lambda tensor: sizes.append(tensor.nbytes) or tensor, state)
    return sum(sizes)


def main(arguments: list[str]) -> None:
    stats = "--stats" in arguments
    settings = parse([argument for argument in arguments if argument != "--stats"])
    torch.set_num_threads(1)  # one token's matrices are too small to share
    net, vocabulary = load(settings)
    text = settings.prompt or ("\n" if "\n" in vocabulary else vocabulary[0])
    unknown = sorted(set(text) - set(vocabulary))
    if unknown:
        raise ValueError(f"prompt: {''.join(unknown)!r} is not among the text's {len(vocabulary)} characters")
    prompt = torch.tensor([vocabulary.index(character) for character in text], device=settings.device)
    print(text, end="", flush=True)
    began, size, first = time.perf_counter(), 0, 0.0
    for token, state in generate(net, prompt, settings):
        first = first or time.perf_counter()
        print(vocabulary[token], end="", flush=True)
        size = max(size, state_bytes(state)) if stats else 0
    speed = (settings.tokens - 1) / (time.perf_counter() - first)
    print()
    if stats:
        print(
            f"{first - began:.2f} s until the first token, then {speed:.0f} tokens a second; "
            f"a state of {size:,} bytes at most",
            file=sys.stderr,
        )


if __name__ == "__main__":
    command(main, sys.argv[1:], refusals=(ValueError,))
