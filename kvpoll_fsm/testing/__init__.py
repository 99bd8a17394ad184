"""Tools to test transports and engines against the production code."""
