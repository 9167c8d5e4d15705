"""Offline data of MuJoCo locomotion (D4RL's HDF5 files, local ones of the same schema, Minari's) and training windows.

A file holds the steps of many episodes one after another: `observations` (N, S), `actions` (N, A), `rewards` (N,),
`terminals` (N,), and optionally `timeouts` (N,), `next_observations` (N, S) and a group `metadata`. With these ends and
a context length of 3,

    row          0  1  2  3  4  5  6
    reward       1  2  4  1  1  3  9
    terminals    .  .  x  .  .  .  .
    timeouts     .  .  .  .  .  x  .

there are two episodes, rows 0 to 2 and 3 to 5 (row 6 belongs to an incomplete one), and the window that begins at
row 4 is

    row            4     5     padding
    return-to-go   0.004 0.003 0          the undiscounted return from here, over SCALE
    timestep       1     2     0
    mask           true  true  false

This is Decision Transformer's rule (https://github.com/kzl/decision-transformer, commit e2d82e6,
gym/data/download_d4rl_datasets.py and gym/experiment.py), except for the side of the padding: see Windows.

Minari's main_data.hdf5 has a group for each episode, `episode_0` and so on, with `observations` (T + 1, S), one more
than there are steps, `actions` (T, A), `rewards` (T,), `terminations` (T,) and `truncations` (T,), as in files of its
version 0.5.4 (https://minari.farama.org/content/dataset_standards). Its sets were made in gymnasium's v5 environments,
but policies are evaluated in v4. In v5 Hopper and Walker2d get no reward for standing in the step in which they fall,
and Walker2d's right foot has more friction (1.9, not 0.9), so that its policies meet a different ground here.
"""

import math
import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor

from .. import data
from ..data import DataError, checksum
from ..files import nearest, regular


@dataclass(frozen=True)
class Environment:
    id: str  # gymnasium's
    sizes: tuple[int, int]  # state_dim and act_dim
    reference: tuple[float, float]  # D4RL's REF_MIN_SCORE and REF_MAX_SCORE: returns of a random policy and an expert
    targets: tuple[float, float]  # Decision Transformer's env_targets: the returns it is evaluated with


# reference: https://github.com/Farama-Foundation/D4RL/blob/89141a689b0353b0dac3da5cba60da4b1b16254d/d4rl/infos.py
# targets: https://github.com/kzl/decision-transformer/blob/e2d82e68f330c00f763507b3b01d774740bee53f/gym/experiment.py
ENVIRONMENTS = {
    "hopper": Environment("Hopper-v4", (11, 3), (-20.272305, 3234.3), (3600.0, 1800.0)),
    "halfcheetah": Environment("HalfCheetah-v4", (17, 6), (-280.178953, 12135.0), (12000.0, 6000.0)),
    "walker2d": Environment("Walker2d-v4", (17, 6), (1.629008, 4592.3), (5000.0, 2500.0)),
}
LEVELS = ("medium", "medium-replay", "medium-expert")
# each source's levels; random is for tests
SOURCES = {"local": (*LEVELS, "random"), "d4rl": LEVELS, "minari": ("simple", "medium", "expert")}
KEYS = ("observations", "actions", "rewards", "terminals", "timeouts", "next_observations")  # the first 4 are needed
MINARI = dict(zip(KEYS, ("observations", "actions", "rewards", "terminations", "truncations"), strict=False))
MAX_EP_LEN = 1000  # steps of an episode
SCALE = 1000.0  # of returns
ROUNDING = 2.0**-23  # of float32, relative
MOST_BYTES = 2**33  # of an array; D4RL's largest have 136 MB


def normalized(env: str, score: float) -> float:
    """D4RL's score of a return: 0 for a random policy's, 100 for an expert's."""
    low, high = ENVIRONMENTS[env].reference
    return 100 * (score - low) / (high - low)


