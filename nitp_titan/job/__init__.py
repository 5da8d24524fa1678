"""Job files: TOML in, TorchTitan's ``Trainer.Config`` out.

Importing this package costs milliseconds; torch is imported by ``nitp_titan.job.build`` alone.

    read       a file and a command line                          errors    problems, one line each
    extends    a file over the files that it extends              lines     line numbers
    tables     our own tables                                     schema    every table, and the check of a value
    snapshot   upstream's tables and models -> upstream_schema.json
    resolve    the layers merged: load_job() -> Job               defaults  ours, and those that depend on other keys
    check, layout, shape, rules    what values must agree on      models, machine   what the checks know
    build      Job -> NITPTrainer.Config                          write     Job -> the resolved TOML
    explain    Job -> the lines of `nitp-titan check`
"""

from nitp_titan.job.errors import JobError, Problem
from nitp_titan.job.resolve import Job, load_job

__all__ = ["Job", "JobError", "Problem", "load_job"]
