"""What is checked of a job before anything starts: a file a subject, :mod:`all` the list of them."""
