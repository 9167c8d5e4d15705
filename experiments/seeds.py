"""Where each random number comes from: disjoint ranges of seeds, so that no split or purpose sees another's.

torch's CPU generator reads the low 32 bits of a seed, so all ranges lie below 2**32: a quarter each for the training
data, for a step's own noise (dropout), for validation and for test. The training data and noise of a step depend on
the run's seed and the step alone, so a run that goes on after a kill needs no generator's state.
"""

STEPS = 1 << 19  # of a run, at most
RUNS = 1 << 11  # seeds, at most
QUARTER = 1 << 30


def train_seed(seed: int, step: int) -> int:
    _check(seed, step)
    return seed * STEPS + step


def noise_seed(seed: int, step: int, rank: int = 0) -> int:
    _check(seed, step)
    return QUARTER + (train_seed(seed, step) + rank * 1_000_003) % QUARTER


def eval_seed(split: str, batch: int) -> int:
    """The seed of a fixed evaluation batch, the same for every run; `split` is "val" or "test"."""
    return {"val": 2, "test": 3}[split] * QUARTER + batch


def _check(seed: int, step: int) -> None:
    if not 0 <= seed < RUNS:
        raise ValueError(f"seed: expected 0 to {RUNS - 1}, got {seed}")
    if not 0 <= step < STEPS:
        raise ValueError(f"train.steps: expected at most {STEPS}, got {step}")
