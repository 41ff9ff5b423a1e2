"""The update steps: arrays, pytrees and callables in; arrays and an info dataclass out.

Nothing in this package depends on an environment, a network library or a `Config`.
"""
