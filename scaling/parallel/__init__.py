"""Process groups, counted collectives and the distributed twins of ops/."""

from scaling.parallel.mesh import Mesh as Mesh
from scaling.parallel.shard import SequenceShard as SequenceShard
from scaling.parallel.shard import redistribute as redistribute
from scaling.parallel.shard import redistribute_batch as redistribute_batch
from scaling.parallel.telemetry import measuring as measuring
