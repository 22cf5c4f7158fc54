"""The trainer's side: calls, verified bytes, and the transport that needs no server."""
