"""What fits where and how fast it is: budgets, placement, tiers and the cost of a sweep, as pure functions."""
