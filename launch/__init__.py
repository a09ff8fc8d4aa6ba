"""Configuration and commands."""
