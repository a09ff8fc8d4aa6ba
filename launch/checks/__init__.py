"""What `doctor` looks at, a function each."""
