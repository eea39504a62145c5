"""Attention of prompts, and of long parts of them, on CPUs where torch's own is slower."""