def split_name(dataset: str) -> tuple[str, str, str]:
    """Source, environment and level: ("local", "hopper", "medium-replay") for "local/hopper-medium-replay".

    Raises ValueError: there is no such dataset.
    """
    names = {f"{s}/{env}-{level}": (s, env, level) for s in SOURCES for env in ENVIRONMENTS for level in SOURCES[s]}
    if dataset not in names:
        raise ValueError(
            f"data.dataset: expected <source>/<environment>-<level> of {(*ENVIRONMENTS,)} and {SOURCES}, "
            f"got {dataset!r}; the nearest is {nearest(dataset, names)!r}"
        )
    return names[dataset]


@dataclass(frozen=True, eq=False)
class Dataset:
    """The whole episodes of a file, one after another.

    Attributes:
        name: the value of `data.dataset`.
        env: a key of ENVIRONMENTS.
        observations: (N, S) float32.
        actions: (N, A) float32.
        rewards: (N,) float32.
        terminals: (N,) bool, true where an episode ended by itself, not by its length.
        starts: (E + 1,) int64; episode e has the rows starts[e] to starts[e + 1].
        metadata: the content of the file's group `metadata`, in JSON types.
    """

    name: str
    env: str
    observations: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    terminals: np.ndarray
    starts: np.ndarray
    metadata: dict[str, Any]

    @property
    def episodes(self) -> int:
        return len(self.starts) - 1

    @cached_property
    def sha256(self) -> str:
        """The `checksum` of the arrays, which identifies the data whatever file holds it."""
        return checksum(self.observations, self.actions, self.rewards, self.terminals, self.starts)

    @cached_property
    def returns(self) -> np.ndarray:
        """The undiscounted return of each episode, (E,) float64."""
        return np.add.reduceat(self.rewards.astype(np.float64), self.starts[:-1])

    @cached_property
    def mean(self) -> np.ndarray:
        """The mean observation over all rows, (S,) float32."""
        return self.observations.mean(0, dtype=np.float64).astype(np.float32)

    @cached_property
    def std(self) -> np.ndarray:
        """The standard deviation over all rows plus 1e-6, (S,) float32, so that constants do not divide by zero."""
        return (self.observations.std(0, dtype=np.float64) + 1e-6).astype(np.float32)


def dataset_checksum(path: str | Path, name: str) -> str:
    """The `Dataset.sha256` of a file, in a run's record `facts["dataset_sha256"]`; arguments as for `read`."""
    return read(path, name).sha256


def find(dataset: str, progress: bool = True) -> Path:
    """The path of a dataset's file; D4RL's are downloaded where missing, and their checksums kept and verified.

    Raises ValueError: there is no such dataset. DataError: it is missing and cannot be downloaded, or has changed.
    """
    source, env, level = split_name(dataset)
    if source == "d4rl":
        return data.find(dataset, progress)
    path = data.locate(f"{dataset}.hdf5")
    if path is None:
        places = " nor ".join(str(folder / f"{dataset}.hdf5") for folder in data.folders())
        todo = f"`python -m scripts.collect env={env} level={level}` makes it"
        if source == "minari":
            theirs = f"mujoco/{env}/{level}-v0"
            todo = (
                f"copy or link Minari's {theirs}/data/main_data.hdf5 there (below ~/.minari/datasets, "
                f"where its own `minari download {theirs}` puts it)"
            )
        raise DataError(f"{dataset}: there is no {places}; {todo}")
    return path


