"""The kinds of servers that an agent keeps in step. `protocol.py` has what each of them does."""
