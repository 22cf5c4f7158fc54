"""Changes of a namespace's rules that one admin requests and a second one approves."""
