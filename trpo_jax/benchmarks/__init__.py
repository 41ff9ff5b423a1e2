"""Reliable measurement of throughput."""
