"""The client: API calls, verified transfers, and a transport that needs no server."""
