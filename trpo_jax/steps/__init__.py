"""The update steps: arrays, pytrees and callables in; arrays and an info dataclass out.

Nothing here knows an environment, a network library or a configuration.
"""
