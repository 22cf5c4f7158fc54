"""Policies of channels: their rules, the rules in force, and the judgement of a promotion by them."""
