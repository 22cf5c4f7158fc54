"""Rules over rows: functions of a session and an actor, which write the audit row of what they change."""
