"""``python -m nitp_titan.train`` with a gradient that is not finite in step 3."""

import sys

from nitp_titan import train
from nitp_titan.runtime import prepare

if __name__ == "__main__":
    prepare()
    from nitp_titan.training.trainer import NITPTrainer
    from tests.helpers.faults import Poison, poison

    run = NITPTrainer.train

    def poisoned(trainer: NITPTrainer) -> None:
        poison(trainer, Poison([3], "gradient"))
        run(trainer)

    NITPTrainer.train = poisoned
    sys.exit(train.main())
