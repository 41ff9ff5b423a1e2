"""Runs: one runner, the folder of a run, its metrics, where they also go, and the learning curve."""
