"""Who am I, under any launcher."""
