"""Cl(3,0) layers in closed form."""
