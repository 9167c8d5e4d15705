"""Makes locomotion data where D4RL's are out of reach: `python -m scripts.collect env=hopper level=medium-replay`.

    env=         hopper, walker2d, halfcheetah
    level=       random, medium, medium-replay, medium-expert; all: the three of one training
    seed=        of training, episodes and noise
    steps=       rows of medium, and of medium-expert's other half, to an episode's end (0: 100000, of random 5000)
    folder=      gets local/<env>-<level>.hdf5 ($MINRNN_DATA, else data)
    output_dir=  keeps the finished training, in collect/<env>-<seed>/
    threads=     of the processor

The levels are made as D4RL made its own (arXiv 2004.07219, section 5), on gymnasium's physics: medium is what a policy
does whose score is that of D4RL's medium set; medium-replay all that it had learned from by then; medium-expert the
rows of medium, then what the best policy of the training does. But D4RL's learner is SAC everywhere, and here it is PPO
where that is faster and TQC (arXiv 2005.04269) elsewhere: their logs are no replay buffers of SAC, and a score on these
files is not one on D4RL's.
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
