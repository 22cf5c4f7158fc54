"""The agent of `adaptory mirror`: keeps directories, servers and routes in step with what channels serve.

- `directory.py`: DIR, with releases by commit and by version, routes and state.
- `servers/`: the kinds of servers, each behind the same five calls.
- `switching.py`: what to load, which route to change, what to unload and remove, from what servers themselves list.
- `mirror.py`: the loop: follows the channels, takes a round every few seconds and at each change, and reports.
- `front.py`: the front of `adaptory route`; `gateways.py`: the routes as files for other gateways.
- `health.py`: `/healthz` and `/metrics`.

One rule holds everywhere: a loaded name never changes what it stands for. A version is loaded under its own name, from
a directory of its own that is named by commit; only the route of a channel moves."""
