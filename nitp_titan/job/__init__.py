"""Job files: TOML in, TorchTitan's ``Trainer.Config`` out.

Importing any module here leaves out torch, which takes seconds: functions of ``backbone``, ``build`` and ``snapshot``
import it, and those of ``model_facts`` by which these look at a model.

    reading/   a file, what it extends, a command line              keys/     every table and key, a value's check
    resolve    the layers merged: load_job() -> Job                 draft     a job while it is merged and checked
    defaults   ours, and those that depend on other keys            shape     [model.shape] over a flavor
    checks/    what values must agree on, all.py the list           errors    problems, one line each
    model_facts, layout, loss_name    what checks and estimates know of a job
    backbone   the plain model                                      build     Job -> NITPTrainer.Config
    write      Job -> the resolved TOML                             snapshot  TorchTitan's tables -> keys/*.json
"""

from nitp_titan.job.errors import JobError, Problem
from nitp_titan.job.job import Job
from nitp_titan.job.resolve import load_job

__all__ = ["Job", "JobError", "Problem", "load_job"]
