"""Configuration: composed, checked, explained."""
