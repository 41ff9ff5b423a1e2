"""Policy updates and value fits: one file per algorithm, each with a function `make(config)`."""
