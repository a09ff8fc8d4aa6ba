"""Files and rules -> chains."""
