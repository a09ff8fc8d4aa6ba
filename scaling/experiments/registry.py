"""The experiments by name."""

from scaling.experiments.cases.attention import Attention
from scaling.experiments.cases.checkpoint import Checkpoint
from scaling.experiments.cases.clifford import Clifford
from scaling.experiments.cases.convert import Convert
from scaling.experiments.cases.data import Data
from scaling.experiments.cases.equivariance import Equivariance
from scaling.experiments.cases.fits import Fits
from scaling.experiments.cases.long_conv import LongConv
from scaling.experiments.cases.machine import Machine
from scaling.experiments.cases.models import Models
from scaling.experiments.cases.neighbours import NeighbourSearch
from scaling.experiments.cases.network import Network
from scaling.experiments.cases.plan import Plan
from scaling.experiments.cases.scaling import Scaling
from scaling.experiments.cases.startup import Startup
from scaling.experiments.cases.sweep import Sweep
from scaling.experiments.cases.train_step import TrainStep
from scaling.experiments.experiment import Experiment

BENCHES: dict[str, type[Experiment]] = {
    "attention": Attention,
    "checkpoint": Checkpoint,
    "clifford": Clifford,
    "convert": Convert,
    "data": Data,
    "equivariance": Equivariance,
    "fits": Fits,
    "long_conv": LongConv,
    "machine": Machine,
    "models": Models,
    "neighbours": NeighbourSearch,
    "network": Network,
    "plan": Plan,
    "scaling": Scaling,
    "startup": Startup,
    "train_step": TrainStep,
}
"""Those of `python -m launch bench`."""
EXPERIMENTS = BENCHES | {"sweep": Sweep}
