"""Environments behind one small interface; one file a suite."""
