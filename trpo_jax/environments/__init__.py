"""Environments behind one small interface; one file per suite."""
