"""Executing a plan: masks, physical removal, verification. Nothing here decides."""
