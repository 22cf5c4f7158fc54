"""adapter_config.json: the types of PEFT, their settings and parts, and which modules a pattern names."""
