"""What fits where: budgets read from the machine, and placement as pure functions."""
