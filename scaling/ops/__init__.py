"""Operators that mix along the sequence; with a shard they call their twin in parallel/."""

from scaling.ops.long_conv import geometric_long_conv as geometric_long_conv
from scaling.ops.long_conv import scalar_long_conv as scalar_long_conv
from scaling.ops.long_conv import vector_long_conv as vector_long_conv
