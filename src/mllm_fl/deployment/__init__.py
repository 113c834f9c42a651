"""Federations of real machines: what the server and each site run, and what sets them up, watches them and takes them up again."""
