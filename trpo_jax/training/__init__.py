"""The trainer: rollouts, the loop, evaluation and checkpoints. Pure functions of `(config, state)`."""
