"""Makes locomotion data where D4RL's are out of reach: `python -m scripts.collect env=hopper level=medium-replay`.

    env=         hopper, walker2d, halfcheetah
    level=       random, medium, medium-replay, medium-expert; all: the three of one training
    seed=        of training, episodes and noise
    steps=       rows of medium, and of medium-expert's other half, to an episode's end (0: 100000, of random 5000)
    folder=      gets local/<env>-<level>.hdf5 ($MINRNN_DATA, else data)
    output_dir=  keeps the finished training, in collect/<env>-<seed>/
    threads=     of the processor

The levels follow D4RL's (arXiv 2004.07219, section 5), on gymnasium's physics: medium holds episodes of a policy whose
score is that of D4RL's medium set; medium-replay all episodes that this policy had learned from; medium-expert the rows
of medium, then episodes of the training's best policy. D4RL's learner is SAC everywhere, but here it is PPO where that
is faster and TQC (arXiv 2005.04269) elsewhere: their logs are not SAC's replay buffers, and scores on these files do
not compare with scores on D4RL's.
"""

import sys
from functools import partial

from experiments.decision.collect import Settings, collect
from experiments.launch import command, settings_of

parse = partial(settings_of, Settings, __doc__)


def main(arguments: list[str]) -> None:
    collect(parse(arguments))


if __name__ == "__main__":
    command(main, sys.argv[1:], refusals=(OSError,))
