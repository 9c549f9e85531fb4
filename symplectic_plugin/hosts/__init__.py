"""Adapters: each turns one host's solve into a trajectory and hands it on."""
