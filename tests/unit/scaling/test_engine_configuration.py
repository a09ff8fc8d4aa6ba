"""What an engine is told, out of all sources: they agree, or the error names both."""

import pytest
import torch
from torch import nn

from data_pipeline.errors import ConfigError
from scaling.engine.build import build_engine, deepspeed_config

OURS = {
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 2,
    "train_batch_size": 24,
    "gradient_clipping": 0.5,
    "zero_optimization": {"stage": 1},
}


def test_deepspeed_configuration_joins_its_sources(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(
        '{"gradient_clipping": "auto", "zero_optimization": {"stage": 1, "overlap_comm": false}}'
    )
    environment = {
        "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path),
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": "1",
        "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none",
    }
    user = {"zero_optimization": {"reduce_bucket_size": 7}, "train_batch_size": 24}
    config = deepspeed_config(OURS, user, environment)
    assert config["gradient_clipping"] == 0.5 and config["gradient_accumulation_steps"] == 2
    assert config["zero_optimization"] == {
        "stage": 1,
        "overlap_comm": False,
        "reduce_bucket_size": 7,
    }
    assert OURS["zero_optimization"] == {"stage": 1}


@pytest.mark.parametrize(
    "user, environment, said",
    [
        ({"gradient_clipping": 1.0}, {}, r"gradient_clipping = 1\.0, but .* = 0\.5"),
        ({"zero_optimization": {"stage": 3}}, {}, "stage = 3, but engine.zero_stage = 1"),
        ({"sequence_parallel_size": 2}, {}, "parallel.sp"),
        ({"optimizer": {"type": "Adam"}}, {}, "optim"),
        ({}, {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}, "ZERO_STAGE.* = 2, but .* = 1"),
        ({}, {"ACCELERATE_DEEPSPEED_CONFIG_FILE": "none.json"}, r"none\.json.*cannot be read"),
    ],
)
def test_a_contradiction_names_both_values(user, environment, said):
    with pytest.raises(ConfigError, match=said) as error:
        deepspeed_config(OURS, user, environment)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name, precision, environment, said",
    [
        ("ddp", "float32", {"ACCELERATE_USE_DEEPSPEED": "true"}, "engine=deepspeed"),
        ("ddp", "float32", {"ACCELERATE_MIXED_PRECISION": "bf16"}, "'bf16'.*'float32'"),
        ("deepspeed", "float64", {}, "engine=ddp"),
        ("deepspeed", "float32", {}, "needs torch.distributed"),
    ],
)
def test_engines_that_cannot_work_say_so(name, precision, environment, said):
    with pytest.raises(ConfigError, match=said):
        build_engine(
            name,
            nn.Linear(3, 2),
            torch.optim.SGD,
            gradient_clipping=0.0,
            micro_batch_size=1,
            accumulation=1,
            precision=precision,
            environment=environment,
        )
