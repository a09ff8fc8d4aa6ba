"""What a store holds, in numbers and figures."""
