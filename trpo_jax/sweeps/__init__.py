"""Sweeps: many agents over settings and seeds, as few compiled programs as there are shapes, on every device."""
