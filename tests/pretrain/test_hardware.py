import pytest

from pretrain.errors import RunError
from pretrain.hardware import GPUS, find_gpu, gpu_called


@pytest.mark.parametrize(
    ("told", "entry"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA GH200 480GB", "GH200"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A100-SXM4-40GB", "A100-SXM4-40GB"),
        ("NVIDIA A10", "A10"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", "L40S"),
        ("Tesla V100-SXM2-32GB", "V100"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("h100", "H100"),
    ],
)
def test_devices_by_their_own_names(told: str, entry: str) -> None:
    assert find_gpu(told) == GPUS[entry]


def test_an_unknown_one() -> None:
    assert find_gpu("NVIDIA A10G") is None
    with pytest.raises(RunError, match="--gpu hall9000: not known; known are B200, H200"):
        gpu_called("hall9000")
