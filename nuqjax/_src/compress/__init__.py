"""Compresses a tree of parameters: rules, plan, compress."""
