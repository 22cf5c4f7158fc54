"""Runs jobs. Steps import torch when they run; nothing here answers HTTP."""
