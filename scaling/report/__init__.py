"""One HTML file out of run folders."""
