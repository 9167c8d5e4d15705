"""Live curves in wandb (offline unless told otherwise), or none. Tables are made from the project's own records."""

import contextlib
import dataclasses

from .config import Run, group_id


class Tracker(contextlib.AbstractContextManager):
    """Accepts every call and does nothing."""

    def __exit__(self, *exception) -> None:
        pass

    def log(self, step: int, values: dict[str, float]) -> None:
        pass

    def finish(self, last: dict[str, float], best: dict[str, float]) -> None:
        pass


class Wandb(Tracker):
    """One wandb run for each of ours, under its id; seeds of one setting form a group."""

    def __init__(self, cfg: Run, run_id: str):
        try:
            import wandb
        except ImportError as error:
            raise ImportError("logger: wandb is not installed; `pip install wandb`, or logger=none") from error
        config = dataclasses.asdict(cfg)
        self.run = wandb.init(
            project=cfg.wandb.project,
            entity=cfg.wandb.entity,
            mode=cfg.wandb.mode,
            id=run_id,
            name=f"{cfg.model.label} {cfg.model.layers} layers, seed {cfg.seed}",
            group=group_id(config),
            job_type=cfg.experiment,
            tags=[cfg.experiment, cfg.profile, cfg.model.label],
            config=config,
            dir=cfg.output_dir,
            resume="allow" if cfg.wandb.mode == "online" else None,
            settings=wandb.Settings(silent=True, console="off"),
        )

    def __exit__(self, kind, *exception) -> None:
        self.run.finish(exit_code=0 if kind is None else 1)

    def log(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def finish(self, last: dict[str, float], best: dict[str, float]) -> None:
        for name, values in (("last", last), ("best", best)):
            self.run.summary.update({f"{name}/{key}": value for key, value in values.items()})


def start(cfg: Run, run_id: str) -> Tracker:
    return Wandb(cfg, run_id) if cfg.logger == "wandb" else Tracker()
