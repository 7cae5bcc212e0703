"""The search: what may be chosen, what it costs at least, which cuts are worth solving exactly."""
