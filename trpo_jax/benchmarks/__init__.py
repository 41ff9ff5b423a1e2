"""Measuring throughput so that the figure can be trusted: our own programs, and peers in their own environments."""
