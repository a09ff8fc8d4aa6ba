"""Items of stores, or of rules -> samples."""
