"""Decision RNNs: offline reinforcement learning as a sequence model. `python -m experiments.decision model=mingru`

Decision Transformer's protocol (arXiv 2106.01345; https://github.com/kzl/decision-transformer/blob/
e2d82e68f330c00f763507b3b01d774740bee53f/gym/experiment.py) around any mixer: from the return-to-go, the state, and the
steps before, the model predicts which action was taken. With a context length of 2 and three tokens a step, a window
of an episode is

    input     R1 s1 a1 R2 s2 a2
    target       a1       a2

and the loss is the mean square error of the actions.

A score is the mean return of `eval.episodes` whole episodes in the environment, in percent of an expert's (D4RL's
normalisation). Episodes of val and of test begin from different seeds; different targets and context lengths use the
same seeds.

    val_score, test_score           with the first of Decision Transformer's targets and eval.context_length
    test_score_carried              the same with the state carried through the episode (for recurrent models)
    test_score_window               the same with the last steps read anew at each step, data.context_length of them
                                    where eval.context_length is null, padded on the left where data.padding is left
    test_score_second_target        with the second of Decision Transformer's targets (facts.target_returns)
    test_score_at_<score>           with TARGETS

The last two are measured for the last weights only.

Others report the last evaluation in training, or the best. They choose the best by the same episodes that they report,
which is worth 3.65 points on average over D4RL's nine sets for the same runs (CORL's README). Here the last is
`last.test_score`, what others call best is `best.val_score`, and `best.test_score` is the score of the same weights on
episodes that did not choose them.
"""

from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from minrnn.mixers import make
from minrnn.models import DecisionModel

from .. import engine
from ..config import Decision
from ..seeds import eval_seed, train_seed
from ..trained import Trained
from . import data
from .episodes import rollout

TARGETS = (20, 60, 100)  # scores


def loss(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    """The mean square error over the real steps of a batch of windows."""
    returns_to_go, states, actions, timesteps, mask = batch
    return (model(returns_to_go, states, actions, timesteps) - actions)[mask].square().mean()


def evaluate(cfg: Decision, dataset: data.Dataset, model: DecisionModel, split: str) -> dict[str, float]:
    """The score, return and length with the first target; in test also the scores with and without carried state."""
    lookback = {"window": cfg.eval.context_length or cfg.data.context_length}
    if recurrent(cfg):
        lookback["carried"] = None
    main = "window" if cfg.eval.context_length else "carried"
    modes = lookback if split == "test" else (main,)
    targets = data.ENVIRONMENTS[dataset.env].targets[:1]
    found = {mode: play(cfg, dataset, model, split, targets, lookback[mode]) for mode in modes}
    scores = {f"score_{mode}": data.normalized(dataset.env, returns.mean()) for mode, (returns, _) in found.items()}
    returns, lengths = found[main]
    rest = scores if split == "test" else {}
    return {"score": scores[f"score_{main}"]} | rest | {"return": returns.mean(), "length": lengths.mean()}


def evaluate_last(cfg: Decision, dataset: data.Dataset, model: DecisionModel, split: str) -> dict[str, float]:
    """The scores with the second target and with each of TARGETS."""
    environment = data.ENVIRONMENTS[dataset.env]
    low, high = environment.reference
    second = environment.targets[1]
    targets = [second, *(low + score / 100 * (high - low) for score in TARGETS)]
    returns, _ = play(cfg, dataset, model, split, targets, cfg.eval.context_length)
    names = ["second_target", *(f"at_{score}" for score in TARGETS)]
    found = dict(zip(names, returns, strict=True))
    return {f"score_{name}": data.normalized(dataset.env, row.mean()) for name, row in found.items()}


def play(cfg, dataset, model, split, targets, context_length) -> tuple[np.ndarray, np.ndarray]:
    """The returns and lengths of episodes, each (targets, eval.episodes)."""
    device = next(model.parameters()).device
    mean, std = (torch.as_tensor(x, device=device) for x in (dataset.mean, dataset.std))
    n = cfg.eval.episodes
    found = rollout(
        model, data.ENVIRONMENTS[dataset.env].id, mean, std, np.repeat([*targets], n),
        np.tile(eval_seed(split, 0) + np.arange(n), len(targets)), context_length, cfg.data.padding == "left",
    )  # fmt: skip
    return tuple(x.reshape(len(targets), n) for x in found)


def recurrent(cfg: Decision) -> bool:
    """Whether the model has a state of fixed size. Attention's grows, though it was trained on one window at most."""
    return cfg.model.name != "attention" and getattr(cfg.model, "inner", None) != "hyena"


def model(cfg: Decision, state_dim: int, act_dim: int) -> DecisionModel:
    return DecisionModel(
        state_dim, act_dim, mixer=make(**cfg.model.mixer(cfg.data.context_length * cfg.data.tokens)),
        max_ep_len=data.MAX_EP_LEN, tokens=cfg.data.tokens, timestep_std=cfg.data.timestep_std, **cfg.model.decision(),
    )  # fmt: skip


def normalization(found: Trained) -> dict[str, list[float]]:
    """The mean and deviation of the dataset that a policy was trained on. Raises ValueError: the local file differs."""
    name, expected = found.cfg.data.dataset, found.facts["dataset_sha256"]
    dataset = data.read(data.find(name), name)
    if dataset.sha256 != expected:
        raise ValueError(
            f"data.dataset: {found.file} was trained on another {name}: expected sha256 {expected}, "
            f"got {dataset.sha256}"
        )
    return {"state_mean": dataset.mean.tolist(), "state_std": dataset.std.tolist()}


def task(cfg: Decision, device: torch.device) -> engine.Task:
    if cfg.model.name == "attention" and cfg.data.padding == "left":
        raise ValueError("data.padding: expected right for attention, which has no mask here")
    if cfg.eval.context_length is None and not recurrent(cfg):
        raise ValueError(f"eval.context_length: expected a number of steps, {cfg.model.label} has no recurrent form")
    dataset = data.read(data.find(cfg.data.dataset, cfg.progress), cfg.data.dataset)
    windows = data.Windows(dataset, cfg.data.context_length, device)

    def batch(step: int) -> tuple[Tensor, ...]:
        found = windows.batch(cfg.train.batch_size, train_seed(cfg.seed, step))
        return windows.left_padded(found) if cfg.data.padding == "left" else found

    return engine.Task(
        model=model(cfg, dataset.observations.shape[1], dataset.actions.shape[1]).to(device),
        batch=batch,
        loss=loss,
        evaluate=partial(evaluate, cfg, dataset),
        evaluate_last=partial(evaluate_last, cfg, dataset),
        tokens=cfg.train.batch_size * cfg.data.context_length * cfg.data.tokens,
        select="score",
        facts={
            "dataset_sha256": dataset.sha256,
            "dataset": dataset.metadata,
            "target_returns": [*data.ENVIRONMENTS[dataset.env].targets],
        },
    )


def run(cfg: Decision) -> str:
    return engine.execute(cfg, task)
