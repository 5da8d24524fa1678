"""What a job file and a command line say, with the lines that they say it on."""
