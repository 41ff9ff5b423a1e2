"""How a policy is updated and a value function fitted: one file per algorithm, each with `make(config)`."""
