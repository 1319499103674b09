"""Mesh, logical axis rules, multi-host start-up."""
