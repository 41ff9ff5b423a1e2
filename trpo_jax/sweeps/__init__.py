"""Sweeps: many agents over settings and seeds, with one compiled program per static setting, on every device."""
