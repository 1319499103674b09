"""Rewards, advantages, policy loss, replay: each pure and usable alone."""
