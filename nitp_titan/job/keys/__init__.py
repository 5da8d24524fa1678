"""The tables of a job file and their keys: names, types, defaults, meanings."""