def read(path: str | Path, name: str) -> Dataset:
    """The whole episodes of an HDF5 file: terminals or timeouts mark the last row of an episode.

    Minari's episodes are joined in the order of their numbers; row numbers in errors count through the joined rows.

    Rows after the last mark are dropped. In a file without timeouts an episode also ends at its MAX_EP_LEN-th step.
    (Decision Transformer's script does the same for the first episode; its counter ends later ones a step early. D4RL's
    v2 files all have timeouts.)

    Warns, and continues as that script does, if next observations differ from the next row's or an episode is longer
    than MAX_EP_LEN.

    Args:
        name: the value of `data.dataset`; its environment determines the expected shapes.

    Raises DataError: the file cannot be read, lacks something, or is inconsistent; the text says what and where.
    """
    source, env, _ = split_name(name)
    states, actions = ENVIRONMENTS[env].sizes
    if Path(path).exists():
        regular(Path(path), DataError)  # opening a pipe would never end
    try:
        with h5py.File(path, "r") as file:
            if source == "minari":
                arrays = _joined(path, file, states, actions)
                there, metadata = [*arrays], {}
            else:
                arrays = {key: _array(path, file, key) for key in KEYS if key in file}
                there = [*file]
                metadata = _decoded(file["metadata"]) if "metadata" in file else {}
    except DataError:
        raise
    except BlockingIOError as error:
        raise DataError(
            f"{path}: another program has it open for writing ({error}); try again when it is done"
        ) from error
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:  # h5py raises all of these
        raise DataError(
            f"{path}: expected a whole HDF5 file, got what cannot be read ({error}); get it anew"
        ) from error
    missing = [key for key in KEYS[:4] if key not in there]
    if missing:
        raise DataError(f"{path}: expected {', '.join(KEYS[:4])}; there is no {', '.join(missing)}, only {there}")

    n = arrays["observations"].shape[0] if arrays["observations"].ndim else 0
    shapes = {"observations": (n, states), "actions": (n, actions), "next_observations": (n, states)}
    for key, array in arrays.items():
        shape = shapes.get(key, (n,))
        if array.shape == (n, 1) and len(shape) == 1:  # D4RL's own reader accepts this shape too
            array = array[:, 0]
        if array.shape != shape or array.dtype.kind not in "biuf":
            raise DataError(
                f"{path}: {key}: expected numbers of shape {shape}, {n} rows of {ENVIRONMENTS[env].id}, "
                f"got {array.dtype} of shape {array.shape}"
            )
        arrays[key] = (_truths if key in ("terminals", "timeouts") else _floats)(path, key, array)
    beyond = np.abs(arrays["actions"]).max(initial=0)
    if beyond > 1 + ROUNDING:
        raise DataError(f"{path}: actions: expected -1 to 1, the range of {ENVIRONMENTS[env].id}, got up to {beyond:g}")
    starts = _starts(path, arrays["terminals"], arrays.get("timeouts"))
    if "next_observations" in arrays:
        _check_order(path, arrays["observations"], arrays["next_observations"], starts)
    rows = {key: arrays[key][: starts[-1]] for key in KEYS[:4]}
    return Dataset(name=name, env=env, **rows, starts=starts, metadata=metadata)


def _array(path: str | Path, file: h5py.Group, key: str) -> np.ndarray:
    """The array of a dataset, after a check that it lies in this file, is complete and not too large."""
    if isinstance(file.get(key, getlink=True), h5py.ExternalLink):
        raise DataError(f"{path}: {key}: expected numbers in this file, got a link to another")
    item = file[key]
    if not isinstance(item, h5py.Dataset) or item.shape is None:
        raise DataError(f"{path}: {key}: expected numbers, got {'nothing' if isinstance(item, h5py.Dataset) else item}")
    if item.external or item.is_virtual:
        raise DataError(f"{path}: {key}: expected numbers in this file, got those of others (external or virtual)")
    if item.size * item.dtype.itemsize > MOST_BYTES:
        raise DataError(f"{path}: {key}: expected at most {MOST_BYTES // 2**30} GiB, it says {item.shape}")
    return item[()]


