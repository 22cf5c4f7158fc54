"""Jobs are done here: torch is imported inside steps, nothing answers HTTP."""
