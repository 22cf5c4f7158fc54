"""Whether adapters and a base belong together: one check for every command, and what a result must not silently be.

Without torch, so that a push and the registry that receives it check the same.
"""