def _joined(path: str | Path, file: h5py.File, states: int, actions: int) -> dict[str, np.ndarray]:
    """Minari's episodes, joined, by KEYS, without the observations after their last steps."""
    names = [f"episode_{i}" for i in range(max(len(file), 1))]  # HDF5's own order puts 10 before 2
    missing = [name for name in names if not isinstance(file.get(name), h5py.Group)]
    if missing:
        raise DataError(
            f"{path}: expected Minari's groups episode_0, episode_1 and so on; there is no {missing[0]} among "
            f"{len(file)}, {[*file][:8]}"
        )
    parts: dict[str, list[np.ndarray]] = {key: [] for key in MINARI}
    for name in names:
        items = {key: file[name].get(its) for key, its in MINARI.items()}
        shapes = [item.shape if isinstance(item, h5py.Dataset) else str(item) for item in items.values()]
        T = shapes[0][0] - 1 if isinstance(shapes[0], tuple) and shapes[0] else 0
        expected = [(T + 1, states), (T, actions), (T,), (T,), (T,)]
        if shapes != expected:
            raise DataError(
                f"{path}: {name}: expected {', '.join(MINARI.values())} of the shapes (T + 1, {states}), "
                f"(T, {actions}), (T,), (T,) and (T,), got {', '.join(map(str, shapes))}"
            )
        for key, its in MINARI.items():
            parts[key].append(_array(path, file[name], its)[:T])
        ends = np.flatnonzero((parts["terminals"][-1] != 0) | (parts["timeouts"][-1] != 0))
        if ends.tolist() != [T - 1]:
            raise DataError(
                f"{path}: {name}: expected terminations or truncations to mark the last of its {T} steps and no other, "
                f"got marks at {ends[:8].tolist()}"
            )
    return {key: np.concatenate(arrays) for key, arrays in parts.items()}


