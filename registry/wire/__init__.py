"""The wire: what requests and answers look like. Field names are the contract of REST and of `--json`."""
