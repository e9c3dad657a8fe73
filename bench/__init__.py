"""Measurements. A package of its own name, so that no other one of that name goes before it."""