def _floats(path: str | Path, key: str, array: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # overflow becomes infinite, which is refused
        array = array.astype(np.float32, copy=False)
    bad = np.argwhere(~np.isfinite(array))
    if len(bad):
        raise DataError(f"{path}: {key}: expected finite numbers, {len(bad)} are not, the first in row {bad[0, 0]}")
    return array


def _truths(path: str | Path, key: str, array: np.ndarray) -> np.ndarray:
    bad = np.flatnonzero((array != 0) & (array != 1))
    if len(bad):
        raise DataError(f"{path}: {key}: expected 0 or 1, got {array[bad[0]]} in row {bad[0]} ({len(bad)} such rows)")
    return array.astype(bool, copy=False)


def _starts(path: str | Path, terminals: np.ndarray, timeouts: np.ndarray | None) -> np.ndarray:
    """The rows where episodes begin and where the last one ends, (E + 1,) int64."""
    if timeouts is None:
        rows = np.arange(len(terminals))
        first = np.maximum.accumulate(np.where(np.append(True, terminals[:-1]), rows, 0))
        timeouts = (rows - first) % MAX_EP_LEN == MAX_EP_LEN - 1
    starts = np.append(0, np.flatnonzero(terminals | timeouts) + 1)
    if len(starts) == 1:
        raise DataError(f"{path}: expected a whole episode at least, none of the {len(terminals)} rows ends one")
    lengths = np.diff(starts)
    long = np.flatnonzero(lengths > MAX_EP_LEN)
    if len(long):
        warnings.warn(
            f"{path}: expected episodes of {MAX_EP_LEN} steps at most, {len(long)} are longer, the first has "
            f"{lengths[long[0]]} from row {starts[long[0]]} on; timesteps end at {MAX_EP_LEN - 1}",
            stacklevel=3,
        )
    return starts


def _check_order(path: str | Path, observations: np.ndarray, after: np.ndarray, starts: np.ndarray) -> None:
    """Checks that within an episode the observation after a step is the one before the next step."""
    inside = np.ones(starts[-1] - 1, bool)
    inside[starts[1:-1] - 1] = False
    expected, got = observations[1 : starts[-1]], after[: starts[-1] - 1]
    bad = np.flatnonzero((np.abs(got - expected) > ROUNDING * np.abs(expected)).any(1) & inside)
    if len(bad):
        warnings.warn(
            f"{path}: next_observations: expected the next row's observations inside an episode; "
            f"{len(bad)} of {inside.sum()} rows differ, the first is row {bad[0]}",
            stacklevel=3,
        )


def _decoded(item: Any) -> Any:
    """HDF5's values in JSON types; for more than 64 elements only the type and shape (D4RL's files hold networks)."""
    if isinstance(item, h5py.Group):
        return {key: _decoded(value) for key, value in (*item.attrs.items(), *item.items())}
    if isinstance(item, h5py.Dataset):
        return _decoded(item[()])
    if isinstance(item, np.ndarray) and item.size > 64:
        return f"{item.dtype} {item.shape}"
    if isinstance(item, np.ndarray | np.generic) and not isinstance(item, bytes):
        return _decoded(item.tolist())
    if isinstance(item, list):
        return [_decoded(value) for value in item]
    if isinstance(item, bytes):
        return item.decode("utf-8", "backslashreplace")
    if isinstance(item, float) and not math.isfinite(item) or not isinstance(item, bool | int | float | str | None):
        return str(item)
    return item


class Windows:
    """Windows of K steps of a dataset's episodes, on a device.

    Steps beyond an episode's end are padding on the right, which a causal model's earlier outputs do not see. The
    published code pads on the left, where padding affects the outputs, at least those of a recurrent model:
    `left_padded` gives that form for comparison.

    Args:
        context_length: K.
    """

    def __init__(self, dataset: Dataset, context_length: int, device: torch.device | str):
        if context_length < 1:
            raise ValueError(f"data.context_length: expected 1 at least, got {context_length}")
        self.context_length, self.device = context_length, torch.device(device)
        returns_to_go = np.empty(len(dataset.rewards))
        timesteps = np.empty(len(dataset.rewards), np.int64)
        for start, end in zip(dataset.starts[:-1], dataset.starts[1:], strict=True):
            returns_to_go[start:end] = dataset.rewards[start:end][::-1].cumsum(dtype=np.float64)[::-1]
            timesteps[start:end] = np.arange(end - start).clip(max=MAX_EP_LEN - 1)  # as get_batch there
        ends = np.repeat(dataset.starts[1:], np.diff(dataset.starts))
        mean, std = (torch.as_tensor(x, device=device) for x in (dataset.mean, dataset.std))
        self.returns_to_go = torch.as_tensor((returns_to_go / SCALE).astype(np.float32), device=device)
        self.states = (torch.as_tensor(dataset.observations, device=device) - mean) / std
        self.actions = torch.as_tensor(dataset.actions, device=device)
        self.timesteps = torch.as_tensor(timesteps, device=device)
        self.ends = torch.as_tensor(ends, device=device)
        self.origin = -mean / std  # an observation of zeros, normalised

    def batch(self, batch_size: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Windows that begin at rows drawn uniformly; they depend only on the seed and the kind of device.

        An episode is thus drawn with a probability proportional to its length, and the start uniformly within it, as
        in Decision Transformer's gym/experiment.py.

        Returns:
            (B, K, 1) float32 returns-to-go over SCALE, (B, K, S) float32 states, normalised, (B, K, A) float32
            actions, (B, K) int64 steps since the episode began, (B, K) bool mask, true where a step is real.
            Padding is zero.
        """
        generator = torch.Generator(self.device).manual_seed(seed)
        starts = torch.randint(len(self.timesteps), (batch_size, 1), generator=generator, device=self.device)
        places = starts + torch.arange(self.context_length, device=self.device)
        mask = places < self.ends[starts]
        places = torch.where(mask, places, 0)
        real = mask[..., None]
        return (
            torch.where(real, self.returns_to_go[places][..., None], 0),
            torch.where(real, self.states[places], 0),
            torch.where(real, self.actions[places], 0),
            torch.where(mask, self.timesteps[places], 0),
            mask,
        )

    def left_padded(self, batch: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The same windows, each with its padding moved to the left, as Decision Transformer trains on them.

        Returns-to-go and timesteps are padded with 0, actions with -10, and states with 0 before they are normalised,
        so that a padded state is -mean / std (gym/experiment.py, get_batch).
        """
        *tensors, mask = batch
        B, K = mask.shape
        places = torch.arange(K, device=mask.device) - (K - mask.sum(1, keepdim=True))
        mask, rows = places >= 0, torch.arange(B, device=mask.device)[:, None]
        returns_to_go, states, actions, timesteps = (x[rows, places.clamp(min=0)] for x in tensors)
        real = mask[..., None]
        return (
            torch.where(real, returns_to_go, 0),
            torch.where(real, states, self.origin),
            torch.where(real, actions, -10),
            torch.where(mask, timesteps, 0),
            mask,
        )
