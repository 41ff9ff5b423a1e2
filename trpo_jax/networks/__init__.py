"""Default policies and value functions, and the one form in which the trainer uses any network."""
