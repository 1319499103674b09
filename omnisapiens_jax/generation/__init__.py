"""Prefill, decode, sampling."""
