"""Default policies and value functions, and the single form in which the trainer uses every network."""
