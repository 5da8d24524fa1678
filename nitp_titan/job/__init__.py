"""Job files: TOML in, TorchTitan's ``Trainer.Config`` out.

Importing any module here leaves out torch, which takes seconds: functions of ``build`` and ``snapshot`` import it, and
one of ``models`` by which these two count a model.

    read       a file and a command line                          errors    problems, one line each
    extends    a file over the files that it extends              lines     line numbers
    tables     our own tables                                     schema    every table, and the check of a value
    snapshot   upstream's tables and models -> upstream_schema.json
    resolve    the layers merged: load_job() -> Job               draft     a job while it is merged and checked
    defaults   ours, and those that depend on other keys          models, machine   what the checks know
    check, layout, pipeline, shape, float8, attention, rules      what values must agree on
    schedule, initial      steps and first weights                unread     what would be ignored
    build      Job -> NITPTrainer.Config                          write     Job -> the resolved TOML
"""

from nitp_titan.job.errors import JobError, Problem
from nitp_titan.job.resolve import Job, load_job

__all__ = ["Job", "JobError", "Problem", "load_job"]
