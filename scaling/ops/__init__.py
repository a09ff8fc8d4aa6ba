"""Operators that mix along the sequence; with a shard they call their twin in parallel/."""

from scaling.long_conv.operators import geometric_long_conv as geometric_long_conv
from scaling.long_conv.operators import scalar_long_conv as scalar_long_conv
from scaling.long_conv.operators import vector_long_conv as vector_long_conv
