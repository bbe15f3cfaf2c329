"""What GPUs can do at most: the numbers that MFU, memory and time are judged by, from their makers' data sheets."""

from typing import NamedTuple

import torch

from pretrain.errors import RunError


class GPU(NamedTuple):
    """Dense peaks without sparsity; memory as the driver reports it."""

    tflops: float  # TFLOP/s of bfloat16 matrix products; of float16 where there is no bfloat16
    memory: float  # GiB
    link: float  # GB/s to the other GPUs of the node, in one direction
    bfloat16: bool = True


# name -> what the data sheet says; the longest name that a device's own name holds is the one
GPUS = {
    "B200": GPU(2250, 180, 900),
    "H200": GPU(989, 139.8, 450),
    "GH200": GPU(989, 94.5, 450),
    "H100 PCIe": GPU(756, 79.6, 64),
    "H100 NVL": GPU(835, 93.1, 300),
    "H100": GPU(989, 79.6, 450),
    "A100-SXM4-40GB": GPU(312, 39.4, 300),
    "A100-PCIE-40GB": GPU(312, 39.4, 32),
    "A100": GPU(312, 79.2, 300),
    "L40S": GPU(362, 44.5, 32),
    "L4": GPU(121, 22.0, 32),
    "A10": GPU(125, 22.1, 32),
    "RTX A6000": GPU(155, 47.5, 32),
    "RTX 4090": GPU(165, 23.6, 32),
    "RTX 3090": GPU(71, 23.6, 16),
    "V100": GPU(125, 31.7, 150, bfloat16=False),
    "T4": GPU(65, 14.6, 16, bfloat16=False),
    "MI300X": GPU(1307, 191.5, 448),
    "MI250X": GPU(191.5, 64, 100),
}


def find_gpu(name: str) -> GPU | None:
    """The entry of a device by its own name ("NVIDIA H100 80GB HBM3") or a short one ("h100"); None: not known."""
    words = name.lower().replace("nvidia", "")
    known = [entry for entry in GPUS if _is_in(entry.lower(), words)]
    return GPUS[max(known, key=len)] if known else None


def _is_in(entry: str, words: str) -> bool:
    """Whether all parts of the entry stand in the words, none of them inside of another name (A10 in A100)."""
    parts = words.replace("-", " ").split()
    return all(any(part == p for p in parts) for part in entry.replace("-", " ").split())


def gpu_called(name: str) -> GPU:
    """As `find_gpu`; RunError when it is not known."""
    gpu = find_gpu(name)
    if gpu is None:
        raise RunError(f"--gpu {name}: not known; known are {', '.join(GPUS)}")
    return gpu


def gpu_here() -> GPU | None:
    """That of this machine, with the memory that it really has; None: no GPU, or one that is not known."""
    if not torch.cuda.is_available():
        return None
    gpu = find_gpu(torch.cuda.get_device_name())
    if gpu is None:
        return None
    return gpu._replace(memory=torch.cuda.get_device_properties(0).total_memory / 2**30)
