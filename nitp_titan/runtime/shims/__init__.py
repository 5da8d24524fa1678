"""Changes to libraries at run time, each with its target, its reason and its end."""
