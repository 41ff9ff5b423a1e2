"""Measuring throughput so that the figure can be trusted."""
