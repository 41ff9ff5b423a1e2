"""Runs: the runner, the folder of a run, its metrics and where else they go, and the learning curve."""
