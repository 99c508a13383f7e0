"""Procedural landscapes: seeded synthetic chips with land cover, for the embedded sample, tests and trials."""
