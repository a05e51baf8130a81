"""Mixture of experts: each expert is read by itself, when the router picks it, into a cache of experts."""
