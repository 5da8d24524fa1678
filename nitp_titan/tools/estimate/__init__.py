"""What a job costs and what its ranks would hold, by formula and on fake ranks."""
